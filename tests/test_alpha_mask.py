"""The alpha mask's one-byte cells answer exactly as a trilinear lookup of the volume."""

import pytest
import torch

from models.alpha_mask import AlphaMask
from models.growth import update_alpha_mask
from tests.helpers import random_field
from tests.reference import sample_alpha
from utils.errors import EmptyMaskError

AABB = torch.tensor([[-1.1, -0.7, 0.2], [0.9, 1.3, 1.7]])


@pytest.mark.parametrize("seed", range(4))
def test_occupied_equals_grid_sample_everywhere(seed):
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(5, 9, 7, generator=generator) < 0.2
    mask = AlphaMask(volume, AABB)
    spread = torch.rand(20000, 3, generator=generator) * 1.8 - 0.4
    points = AABB[0] + spread * (AABB[1] - AABB[0])
    expected = sample_alpha(volume[None, None].float(), AABB, points) > 0
    assert torch.equal(mask.occupied(points), expected)
    assert 0 < expected.sum() < 20000


def test_occupied_equals_grid_sample_on_grid_points_faces_and_corners():
    volume = torch.rand(5, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    aabb = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    mask = AlphaMask(volume, aabb)
    lines = [torch.linspace(-1.5, 1.5, 13), torch.linspace(-1.5, 1.5, 25)]
    for line in lines:
        points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
        assert torch.equal(mask.occupied(points), sample_alpha(volume[None, None].float(), aabb, points) > 0)


def test_the_volume_round_trips():
    volume = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = AlphaMask(volume, AABB)
    assert torch.equal(mask.volume, volume)
    assert mask.grid_size == (3, 6, 4)


def test_points_far_outside_are_empty():
    mask = AlphaMask(torch.ones(3, 3, 3, dtype=torch.bool), AABB)
    assert not mask.occupied(torch.tensor([[1e9, 0.0, 1.0], [-1e9, 0.0, 1.0], [0.0, 0.0, 1e30]])).any()


def test_an_empty_mask_names_the_remedy_and_leaves_the_field_alone():
    field = random_field(0, masked=False)
    with torch.no_grad():
        for factor in (*field.density_plane, *field.density_line):
            factor.zero_()
    field.config.__dict__["density_shift"] = -40.0
    with pytest.raises(EmptyMaskError, match=r"density_shift"):
        update_alpha_mask(field, field.grid_size)
    assert field.alpha_mask is None
