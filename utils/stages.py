"""What steps cost in each stage of a run: before the alpha mask, while the field grows, after it."""

from collections.abc import Mapping, Sequence

STAGES = ("before_mask", "growing", "after_mask")
COUNTS = ("steps", "rays", "live_samples", "colour_samples", "seconds")


def stage_of(iteration: int, masks: Sequence[int], upsamplings: Sequence[int], n_iters: int) -> str:
    """The stage of a step: the first mask ends `before_mask`, the last mask or upsampling of the run `growing`.

    Growth happens at the end of the steps named. A run without a mask stays in the first stage.
    """
    masks = [m for m in masks if m < n_iters]
    if not masks or iteration <= masks[0]:
        return STAGES[0]
    last = max([*masks, *(u for u in upsamplings if u < n_iters)])
    return STAGES[1] if iteration <= last else STAGES[2]


class StageTotals:
    """Sums of COUNTS and the largest step memory (MB) of each stage."""

    def __init__(self) -> None:
        self._totals = {stage: dict.fromkeys((*COUNTS, "step_memory_mb"), 0.0) for stage in STAGES}

    def add(self, stage: str, **amounts: float) -> None:
        """Add to counts of a stage."""
        for name, amount in amounts.items():
            self._totals[stage][name] += amount

    def memory(self, stage: str, step_mb: float) -> None:
        """Steps of a stage needed step_mb, MB (2**20 bytes), beyond what stays."""
        self._totals[stage]["step_memory_mb"] = max(self._totals[stage]["step_memory_mb"], step_mb)

    def total(self, name: str) -> float:
        """A count of all stages together."""
        return sum(totals[name] for totals in self._totals.values())

    def results(self) -> dict[str, dict | None]:
        """For each stage its number of steps, step memory, and means a step; None for a stage without steps."""
        return {stage: _means(totals) if totals["steps"] else None for stage, totals in self._totals.items()}

    def state_dict(self) -> dict:
        """Plain numbers."""
        return {stage: dict(totals) for stage, totals in self._totals.items()}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from the totals of `state_dict`."""
        self._totals = {s: {name: float(state[s][name]) for name in totals} for s, totals in self._totals.items()}


def _means(totals: Mapping[str, float]) -> dict[str, float]:
    steps = totals["steps"]
    means = {name: totals[name] / steps for name in ("rays", "live_samples", "colour_samples")}
    means |= {"ms_per_step": 1000.0 * totals["seconds"] / steps, "step_memory_mb": totals["step_memory_mb"]}
    return {"steps": int(steps), **means}
