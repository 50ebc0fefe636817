"""The figure of benchmarks/scaling.py: time above, memory below, a column for each thing that varies."""

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.scaling import VARIES
from utils.plots import COLOURS, new_figure

# What varies in words; which memory is shown, its key and its name.
LABELS = {
    "batch": ("batch, rays", "step_tensors_mb", "tensors of a step beyond what stays, MB"),
    "images": ("training images of {size} x {size} pixels", "static_mb", "what stays between steps, MB"),
    "grid": ("grid, points an axis", "step_tensors_mb", "tensors of a step beyond what stays, MB"),
    "resolution": ("width and height of a test view, pixels", "step_memory_mb", "growth of memory in a view, MB"),
}
# Panels (axis, row) whose heights count from zero; the others are logarithmic.
FROM_ZERO = {("images", 0), ("images", 1), ("resolution", 1)}


def curves(report: dict, axis: str) -> dict[str, list[dict]]:
    """The points of an axis by the name of the curve on which they lie, in the order of what varies."""
    found = {}
    for point in sorted((p for p in report["points"] if p["axis"] == axis), key=lambda p: p[VARIES[axis]]):
        path = "dense twin" if point["path"] == "twin" else "packed"
        name = point["strategy"] if axis == "images" else f"{path}, {point['field']} the mask"
        found.setdefault(name, []).append(point)
    return found


def figure(report: dict):
    """Eight panels from the contents of the JSON."""
    drawing = new_figure(15, 7)
    panels = drawing.subplots(2, len(LABELS))
    for column, (axis, (below, memory, memory_name)) in enumerate(LABELS.items()):
        heights = (lambda p: p["ms"]["step"], lambda p, key=memory: p[key])
        names = ("ms a view" if axis == "resolution" else "ms a step", memory_name)
        for row, (height, name) in enumerate(zip(heights, names, strict=True)):
            panel = panels[row, column]
            for number, (label, own) in enumerate(curves(report, axis).items()):
                colour = COLOURS[number if axis == "images" else 1 + ("after" in label)]
                twin = label.startswith("dense")
                style = {"color": colour, "linestyle": "--" if twin else "-", "marker": "s" if twin else "o"}
                panel.plot([p[VARIES[axis]] for p in own], [height(p) for p in own], label=label, markersize=4, **style)
            _scale(panel, sorted({p[VARIES[axis]] for p in report["points"] if p["axis"] == axis}), (axis, row))
            panel.set(xlabel=below.format(**report["base"]), ylabel=name)
            panel.grid(alpha=0.3)
            if row == 0:  # the same below
                if axis == "batch":  # room for the legend above the curves
                    panel.set_ylim(top=20 * panel.get_ylim()[1])
                panel.legend(fontsize=7, loc="upper left" if axis == "batch" else "best")
    facts = f"{report['device']}, torch {report['torch']}, commit {report['commit']}"
    drawing.suptitle(f"{facts}; MB are 2^20 bytes; where it does not vary: {_base(report['base'])}", fontsize=9)
    return drawing


def _base(base: dict) -> str:
    return f"{base['rays']} rays, {base['images']} images of {base['size']}^2 pixels, grid {base['grid']}^3"


def _scale(panel, ticks: list[int], place: tuple[str, int]) -> None:
    if place[0] != "images":
        panel.set_xscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    if place in FROM_ZERO:
        panel.set_ylim(bottom=0)
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
