"""What a results.json must look like for tables and figures to be made of it."""

from collections.abc import Callable
from typing import Any

NUMBERS = (
    *("psnr", "psnr_5view", "ssim", "lpips_alex", "lpips_vgg", "n_iters", "batch_size", "rays_per_step"),
    *("live_samples_per_step", "colour_samples_per_step", "train_seconds", "setup_seconds"),
    *("peak_memory_mb", "static_memory_mb", "step_memory_mb"),
)
# What rows are told apart by. Other texts are only shown, whatever they are.
TEXTS = ("dataset", "scene", "strategy", "tag", "model_name")
TABLES = ("stages", "ms_per_step", "options", "curves", "test_curve")
CURVE = ("iteration", "train_seconds", "psnr")
# No figure of a run is larger; sums and squares of these stay finite.
MAX_NUMBER = 1e15


def fault_of_results(result: Any) -> str | None:
    """What keeps the content of a results.json from being used, None if nothing does. What is absent is no fault."""
    if not isinstance(result, dict):
        return "not a table of results"
    for names, fits, what in (
        (NUMBERS, _is_number, "a number"),
        (TEXTS, _is_text, "a text"),
        (TABLES, _is_table, "a table"),
        (("seed",), _is_seed, "a whole number"),
    ):
        wrong = next((name for name in names if not _absent_or(fits, result.get(name))), None)
        if wrong:
            return f"{wrong} is not {what}"
    stages = (result.get("stages") or {}).values()
    if not all(_absent_or(_is_table, stage) for stage in stages):
        return "stages holds something else than tables"
    for numbers in (result.get("ms_per_step"), *stages):
        if not all(_absent_or(_is_number, number) for number in (numbers or {}).values()):
            return "ms_per_step or stages holds something else than numbers"
    curve = result.get("test_curve")
    return None if curve is None or _is_curve(curve) else "test_curve is none"


def _absent_or(fits: Callable[[Any], bool], value: Any) -> bool:
    return value is None or fits(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_curve(curve: dict) -> bool:
    """Lists of one length by name: `psnr` and what it is drawn over, numbers, null where one was not finite."""
    lists = [curve.get(name) for name in CURVE]
    if not all(isinstance(values, list) and all(_absent_or(_is_number, value) for value in values) for values in lists):
        return False
    return len({len(values) for values in lists}) == 1
