"""The demo scene in every other data-set format, so that each loader can be tested on a scene of known depth."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.cameras import pinhole_directions
from dataLoader.demo import (
    CAMERA_ANGLE_X,
    CAMERA_RADIUS,
    hemisphere,
    render_files,
    square_intrinsics,
    write_json,
    write_syn,
)
from dataLoader.poses import look_at

BOX_HALF = 1.25
TT_SIZE = (1920, 1080)
LLFF_FACTOR = 4


def write_demo_as(dataset: str, folder: Path, resolution: int, n_train: int, n_test: int) -> Path:
    """Write the demo scene to the scene folder `folder` in the format `dataset`; returns the folder.

    dataset: syn, nsvf, tt, llff, own_data, or own_data_single (one transforms.json). Images are `resolution` pixels
    wide; those of tt, llff and own_data are not square. llff and own_data_single hold n_train + n_test views, of which
    the loader takes every 8th for testing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[dataset](folder, resolution, n_train, n_test)
    return folder


def forward_cameras(count: int) -> Tensor:
    """Cameras [count, 3, 4] (OpenCV axes) on a plane in front of the scene that look nearly the same way."""
    poses = []
    for i in range(count):
        x = 0.7 * math.sin(2.4 * i) * math.sqrt((i + 0.5) / count)
        z = 1.3 + 0.5 * math.cos(2.4 * i) * math.sqrt((i + 0.5) / count)
        poses.append(look_at(np.array([x, -CAMERA_RADIUS, z]), np.array([0.6 * x, 0.0, 0.4 * z - 0.5])))
    return torch.from_numpy(np.stack(poses)).float()


def _write_nsvf(folder: Path, resolution: int, n_train: int, n_test: int) -> None:
    focal = float(square_intrinsics(800)[0])
    (folder / "intrinsics.txt").write_text(f"{focal} 400.0 400.0 0.\n0. 0. 0.\n0.\n1.\n800 800\n")
    _write_posed_files(folder, square_intrinsics(resolution), (resolution, resolution), n_train, n_test, "2")


def _write_tt(folder: Path, resolution: int, n_train: int, n_test: int) -> None:
    width, height = resolution, round(resolution * 9 / 16)
    fx = 0.5 * TT_SIZE[0] / math.tan(0.5 * CAMERA_ANGLE_X) * 0.75
    matrix = np.array([[fx, 0, 962.5, 0], [0, 0.998 * fx, 538.2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.savetxt(folder / "intrinsics.txt", matrix)
    x, y = width / TT_SIZE[0], height / TT_SIZE[1]
    intrinsics = torch.tensor([matrix[0, 0] * x, matrix[1, 1] * y, matrix[0, 2] * x, matrix[1, 2] * y]).float()
    _write_posed_files(folder, intrinsics, (width, height), n_train, n_test, "1")


def _write_posed_files(
    folder: Path, intrinsics: Tensor, size: tuple[int, int], n_train: int, n_test: int, test_prefix: str
) -> None:
    (folder / "bbox.txt").write_text(f"{-BOX_HALF} {-BOX_HALF} {-BOX_HALF} {BOX_HALF} {BOX_HALF} {BOX_HALF} 0.05\n")
    cameras = torch.cat([hemisphere(n_train, 0.0), hemisphere(n_test, 0.5)])
    stems = [f"{'0' if i < n_train else test_prefix}_{i:04d}" for i in range(len(cameras))]
    render_files([folder / "rgb" / f"{stem}.png" for stem in stems], cameras, intrinsics, size)
    (folder / "pose").mkdir(exist_ok=True)
    for stem, pose in zip(stems, cameras.double().numpy(), strict=True):
        np.savetxt(folder / "pose" / f"{stem}.txt", np.vstack([pose, [0, 0, 0, 1]]))


def _write_llff(folder: Path, resolution: int, n_train: int, n_test: int) -> None:
    width, height = resolution, resolution * 3 // 4
    intrinsics = square_intrinsics(resolution) * torch.tensor([1.0, 1.0, 1.0, height / width])
    cameras = forward_cameras(n_train + n_test)
    paths = [folder / f"images_{LLFF_FACTOR}" / f"image{i:03d}.png" for i in range(len(cameras))]
    depths = render_files(paths, cameras, intrinsics, (width, height), black=True)
    rows = []
    for pose, depth in zip(cameras.double().numpy(), depths, strict=True):
        right, down, forward, position = pose.T
        hwf = np.array([height, width, float(intrinsics[0])]) * LLFF_FACTOR
        matrix = np.column_stack([down, right, -forward, position, hwf])
        z = _depth_along_axis(depth, intrinsics)
        rows.append(np.concatenate([matrix.ravel(), [z.min(), z.max()]]))
    np.save(folder / "poses_bounds.npy", np.stack(rows))


def _depth_along_axis(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """z [n] (distance along the optical axis) of the pixels of depth [H, W] (along unit rays) that show something."""
    row, column = depth.isfinite().nonzero(as_tuple=True)
    rays = pinhole_directions(torch.stack([column, row], -1) + 0.5, intrinsics)
    return depth[row, column] / torch.linalg.vector_norm(rays, dim=-1)


def _own_camera(resolution: int) -> tuple[tuple[int, int], Tensor]:
    width, height = resolution, resolution * 3 // 4
    focal = float(square_intrinsics(resolution)[0])
    return (width, height), torch.tensor([focal, 1.02 * focal, 0.49 * width, 0.52 * height])


def _write_own_data(folder: Path, resolution: int, n_train: int, n_test: int) -> None:
    size, intrinsics = _own_camera(resolution)
    names = dict(zip(("fl_x", "fl_y", "cx", "cy"), intrinsics.tolist(), strict=True))
    for split, cameras in (("train", hemisphere(n_train, 0.0)), ("test", hemisphere(n_test, 0.5))):
        frames = [(f"./{split}/r_{i}", pose) for i, pose in enumerate(cameras)]
        write_json(folder / f"transforms_{split}.json", {"w": size[0], "h": size[1], **names}, frames)
        render_files([folder / split / f"r_{i}.png" for i in range(len(cameras))], cameras, intrinsics, size)


def _write_own_data_single(folder: Path, resolution: int, n_train: int, n_test: int) -> None:
    """As instant-ngp and nerfstudio write it: intrinsics a frame (here for images twice as large), any order."""
    size, base = _own_camera(resolution)
    cameras = hemisphere(n_train + n_test, 0.0)
    zoom = 1.0 + 0.1 * torch.arange(len(cameras)) / len(cameras)
    intrinsics = base * torch.stack([zoom, zoom, torch.ones_like(zoom), torch.ones_like(zoom)], -1)
    files = [f"images/frame_{i + 1:05d}.png" for i in range(len(cameras))]
    render_files([folder / file for file in files], cameras, intrinsics, size)
    order = sorted(range(len(cameras)), key=lambda i: (i * 5 + 3) % 7)
    keys = ("fl_x", "fl_y", "cx", "cy")
    extras = [dict(zip(keys, (2 * intrinsics[i]).tolist(), strict=True)) | {"sharpness": 50.0} for i in order]
    shared = {"w": 2 * size[0], "h": 2 * size[1], "camera_model": "OPENCV", "k1": 0.0, "p1": 0.0, "aabb_scale": 4}
    write_json(folder / "transforms.json", shared, [(files[i], cameras[i]) for i in order], extras)


_WRITERS = {
    "syn": write_syn,
    "nsvf": _write_nsvf,
    "tt": _write_tt,
    "llff": _write_llff,
    "own_data": _write_own_data,
    "own_data_single": _write_own_data_single,
}
