"""What is wrong, or odd, with the cameras of a split as a whole."""

import math

import numpy as np

from dataLoader.assemble import SplitPlan
from dataLoader.checks import MAX_COORDINATE, first_few
from dataLoader.problems import Problems
from utils.resources import total_memory

# Focal length over image width. Beyond the first two no pinhole camera was ever built; within the others most are.
IMPOSSIBLE, UNUSUAL = (0.02, 500.0), (0.15, 20.0)
SAME_POSE = 1e-6
MIN_FORWARD = 1e-3


def check_plan(plan: SplitPlan, problems: Problems) -> None:
    """Add what only shows when images, poses, intrinsics and box are together. Distances are in world units."""
    where = f"{plan.folder} ({plan.split})"
    if not all(np.isfinite(values).all() for values in (plan.cameras.c2w, plan.render_path, plan.volume.aabb)):
        problems.add("poses", f"{where}: the cameras' mean direction is undefined; check the poses")
        return
    if np.abs(plan.cameras.c2w).max() > MAX_COORDINATE:
        problems.add(
            "poses", f"{where}: a camera is farther away than {MAX_COORDINATE:g} units; check poses and bounds"
        )
        return
    _check_mirrored(plan, where, problems)
    _check_intrinsics(plan, where, problems)
    (_check_forward if plan.volume.ndc else _check_box)(plan, where, problems)
    _note_same_poses(plan, where, problems)
    if plan.n_bytes > total_memory():
        problems.add(
            "images",
            f"{where}: {len(plan.cameras.paths)} images of {plan.size[0]}x{plan.size[1]} need "
            f"{plan.n_bytes / 2**30:.0f} GB, more than this machine has; raise --downsample_{plan.split}",
        )


def check_shared_images(plans: dict[str, SplitPlan], problems: Problems) -> None:
    """Note images that are for training and for testing: scores on them say nothing."""
    if len(plans) == 2:
        first, second = (set(plan.cameras.paths) for plan in plans.values())
        if first & second:
            names = first_few(sorted(path.name for path in first & second))
            folder = next(iter(plans.values())).folder
            problems.note(f"{folder}: {len(first & second)} images are in both splits ({names})")


def _check_mirrored(plan: SplitPlan, where: str, problems: Problems) -> None:
    mirrored = np.linalg.det(plan.cameras.c2w[:, :, :3]) < 0
    # All of them alike show a mirrored world, which can be learned; a mixture contradicts itself.
    if mirrored.any() and not mirrored.all():
        fewer = mirrored if mirrored.mean() <= 0.5 else ~mirrored
        names = first_few([plan.cameras.paths[i].name for i in np.flatnonzero(fewer)])
        problems.add("poses", f"{where}: some poses are mirror images of the others ({names}); flip their axes back")


def _check_intrinsics(plan: SplitPlan, where: str, problems: Problems) -> None:
    info, numbers = plan.cameras.info, plan.cameras.intrinsics
    share = numbers[:, :2] / (info.width, info.height)
    if not np.isfinite(numbers).all() or share.min() < IMPOSSIBLE[0] or share.max() > IMPOSSIBLE[1]:
        problems.add(
            "intrinsics",
            f"{where}: focal lengths of {numbers[:, :2].min():.4g} to {numbers[:, :2].max():.4g} px are impossible for "
            f"images {info.width} px wide; they must fit the images' size",
        )
    elif share.min() < UNUSUAL[0] or share.max() > UNUSUAL[1]:
        widest = math.degrees(2 * math.atan(0.5 / share.min()))
        problems.note(f"{where}: unusual focal lengths, the widest view is {widest:.1f} degrees")
    centre = numbers[:, 2:] / (info.width, info.height)
    if (centre < 0).any() or (centre > 1).any():
        problems.note(f"{where}: a principal point lies outside the image")


def _check_box(plan: SplitPlan, where: str, problems: Problems) -> None:
    """A box that is out of reach of every camera, between near and far, can show nothing."""
    low, high = plan.volume.aabb
    position = plan.cameras.c2w[:, :, 3]
    nearest = np.linalg.norm(np.clip(position, low, high) - position, axis=1)
    farthest = np.linalg.norm(np.maximum(abs(position - low), abs(position - high)), axis=1)
    if (nearest > plan.volume.far).all() or (farthest < plan.volume.near).all():
        problems.add(
            "cameras",
            f"{where}: no camera reaches the box {low.round(3).tolist()} to {high.round(3).tolist()} between near "
            f"{plan.volume.near:g} and far {plan.volume.far:g} (distances {nearest.min():.4g} to {farthest.max():.4g});"
            " check --scene_bbox and the poses' scale",
        )


def _check_forward(plan: SplitPlan, where: str, problems: Problems) -> None:
    """In NDC all rays run towards -z, the direction in which the recentred cameras look."""
    info, numbers = plan.cameras.info, plan.cameras.intrinsics
    corners = np.array([[0, 0], [info.width, 0], [0, info.height], [info.width, info.height]])
    plane = (corners - numbers[:, None, 2:]) / numbers[:, None, :2]
    rays = np.concatenate([plane, np.ones_like(plane[..., :1])], -1)
    z = np.einsum("mrc,mc->mr", rays, plan.cameras.c2w[:, 2, :3])
    away = np.flatnonzero((z > -MIN_FORWARD).any(1))
    if len(away):
        names = first_few([plan.cameras.paths[i].name for i in away])
        problems.add("poses", f"{where}: {len(away)} cameras do not look the way the others do ({names}); remove them")


def _note_same_poses(plan: SplitPlan, where: str, problems: Problems) -> None:
    rounded = np.round(plan.cameras.c2w.reshape(-1, 12) / SAME_POSE)
    _, first, count = np.unique(rounded, axis=0, return_index=True, return_counts=True)
    if (count > 1).any():
        name = plan.cameras.paths[first[count > 1][0]].name
        problems.note(
            f"{where}: {int(count.sum() - len(count))} images have the pose of another one, {name} for example"
        )
