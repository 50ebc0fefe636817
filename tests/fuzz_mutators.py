"""Damage for files: blind to bytes, and in terms of JSON, PNG, NPY, text, checkpoints and the file system.

Every function takes a random.Random, from which all its choices come.
"""

import copy
import io
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

NUMBERS = (
    *(0, -1, 1, 2, 7, 1e-30, -0.0, 1e9, 1e10, 1e30, 1e308, -1e308, 2**31, 2**53, 2**63, 10**18, 10**30, 10**400),
    *(float("nan"), float("inf"), -float("inf"), 0.5, 3.14159, 1000000, True, False),
)
TEXTS = (
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "é\u202e",
    "x" * 5000,
    "NaN",
)
WORDS = (
    "nan",
    "inf",
    "1e999",
    "-1",
    "0",
    "1e-300",
    "9" * 5000,
    "x",
    "0x10",
    "\uff11",
    "1_0",
    "[",
    "]",
    "[1,[2]]",
    "None",
    "\0",
)


def any_value(r: Random):
    """A value that a field of a JSON file might not expect."""
    kind = r.randrange(9)
    if kind < 4:
        return r.choice(NUMBERS)
    if kind < 6:
        return r.choice(TEXTS)
    return r.choice((None, [], {}, [[]], [1, 2], {"a": 1}, [None] * 20, [[0.0] * 4] * 4, [1] * 20000, nested(r)))


def nested(r: Random):
    """A list in a list in a list."""
    value = []
    for _ in range(r.choice((5, 40, 300))):
        value = [value]
    return value


def bytes_blindly(r: Random, data: bytes) -> bytes:
    """Flips, cuts, insertions, swapped, doubled and blanked pieces."""
    data = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5, 30))):
        at, length = r.randrange(len(data) + 1), r.choice((1, 1, 2, 4, 16, 200))
        kind = r.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = r.randbytes(length)
        elif kind == 4:
            data[at : at + length] = data[-length:] + data[at : at + length]
        elif kind == 5:
            data[at : at + length] = r.choice((b"\0", b"\xff", b"9", b"[", b" ")) * length
        else:
            other = r.randrange(len(data) + 1)
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return bytes(data)


def json_text(r: Random, text: str) -> str:
    """A value replaced, dropped, doubled or moved; or the text itself made odd."""
    value = json.loads(text)
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        value = in_a_tree(r, value, any_value)
    text = json.dumps(value)
    if r.random() < 0.15:
        deep = r.choice((50, 900, 5000, 100000))
        odd = ("[" * deep, "[" * deep + "]" * deep, '{"a":' * deep, "9" * 5000, "1e999", '"\\ud800"', '{"a":1,"a":2}')
        at = r.choice([m.start() for m in re.finditer(r"[\d\"\[{]", text)] or [0])
        text = text[:at] + r.choice(odd) + text[at + r.randrange(3) :]
    return text


def in_a_tree(r: Random, root, replacement):
    """`root` with one random place in its dictionaries and lists replaced, dropped or doubled."""
    root = copy.deepcopy(root)
    places = [(c, k) for c in containers(root) for k in (c if isinstance(c, dict) else range(len(c)))]
    if not places or r.random() < 0.02:
        return replacement(r)
    # Not only the innermost numbers, of which there are most.
    deep = [place for place in places if not isinstance(place[0][place[1]], (int, float))]
    container, key = r.choice(deep if deep and r.random() < 0.5 else places)
    kind = r.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(r.randrange(len(container) + 1), copy.deepcopy(container[key]))
    elif kind == 2 and isinstance(container[key], (int, float)):
        container[key] *= r.choice((-1, 1e-9, 1e9, 1e200, 0.1, 0.5, 1.01, 1.001, 1.1))
    elif kind == 3:
        other, other_key = r.choice(places)
        container[key] = copy.deepcopy(other[other_key])
    else:
        container[key] = replacement(r)
    return root


def containers(root) -> list:
    """All dictionaries and lists in a tree."""
    found, waiting = [], [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            found.append(item)
            waiting += item.values() if isinstance(item, dict) else item
    return found


def lines_text(r: Random, text: str) -> str:
    """Numbers and words of a text file replaced, lines dropped, doubled and joined."""
    lines = text.split("\n")
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(len(lines))
        kind = r.randrange(8)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[r.randrange(len(lines))])
        elif kind == 2:
            lines[at] += r.choice((" ", ";", "#", "=", "\0", "\u2028", "\r", " \x85")) + r.choice(WORDS)
        elif kind == 3:
            lines[at] *= r.choice((2, 3, 500))
        else:
            words = list(re.finditer(r"[^\s,=\[\]]+", lines[at]))
            if words:
                word = r.choice(words)
                new = (
                    r.choice(WORDS)
                    if r.random() < 0.5
                    else str(r.choice([n for n in NUMBERS if abs(n) < 1e300 or n != n]))
                )
                lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]
    return "\n".join(lines)


# --- images ---
def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with the right check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_parts(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, data) of the chunks of a whole PNG."""
    parts, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def png(r: Random, data: bytes) -> bytes:
    """A forged header, odd chunks, or chunks moved, with right check sums."""
    parts = png_parts(data)
    kind = r.randrange(4)
    if kind == 0:
        width, _, *rest = struct.unpack(">IIBBBBB", parts[0][1])
        sizes = (0, 1, width, 2 * width, 60000, 20000, 2**31 - 1, 2**32 - 1)
        forged = [r.choice(sizes), r.choice(sizes), *rest]
        if r.random() < 0.5:
            forged[2:4] = r.choice((1, 2, 4, 8, 16, 3)), r.choice((0, 2, 3, 4, 6, 5))
            forged[6] = r.choice((0, 1, 2))
        parts[0] = (b"IHDR", struct.pack(">IIBBBBB", *forged))
    elif kind == 1:
        bomb = zlib.compress(b"\0" * 20_000_000)
        odd = (
            *((b"tRNS", r.randbytes(6)), (b"PLTE", r.randbytes(9)), (b"acTL", struct.pack(">II", 3, 0))),
            *(
                (b"zTXt", b"a\0\0" + bomb),
                (b"iCCP", b"a\0\0" + bomb),
                (b"tEXt", b"x" * 100_000),
                (b"eXIf", r.randbytes(40)),
            ),
            *((b"fcTL", r.randbytes(26)), (b"fdAT", r.randbytes(30)), (b"gAMA", r.randbytes(3)), (b"XXXX", b"")),
        )
        parts.insert(r.randrange(1, len(parts)), r.choice(odd))
    elif kind == 2:
        at = r.randrange(len(parts))
        parts.insert(r.randrange(len(parts)), parts.pop(at)) if r.random() < 0.5 else parts.pop(at)
    else:
        at = next(i for i, part in enumerate(parts) if part[0] == b"IDAT")
        pixels = zlib.decompress(parts[at][1])
        wrong = (pixels[: r.randrange(len(pixels))], pixels * 50, r.randbytes(len(pixels)), b"\0" * 30_000_000)
        parts[at] = (b"IDAT", zlib.compress(r.choice(wrong)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def other_image(r: Random, data: bytes) -> bytes:
    """The picture in another format, mode or size, as a file may be although it is called .png."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    modes = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")
    mode, kind = r.choice(modes), r.choice(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "TGA", "ICO"))
    if r.random() < 0.3:
        image = image.resize(r.choice(((1, 1), (16, 16), (33, 32), image.size[::-1])))
    converted = image.convert("RGB").convert(mode) if mode in ("LAB", "YCbCr") else image.convert(mode)
    out = io.BytesIO()
    more = {"save_all": True, "append_images": [converted] * 3} if r.random() < 0.2 else {}
    try:
        converted.save(out, kind, **more)
    except (OSError, ValueError, KeyError):
        image.convert("RGB").save(out, "JPEG")
    return bytes_blindly(r, out.getvalue()) if r.random() < 0.3 else out.getvalue()


def npy(r: Random, data: bytes) -> bytes:
    """Another shape, type or order in the header, or odd numbers in the table."""
    if r.random() < 0.5:
        table = np.load(io.BytesIO(data))
        for _ in range(r.choice((1, 3))):
            table[r.randrange(len(table)), r.randrange(17)] = float(
                r.choice([n for n in NUMBERS if abs(n) < 1e308 or n != n])
            )
        with np.errstate(all="ignore"):
            table = table.astype(r.choice((np.float64, np.float32, np.float16, np.complex64)))
        out = io.BytesIO()
        np.save(out, r.choice((table, table[:1], table.T, table[:, :16], table[None], table[0, 0], table.tolist())))
        return out.getvalue()
    shape = r.choice(
        ("(10, 17)", "(10000000000, 17)", "(99999, 17)", "(-10, 17)", "(10,)", "()", "(1" + ", 1" * 500 + ")", "x")
    )
    kind = r.choice(
        ("'<f8'", "'<f4'", "'>f8'", "'|O'", "'<U1000000'", "'|V1000000000'", "[('a', '<f8')]", "'<M8'", "7")
    )
    header = f"{{'descr': {kind}, 'fortran_order': {r.choice(('False', 'True', '1'))}, 'shape': {shape}, }}\n".encode()
    length = r.choice((len(header), 0, 65535))
    return (
        b"\x93NUMPY" + r.choice((b"\1\0", b"\2\0", b"\3\0", b"\7\7")) + struct.pack("<H", length) + header + data[128:]
    )


# --- checkpoints ---
def torch_value(r: Random):
    """Something that a checkpoint may hold in the wrong place."""
    makers = (
        lambda: any_value(r),
        lambda: torch.zeros(r.choice(((), (0,), (2, 3), (3, 2), (1, 4, 5, 1), (7,)))),
        lambda: torch.zeros(1).expand(100_000, 100_000),
        lambda: torch.full((2, 3), float(r.choice((np.nan, np.inf, 1e38, -1.0)))),
        lambda: torch.zeros(
            2, 3, dtype=r.choice((torch.int8, torch.bool, torch.complex64, torch.float64, torch.bfloat16))
        ),
        lambda: torch.zeros(2, 3).to_sparse(),
        lambda: torch.zeros(10**9, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8),
        lambda: np.zeros(r.choice((0, 5, 1000)), r.choice((np.uint8, np.float64))),
        lambda: (1, 2, 3),
        lambda: {1, 2},
        lambda: torch.Size((3, 4)),
        lambda: torch.float32,
    )
    return r.choice(makers)()


def torch_file(r: Random, state: dict) -> bytes:
    """A checkpoint with some of its values replaced, in torch's present or old format."""
    for _ in range(r.choice((1, 1, 2))):
        state = in_a_tree(r, state, torch_value)
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=r.random() < 0.8)
    return out.getvalue()


def torch_zip(r: Random, data: bytes) -> bytes:
    """The archive written anew, check sums right, with one part damaged, dropped, doubled or packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        parts = source.infolist()
        chosen = next(p for p in parts if p.filename.endswith("data.pkl")) if r.random() < 0.6 else r.choice(parts)
        kind = r.randrange(5)
        for part in parts:
            content, packing = source.read(part), zipfile.ZIP_STORED
            if part is chosen:
                if kind == 0:
                    continue
                if kind == 1:
                    content = content * r.choice((0, 2, 1000)) if len(content) < 10_000 else content[:-1]
                if kind == 2:
                    packing = zipfile.ZIP_DEFLATED
                    content = r.choice((content, b"\0" * 50_000_000))
                if kind >= 3:
                    content = pickled_numbers(r, content) if r.random() < 0.6 else bytes_blindly(r, content)
            target.writestr(part.filename, content, packing)
    return out.getvalue()


def pickled_numbers(r: Random, data: bytes) -> bytes:
    """A pickle with one of its small numbers (sizes, strides, counts) replaced by a larger one."""
    places = [m.start() for m in re.finditer(rb"[KMJ](?=.)", data, re.DOTALL)]
    if not places:
        return data
    at = r.choice(places)
    width = {b"K": 2, b"M": 3, b"J": 5}[data[at : at + 1]]
    new = r.choice((0, 1, 255, -1, 10**6, 2**31 - 1))
    return data[:at] + b"J" + struct.pack("<i", new) + data[at + width :]


# --- file system ---
def file_system(r: Random, path: Path) -> None:
    """The file gone, or something else in its place."""
    content = path.read_bytes()
    path.unlink()
    kind = r.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to(r.choice(("/dev/zero", "/dev/null", "/etc/passwd", "/proc/self/mem", "/nowhere", "/")))
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.with_name(r.choice(("a b", "x\ny", "\x1b[2J", os.fsdecode(b"\xff\xfe"))) + path.suffix).write_bytes(
            content
        )
    elif kind == 6:
        path.write_bytes(r.choice((b"\0", b"9", b"[", b"{", b"\n")) * 40_000_000)
