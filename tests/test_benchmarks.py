"""The benchmarks' fields do the work they claim, and the README's tables are those of the committed JSON."""

import json

import pytest
import torch

from benchmarks.fields import after_mask, before_mask, camera_rays
from benchmarks.readme_tables import RESULTS, ROOT, with_tables
from benchmarks.step import measure


def test_the_readme_shows_the_tables_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert with_tables(text) == text


def test_the_field_after_the_mask_works_as_hard_a_ray_as_a_trained_lego():
    field = after_mask()
    with torch.no_grad():
        out = field.render(camera_rays(4096, 0), 1.0)
    assert 45 <= out.n_live / 4096 <= 50
    assert 11 <= out.n_colour / 4096 <= 13
    assert field.grid_size == (128, 128, 128) == before_mask().grid_size


@pytest.mark.parametrize("variant", ["packed", "twin"])
def test_a_step_is_measured_in_all_its_phases(variant):
    result = measure(variant, "after", 256, 1, "cpu")
    assert min(result["ms"].values()) > 0
    assert result["ms"]["step"] >= result["ms"]["backward"]
    assert result["live_per_ray"] > result["colour_per_ray"] > 0


def test_committed_results_name_device_and_commit():
    files = list(RESULTS.glob("*.json"))
    assert files
    for path in files:
        report = json.loads(path.read_text())
        assert report["device"]
        assert report["commit"]
