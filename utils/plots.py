"""Figures of a comparison, drawn from results.json and views.npz of its runs."""

import statistics
import warnings
from pathlib import Path

import cv2
import numpy as np

from utils.files import reason
from utils.images import depth_to_color, error_map, heat_map
from utils.run_folder import naming_os_errors
from utils.views import read_views

# Told apart by colour-blind readers too (Okabe and Ito); the baseline is black.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
INCH = 2.3
MOST_COLUMNS = 8
# Side of the square over which draws are averaged for the eye, pixels.
SMOOTH = 5


def write_figures(rows: dict[str, list[dict]], folder: Path) -> None:
    """Draw what the runs (by tag, seeds in order) have into png files in `folder`, and into TensorBoard events there.

    Raises RunFolderError if they cannot be written.
    """
    views = {tag: _views(group) for tag, group in rows.items()}
    views = {tag: view for tag, view in views.items() if view is not None}
    figures = {"psnr_over_iterations": curve_figure(rows, "iteration"), "psnr_over_seconds": curve_figure(rows, "s")}
    figures["memory"] = memory_figure(rows)
    if views:
        figures |= {"views": view_figure(views), "draws": draw_figure(views)}
        figures["overview"] = overview_figure(rows, views)
    with naming_os_errors(folder):
        for old in folder.glob("events.out.*"):
            old.unlink(missing_ok=True)  # a sweep beside this one may have done it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(str(folder))
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
            board.add_image(f"comparison/{name}", _pixels(figure), dataformats="HWC")
        board.close()


def _pixels(figure) -> np.ndarray:
    """uint8 [H, W, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def new_figure(width: float, height: float):
    """An empty figure, inches, that needs no display and leaves no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _views(group: list[dict]) -> dict[str, np.ndarray] | None:
    """views.npz of the first seed that has one."""
    for run in group:
        path = Path(run["folder"]) / "views.npz"
        if path.is_file():
            try:
                return read_views(path) | {"tag": run["tag"]}
            except (OSError, ValueError) as error:
                warnings.warn(f"left out of the figures: {path} is damaged ({reason(error)})", stacklevel=2)
    return None


def curve_figure(rows: dict[str, list[dict]], over: str):
    """Test PSNR of the evaluations in between, over `iteration` or over seconds (`s`)."""
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    _draw_curves(axes, rows, "iteration" if over == "iteration" else "train_seconds")
    axes.set_xlabel("iteration" if over == "iteration" else "seconds of training (evaluations excluded)")
    if axes.lines:
        axes.legend()
    return figure


def _draw_curves(axes, rows: dict[str, list[dict]], key: str) -> None:
    drawn = False
    for number, (tag, group) in enumerate(rows.items()):
        curves = [run["test_curve"] for run in group if run.get("test_curve")]
        length = min((len(curve["psnr"]) for curve in curves), default=0)
        if not length:
            continue
        x = np.array([curve[key][:length] for curve in curves], dtype=float).mean(0)
        y = np.array([curve["psnr"][:length] for curve in curves], dtype=float)
        colour, mean = COLOURS[number % len(COLOURS)], y.mean(0)
        axes.plot(x, mean, color=colour, marker="o", markersize=3, label=tag)
        if len(curves) > 1:
            spread = y.std(0, ddof=1)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        drawn = True
    axes.set_ylabel("test PSNR, dB (the --N_vis views)")
    axes.grid(alpha=0.3)
    if not drawn:
        axes.set_title("no evaluations in between (--vis_every)")


def memory_figure(rows: dict[str, list[dict]]):
    """Step memory before and after the alpha mask, a pair of bars a tag."""
    figure = new_figure(7.5, 1.6 + 0.5 * len(rows))
    axes = figure.subplots()
    phases = (("before_mask", "before the alpha mask"), ("after_mask", "after it, on the full grid"))
    for shift, (stage, label) in enumerate(phases):
        values = []
        for group in rows.values():
            stages = [(run.get("stages") or {}).get(stage) or {} for run in group]
            known = [s["step_memory_mb"] for s in stages if s.get("step_memory_mb") is not None]
            values.append(statistics.fmean(known) if known else 0.0)
        places = np.arange(len(rows)) + 0.4 * shift - 0.2
        bars = axes.barh(places, values, height=0.38, color=("#56B4E9", "#0072B2")[shift], label=label)
        axes.bar_label(bars, [f"{v:.0f}" if v else "" for v in values], padding=2, fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("memory of a step beyond what stays, MB (2^20 bytes)")
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _show(axes, picture: np.ndarray, title: str = "", below: str = "") -> None:
    axes.imshow(picture, interpolation="nearest" if min(picture.shape[:2]) < 128 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(below, fontsize=7)


def _psnr(view: dict[str, np.ndarray]) -> float:
    difference = view["rgb"].astype(np.float64) / 255 - view["truth"].astype(np.float64) / 255
    return -10 * np.log10(max(np.mean(difference**2), 1e-12))


def _grid(figure, n_rows: int, n_columns: int) -> np.ndarray:
    return np.asarray(figure.subplots(n_rows, n_columns, squeeze=False))


def _draw_views(axes: np.ndarray, views: dict[str, dict]) -> None:
    """Renderings, error maps and depth [3 rows] of one test view; the first column is the truth."""
    first = next(iter(views.values()))
    near, far = first["depth_limits"]
    _show(axes[0, 0], first["truth"], "ground truth")
    for unused in axes[1:, 0]:
        unused.axis("off")
    axes[1, 0].text(
        0.5, 0.5, "mean |error|\nover channels,\nblack 0, bright\n0.2 and more", ha="center", va="center", fontsize=8
    )
    axes[2, 0].text(0.5, 0.5, f"depth,\nred {near:.2g},\nblue {far:.2g}", ha="center", va="center", fontsize=8)
    for column, (tag, view) in enumerate(views.items(), 1):
        _show(axes[0, column], view["rgb"], tag, f"{_psnr(view):.2f} dB")
        _show(axes[1, column], error_map(view["rgb"], view["truth"]))
        _show(axes[2, column], depth_to_color(view["depth"], near, far, view["opacity"]))


def _draw_draws(axes: np.ndarray, views: dict[str, dict]) -> None:
    """The watched photo [one row] and where each sampler's rays fell on it."""
    _show(axes[0], next(iter(views.values()))["photo"], "a training view")
    for place, (tag, view) in zip(axes[1:], views.items(), strict=False):
        # A pixel is drawn once or twice in a short run; the mean over its neighbours shows the density.
        density = cv2.blur(view["draws"], (SMOOTH, SMOOTH))
        _show(
            place,
            heat_map(density),
            f"{tag}: rays",
            f"{int(view['draws'].sum())} on this view, {SMOOTH}x{SMOOTH} means",
        )


def _some(views: dict[str, dict]) -> dict[str, dict]:
    return dict(list(views.items())[:MOST_COLUMNS])


def view_figure(views: dict[str, dict]):
    """Renderings, error maps and depth of the same test view, side by side."""
    views = _some(views)
    figure = new_figure(INCH * (1 + len(views)), INCH * 3.2)
    _draw_views(_grid(figure, 3, 1 + len(views)), views)
    return figure


def draw_figure(views: dict[str, dict]):
    """Where each sampler spent its rays."""
    views = _some(views)
    figure = new_figure(INCH * (1 + len(views)), INCH * 1.2)
    _draw_draws(_grid(figure, 1, 1 + len(views))[0], views)
    return figure


def overview_figure(rows: dict[str, list[dict]], views: dict[str, dict]):
    """Views, draws and the curve of test PSNR over seconds in one figure."""
    views = _some(views)
    n_columns = 1 + len(views)
    figure = new_figure(INCH * n_columns, INCH * 5.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.2, 1.4))
    axes = _grid(top, 4, n_columns)
    _draw_views(axes[:3], views)
    _draw_draws(axes[3], views)
    left, right = bottom.subplots(1, 2)
    _draw_curves(left, rows, "iteration")
    left.set_xlabel("iteration", fontsize=8)
    _draw_curves(right, rows, "train_seconds")
    right.set_xlabel("seconds of training", fontsize=8)
    if left.lines:
        left.legend(fontsize=7)
    return figure
