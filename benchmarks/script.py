"""How the benchmarks take numbers and end: what a user can mend is one line and exit code 2, as in run.py."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

from utils.errors import RunsFailed, UserError


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`; 0, or after a line on stderr 2 for an error to mend, 1 if runs failed."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunsFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def require_own_seeds(parser: argparse.ArgumentParser, n_seeds: int, rest: Sequence[str]) -> None:
    """Ends with a message if `rest`, the options of the runs, has a seed that all n_seeds runs would share."""
    if n_seeds > 1 and any(word == "--seed" or word.startswith("--seed=") for word in rest):
        parser.error(f"--seed: {n_seeds} runs have seeds of their own, 0 and so on; with --seeds 1 it is the run's")


def result_of(command: Sequence[str], what: str) -> dict:
    """The JSON in the last line of a benchmark's output; it has a process of its own. Raises its UserError, and
    SystemExit with its traceback if it failed otherwise; what: how that names it."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(done.stderr.rpartition("error: ")[2].strip())
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
