"""Errors that a user can act on.

Everything that is the user's to mend (a missing file, a wrong option, a damaged checkpoint) is raised as a
`UserError`: one line that names the thing and the remedy. `run.py` prints that line and exits with code 2;
any other exception is a bug of ours and keeps its traceback.
"""

# Characters of one line of a message; names in hostile files can be megabytes long.
MAX_LINE = 600


def printable(text: str) -> str:
    """`text` with control characters and what cannot be encoded escaped, and its lines cut to 600 characters: names
    of files may hold anything, and must not steer a terminal. Line breaks stay."""
    lines = [line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 4]} ..." for line in text.split("\n")]
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in "\n".join(lines))


class UserError(Exception):
    """A fault in the input; the message is one line that names the thing and says what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class OptionError(UserError):
    """An option is unknown, malformed or contradicts another one."""


class SceneError(UserError):
    """A data set on disk is missing, damaged or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe, or does not belong to this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not whole: cut short, or other bits than were written."""


class RunFolderError(UserError):
    """The output folder cannot be written, or belongs to a run with other settings."""


class RunLockedError(RunFolderError):
    """Another process works in the run's folder."""


class MemoryShortage(UserError):
    """The device has not the memory that the settings ask for."""


class EmptyMaskError(UserError):
    """No grid point is dense enough for the alpha mask."""


class RunsFailed(Exception):
    """Some of several runs failed; the message lists them, a line each."""


class RunsLeft(RunsFailed):
    """Some runs were left to processes that may no longer live; the message lists them, and failures."""
