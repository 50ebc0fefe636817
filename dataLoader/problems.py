"""All that is wrong with a scene, collected so that it can be told at once."""

from collections.abc import Callable
from typing import Any

from utils.errors import SceneError, UserError

# The groups in which problems are told, in this order, and the lines that a group gets.
KINDS = ("options", "files", "frames", "poses", "intrinsics", "images", "cameras")
LINES_A_KIND = 8


class Problems:
    """Faults of a scene by kind, each once, and notes: what is odd but may be meant."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, UserError]] = {}
        self.notes: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, kind: str, error: UserError | str) -> None:
        """Remember a fault (an error, or its message) under a kind of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of problem")
        error = SceneError(error) if isinstance(error, str) else error
        if "\n" in str(error):  # a line break in the name of a file
            error = type(error)(str(error).replace("\n", "\\n"))
        self._found.setdefault(str(error), (kind, error))

    def note(self, line: str) -> None:
        """Remember something odd that does not stop anything."""
        self.notes[line] = None

    def attempt(self, kind: str, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), or None after remembering the UserError that it raised."""
        try:
            return function(*arguments)
        except UserError as error:
            self.add(kind, error)
            return None

    def join(self, other: "Problems") -> None:
        """Add another's faults and notes."""
        for kind, error in other._found.values():
            self.add(kind, error)
        self.notes |= other.notes

    def lines(self) -> list[str]:
        """The faults: grouped by kind, at most 8 lines each and a count of the rest."""
        lines = []
        for kind in KINDS:
            messages = [message for message, (its_kind, _) in self._found.items() if its_kind == kind]
            if messages:
                lines.append(f"{kind} ({len(messages)}):")
                lines += [f"  {message}" for message in messages[:LINES_A_KIND]]
                if len(messages) > LINES_A_KIND:
                    lines.append(f"  ... and {len(messages) - LINES_A_KIND} more of this kind")
        return lines

    def raise_any(self, name: str) -> None:
        """Raise the only fault as it is, several as one SceneError that lists them under `name`."""
        if len(self) == 1:
            raise next(iter(self._found.values()))[1]
        if self:
            raise SceneError("\n".join([f"{name}: {len(self)} problems, nothing was trained", *self.lines()]))
