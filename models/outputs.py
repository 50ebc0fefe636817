"""What a trained field is turned into: scored views, pictures, videos, a mesh, TensoRF's file."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np

from components.draw_counts import DrawCounts
from components.evaluation import Evaluation, evaluate, render_poses
from components.perceptual import PerceptualMetrics
from components.types import Rays, RenderOutput, Scene
from models.field import Field
from models.files import write_mesh, write_tensorf
from models.kernels import threads
from utils.console import say
from utils.images import captioned, error_map, heat_map, save_png, side_by_side
from utils.run_folder import atomic_file


def evaluation_renderer(field: Field, scene: Scene) -> Callable[[Rays], RenderOutput]:
    """Rays -> RenderOutput without jitter, on the scene's background."""

    def render(rays: Rays) -> RenderOutput:
        with threads.taking_over():
            return field.render(rays, float(scene.white_background))

    return render


def score(
    options: Namespace, field: Field, scenes: dict[str, Scene], perceptual: PerceptualMetrics, folder: Path
) -> Evaluation | None:
    """Render the views that --render_test/train ask for into `folder`; returns the test views' evaluation."""
    evaluation = None
    for split in ("train", "test"):
        if getattr(options, f"render_{split}"):
            scene, out = scenes[split], folder / f"imgs_{split}_all"
            views = range(0, scene.n_images, options.test_every if split == "test" else 1)
            render = evaluation_renderer(field, scene)
            scored = evaluate(scene, render, views, perceptual, out, options.eval_chunk, save_video=True)
            means = ", ".join(f"{k} {v:.4f}" for k, v in scored.means.items() if v is not None)
            say(f"{len(views)} {split} views: {means}; pictures in {out}")
            evaluation = scored if split == "test" else evaluation
    return evaluation


def export(options: Namespace, field: Field, test: Scene, folder: Path) -> None:
    """What --render_path and --export_* ask for."""
    if options.render_path:
        out, render = folder / "imgs_path_all", evaluation_renderer(field, test)
        render_poses(test, render, test.render_path, test.intrinsics[0], out, options.eval_chunk)
        say(f"camera path in {out}")
    if options.export_tensorf:
        write_tensorf(field, Path(options.export_tensorf))
        say(f"TensoRF checkpoint in {options.export_tensorf}")
    if options.export_mesh:
        write_mesh(field, folder / "mesh.ply")
        say(f"mesh in {folder / 'mesh.ply'}")


def pictures(evaluation: Evaluation, draws: DrawCounts) -> dict[str, np.ndarray]:
    """By TensorBoard tag, [H, W, 3] uint8: a rendering beside its ground truth, depth, error, where rays were drawn."""
    return {
        "test/rendering_and_truth": side_by_side([evaluation.rgb, evaluation.ground_truth]),
        "test/depth": evaluation.depth,
        "test/error": error_map(evaluation.rgb, evaluation.ground_truth),
        "sampler/draws": side_by_side([draws.photo(), heat_map(draws.counts())]),
    }


def save_overview(path: Path, evaluation: Evaluation) -> None:
    """A rendering, its ground truth and its depth as one picture. Raises RunFolderError."""
    near, far = evaluation.depth_limits
    shown = [
        captioned(evaluation.rgb, f"test view {evaluation.indices[0]}: {evaluation.psnr[0]:.2f} dB"),
        captioned(evaluation.ground_truth, "ground truth"),
        captioned(evaluation.depth, f"depth {near:.3g} (red) to {far:.3g}"),
    ]
    save_png(path, side_by_side(shown))


def save_views(path: Path, evaluation: Evaluation, draws: DrawCounts) -> None:
    """The shown test view and the draws as numbers, for figures of several runs. Raises RunFolderError."""
    with atomic_file(path) as file:
        np.savez_compressed(
            file,
            rgb=evaluation.rgb,
            truth=evaluation.ground_truth,
            depth=evaluation.depth_values.astype(np.float32),
            opacity=evaluation.opacity_values.astype(np.float32),
            depth_limits=np.array(evaluation.depth_limits),
            photo=draws.photo(),
            draws=draws.counts(),
        )
