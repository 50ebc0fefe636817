"""Rendering whole views, and how well they match the pictures that were held out.

Letters: H rows, W columns, P poses. A `render_rays` takes Rays [B] and returns a RenderOutput, without jitter.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from components.cameras import image_rays
from components.metrics import psnr, ssim
from components.perceptual import PerceptualMetrics
from components.types import Rays, RenderOutput, Scene
from utils.images import depth_range, depth_to_color, open_video, save_png, side_by_side, to_uint8
from utils.shortage import is_shortage
from utils.signals import stop_if_asked

RenderRays = Callable[[Rays], RenderOutput]
VIDEO_FPS = 30
# Rays rendered at once, unless the caller says; on CUDA so many as half the free memory holds, if a ray takes RAY_BYTES
# (a thousand samples, a third of them coloured; more would be rare, and ends in smaller parts), within these limits.
CPU_CHUNK, CUDA_CHUNKS, RAY_BYTES = 8192, (1024, 65536), 1 << 17


@dataclass(frozen=True)
class View:
    """One rendered view: rgb [H, W, 3] in [0, 1], opacity [H, W], depth [H, W] in ray parameter t."""

    rgb: Tensor
    opacity: Tensor
    depth: Tensor


@dataclass
class Evaluation:
    """Metrics of test views, one number a view in the order of `indices`; None where a metric does not apply.

    rgb, ground_truth, depth: pictures of the first view, uint8 [H, W, 3] (None if there was no view). Of the same
    view, as numbers: depth_values and opacity_values float32 [H, W], depth_limits, the depths of the colours' ends.
    """

    indices: list[int]
    psnr: list[float] = field(default_factory=list)
    ssim: list[float | None] = field(default_factory=list)
    lpips_alex: list[float | None] = field(default_factory=list)
    lpips_vgg: list[float | None] = field(default_factory=list)
    rgb: np.ndarray | None = None
    ground_truth: np.ndarray | None = None
    depth: np.ndarray | None = None
    depth_values: np.ndarray | None = None
    opacity_values: np.ndarray | None = None
    depth_limits: tuple[float, float] | None = None

    METRICS = ("psnr", "ssim", "lpips_alex", "lpips_vgg")

    @property
    def means(self) -> dict[str, float | None]:
        """The mean of each metric over the views; None unless every view has it."""
        return {name: _mean(getattr(self, name)) for name in self.METRICS}

    def results(self) -> dict:
        """What results.json holds: the means, and `per_view` with the view indices and each metric's list."""
        return {**self.means, "per_view": {n: list(getattr(self, n)) for n in ("indices", *self.METRICS)}}


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else sum(values) / len(values)


def evenly_spaced(n_views: int, n_vis: int) -> list[int]:
    """Indices 0, k, 2k, ... below n_views with k = max(n_views // n_vis, 1), as TensoRF picks its test views.

    n_vis < 0 means every view, 0 none. When n_vis does not divide n_views there may be more than n_vis of them.
    """
    if n_vis == 0:
        return []
    return list(range(0, n_views, 1 if n_vis < 0 else max(n_views // n_vis, 1)))


def rays_at_once(device: torch.device) -> int:
    """How many rays of a view to render at once on `device`, by the memory that is free now."""
    if device.type != "cuda":
        return CPU_CHUNK
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    least, most = CUDA_CHUNKS
    return min(max(free // 2 // RAY_BYTES, least), most)


@torch.no_grad()
def render_view(scene: Scene, render_rays: RenderRays, c2w: Tensor, intrinsics: Tensor, chunk: int = 0) -> View:
    """All pixels of one camera, c2w [3, 4] and intrinsics [4], `chunk` rays at a time (0: see rays_at_once); half as
    many from there on where memory does not suffice. Raises Preempted between two parts if asked to stop."""
    rays = image_rays(scene, c2w, intrinsics)
    chunk, parts, start = chunk or rays_at_once(rays.origins.device), [], 0
    while start < len(rays):
        stop_if_asked()
        try:
            parts.append(render_rays(rays[start : start + chunk]))
            start += chunk
            continue
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if chunk == 1 or not is_shortage(error):
                raise
        # Outside of the handler, whose exception still holds what the attempt had allocated.
        chunk //= 2
        torch.cuda.empty_cache()
    shape = (scene.height, scene.width)
    return View(
        torch.cat([part.rgb for part in parts]).reshape(*shape, 3),
        torch.cat([part.opacity for part in parts]).reshape(shape),
        torch.cat([part.depth for part in parts]).reshape(shape),
    )


def evaluate(
    scene: Scene,
    render_rays: RenderRays,
    indices: Sequence[int],
    perceptual: PerceptualMetrics,
    out_dir: Path | None = None,
    chunk: int = 0,
    save_video: bool = False,
    progress: bool = True,
    prefix: str = "",
) -> Evaluation:
    """Render the views `indices` of `scene` and compare them with its images.

    PSNR is taken of float colours, a view at a time. out_dir: where {prefix}{index:03d}.png, rgbd/ (colours beside
    depth) and, with save_video, video.mp4 and depthvideo.mp4 go. Raises RunFolderError if they cannot be written.
    """
    result = Evaluation(list(indices))
    bar = tqdm(result.indices, desc="test views", unit="view", disable=not progress, leave=False)
    with _Pictures(scene, out_dir, prefix, save_video) as pictures:
        for index in bar:
            view = render_view(scene, render_rays, scene.c2w[index], scene.intrinsics[index], chunk)
            truth = scene.image_rgb(index).to(view.rgb.device)
            result.psnr.append(psnr(view.rgb, truth))
            result.ssim.append(ssim(view.rgb, truth))
            distances = perceptual.measure(view.rgb, truth)
            result.lpips_alex.append(distances["lpips_alex"])
            result.lpips_vgg.append(distances["lpips_vgg"])
            rgb, depth = pictures.add(index, view)
            if result.rgb is None:
                result.rgb, result.depth, result.ground_truth = rgb, depth, to_uint8(truth.cpu().numpy())
                result.depth_values, result.opacity_values = view.depth.cpu().numpy(), view.opacity.cpu().numpy()
                result.depth_limits = pictures.depth_limits
    perceptual.release()
    return result


def render_poses(
    scene: Scene,
    render_rays: RenderRays,
    poses: Tensor,
    intrinsics: Tensor,
    out_dir: Path,
    chunk: int = 0,
    progress: bool = True,
) -> None:
    """Render a camera path, poses [P, 3, 4] with intrinsics [4], at the scene's resolution.

    Writes {number:03d}.png, rgbd/, video.mp4 and depthvideo.mp4 to out_dir. Raises RunFolderError.
    """
    bar = tqdm(poses, desc="camera path", unit="view", disable=not progress, leave=False)
    with _Pictures(scene, out_dir, prefix="", video=True) as pictures:
        for number, c2w in enumerate(bar):
            pictures.add(number, render_view(scene, render_rays, c2w, intrinsics, chunk))


class _Pictures:
    """Turns views into pictures and puts them into a folder, if there is one.

    All depths share one range, found in the first view: colours that mean another depth in each frame would make the
    video flicker.
    """

    def __init__(self, scene: Scene, out_dir: Path | None, prefix: str, video: bool):
        self._limits = (scene.near, scene.far)
        self._range: tuple[float, float] | None = None
        self._folder = None if out_dir is None else Path(out_dir)
        self._prefix = prefix
        self._wants_video = video and out_dir is not None
        self._files = ExitStack()
        self._videos = []

    def __enter__(self) -> "_Pictures":
        if self._wants_video:
            names = ("video.mp4", "depthvideo.mp4")
            with ExitStack() as opened:
                self._videos = [opened.enter_context(open_video(self._folder / name, VIDEO_FPS)) for name in names]
                self._files = opened.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._files.__exit__(*error)

    @property
    def depth_limits(self) -> tuple[float, float]:
        """The depths of the colours' ends."""
        return self._range or self._limits

    def add(self, index: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Save a view; its colours and its depth's as uint8 [H, W, 3]."""
        depth, opacity = view.depth.cpu().numpy(), view.opacity.cpu().numpy()
        if self._range is None:
            self._range = depth_range(depth, opacity, *self._limits)
        pair = to_uint8(view.rgb.cpu().numpy()), depth_to_color(depth, *self._range, opacity)
        if self._folder is not None:
            name = f"{self._prefix}{index:03d}.png"
            save_png(self._folder / name, pair[0])
            save_png(self._folder / "rgbd" / name, side_by_side(pair))
        for video, frame in zip(self._videos, pair, strict=False):
            video.add(frame)
        return pair
