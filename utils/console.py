"""Lines for the person at the terminal."""

from tqdm import tqdm


def say(line: str) -> None:
    """Write one line to standard output without tearing a progress bar."""
    tqdm.write(line)
