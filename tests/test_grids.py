"""Resolutions, sample counts and schedules: TensoRF's numbers for the data sets' settings, and edge cases."""

import json

import pytest
import torch

from components.grids import (
    evaluation_samples,
    grid_coordinates,
    learning_rate_factor,
    resolution_for,
    step_length,
    training_samples,
    voxel_schedule,
)
from tests.helpers import GOLDEN

BOXES = {
    "syn": torch.tensor([[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]]),
    "llff": torch.tensor([[-1.5, -1.67, -1.0], [1.5, 1.67, 1.0]]),
}
N_FINAL = {"syn": 27_000_000, "llff": 262_144_000}
OFF_CENTRE = torch.tensor([[-1.0, 0.5, -2.0], [3.0, 1.5, 0.5]])


@pytest.fixture(params=["syn", "llff"])
def case(request):
    """(name, box, golden numbers)."""
    golden = json.loads((GOLDEN / "schedules.json").read_text())
    return request.param, BOXES[request.param], golden[request.param]


def test_voxel_counts_equal_the_reference(case):
    name, _, golden = case
    counts = golden["n_voxels"]
    assert voxel_schedule(counts[0], N_FINAL[name], len(counts) - 1) == counts[1:]


def test_resolutions_equal_the_reference(case):
    _, box, golden = case
    assert [list(resolution_for(n, box)) for n in golden["n_voxels"]] == golden["resolutions"]


def test_training_sample_counts_equal_the_reference(case):
    _, _, golden = case
    assert [training_samples(grid, 0.5, 10**6) for grid in golden["resolutions"]] == golden["n_samples"]


def test_the_learning_rate_factor_equals_the_reference(case):
    _, _, golden = case
    assert learning_rate_factor(0.1, -1, 30_000) == pytest.approx(golden["lr_factor"], rel=1e-12)
    assert learning_rate_factor(0.1, 30_000, 5) == pytest.approx(golden["lr_factor"], rel=1e-12)


def test_the_sample_limit_holds_while_training():
    assert training_samples((128, 128, 128), 0.5, 100) == 100


def test_no_upsampling_needs_no_voxel_counts_and_one_goes_straight_to_the_end():
    assert voxel_schedule(1000, 8000, 0) == []
    assert voxel_schedule(1000, 8000, 1) == [8000]
    assert voxel_schedule(1000, 64000, 2) == [8000, 64000]


@pytest.mark.parametrize("n_voxels", [1, 7, 30])
def test_a_grid_has_at_least_two_points_an_axis(n_voxels):
    thin = torch.tensor([[0.0, 0.0, 0.0], [10.0, 1.0, 0.01]])
    assert min(resolution_for(n_voxels, thin)) >= 2


@pytest.mark.parametrize("n_voxels", [10_000, 123_456])
def test_voxels_are_cubes_and_never_more_than_asked_for(n_voxels):
    grid = resolution_for(n_voxels, OFF_CENTRE)
    assert grid[0] * grid[1] * grid[2] <= n_voxels
    units = (OFF_CENTRE[1] - OFF_CENTRE[0]) / torch.tensor(grid)
    assert units.max() / units.min() < 1.1


def test_a_step_is_the_mean_grid_spacing_times_its_ratio():
    # Extents 4, 1, 2.5 between 9, 6 and 11 points: spacings 0.5, 0.2 and 0.25.
    assert step_length(OFF_CENTRE, (9, 6, 11), 0.5) == pytest.approx((0.5 + 0.2 + 0.25) / 3 * 0.5)


def test_evaluation_steps_reach_through_the_box_along_its_diagonal():
    diagonal = (4.0**2 + 1 + 2.5**2) ** 0.5
    for step in (0.01, 0.3, 1.7, 100.0):
        n = evaluation_samples(OFF_CENTRE, step)
        assert (n - 1) * step <= diagonal + 1e-5
        assert n * step > diagonal


def test_grid_coordinates_put_corners_exactly_on_the_box_and_points_evenly_between():
    grid = (5, 2, 7)
    xyz = grid_coordinates(OFF_CENTRE, grid)
    assert xyz.shape == (*grid, 3)
    for corner in range(8):
        ends = [corner >> axis & 1 for axis in range(3)]
        expected = [OFF_CENTRE[end, axis].item() for axis, end in enumerate(ends)]
        assert xyz[tuple(-end for end in ends)].tolist() == expected
    for axis in range(3):
        spacing = (OFF_CENTRE[1, axis] - OFF_CENTRE[0, axis]) / (grid[axis] - 1)
        torch.testing.assert_close(
            xyz.diff(dim=axis)[..., axis].unique(), spacing[None].expand_as(xyz.diff(dim=axis)[..., axis].unique())
        )
        others = [a for a in range(3) if a != axis]
        assert xyz.diff(dim=axis)[..., others].abs().max() == 0
