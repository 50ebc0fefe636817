"""Whether an image file is cut short, as far as that shows without decoding it."""

import os
from typing import IO

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG_START, JPEG_END, JPEG_SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
# Deflate makes at most 1032 bytes of one; a JPEG's coarsest block is some hundred pixels a byte.
PNG_MAX_RATIO, JPEG_MAX_RATIO = 1032, 2000
MAX_CHUNKS = 100_000
CUT_SHORT = "image cannot be decoded, perhaps cut short ({}); restore the file"


def missing_end(file: IO[bytes], width: int, height: int) -> str | None:
    """What shows that an open PNG or JPEG is cut short, with the remedy; None if nothing does, or for other formats."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    if start == PNG_START:
        # Rows have at least one bit a pixel and one byte of their own.
        if height * (1 + width / 8) > PNG_MAX_RATIO * size:
            return CUT_SHORT.format(f"{size} bytes cannot hold {width}x{height} pixels")
        return None if _png_ends(file, size) else CUT_SHORT.format("its end, IEND, is missing")
    if start.startswith(JPEG_START):
        if width * height > JPEG_MAX_RATIO * size:
            return CUT_SHORT.format(f"{size} bytes cannot hold {width}x{height} pixels")
        return None if _jpeg_ends(file) else CUT_SHORT.format("its end marker is missing")
    return None


def _png_ends(file: IO[bytes], size: int) -> bool:
    file.seek(max(0, size - len(PNG_END)))
    if file.read() == PNG_END:
        return True
    # Something may follow the picture: go from chunk to chunk.
    position = len(PNG_START)
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        head = file.read(8)
        position += 12 + int.from_bytes(head[:4], "big")
        if len(head) < 8 or position > size:
            return False
        if head[4:] == b"IEND":
            return True
    return True


def _jpeg_ends(file: IO[bytes]) -> bool:
    file.seek(-2, os.SEEK_END)
    if file.read() == JPEG_END:
        return True
    # Phones append films and thumbnails: look for the end behind the start of the scan, beyond embedded previews.
    position = 2
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            return True  # not as expected; decoding will tell
        position += 2 + int.from_bytes(marker[2:], "big")
        if marker[1] == JPEG_SCAN:
            file.seek(position)
            return JPEG_END in file.read()
    return True
