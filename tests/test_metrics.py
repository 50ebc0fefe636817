import math
from pathlib import Path

import numpy as np
import pytest
import torch

from components.metrics import mse_to_psnr, psnr, ssim

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
A, B = torch.tensor(GOLDEN["a"]), torch.tensor(GOLDEN["b"])


def slow_ssim(a, b):
    """SSIM window by window, as its definition reads."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            for channel in range(3):
                x = a[row : row + 11, column : column + 11, channel]
                y = b[row : row + 11, column : column + 11, channel]
                mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
                var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
                covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
                values.append(
                    (2 * mean_x * mean_y + 1e-4)
                    * (2 * covariance + 9e-4)
                    / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
                )
    return np.mean(values)


def test_psnr_and_ssim_match_the_reference():
    assert psnr(A, B) == pytest.approx(GOLDEN["psnr"].item(), rel=1e-4)
    assert ssim(A, B) == pytest.approx(GOLDEN["ssim"].item(), rel=1e-4)
    assert ssim(A, A) == pytest.approx(GOLDEN["ssim_self"].item(), rel=1e-4)


@pytest.mark.parametrize(("seed", "size"), [(0, (11, 11)), (1, (11, 16)), (2, (17, 13))])
def test_ssim_equals_its_definition_window_by_window(seed, size):
    random = np.random.default_rng(seed)
    a = random.random((*size, 3))
    b = np.clip(a + 0.2 * random.standard_normal(a.shape), 0, 1)
    assert ssim(torch.tensor(a), torch.tensor(b)) == pytest.approx(slow_ssim(a, b), abs=1e-5)


@pytest.mark.parametrize("size", [(10, 50), (50, 10), (8, 8)])
def test_a_picture_smaller_than_the_window_has_no_ssim(size):
    assert ssim(torch.rand(*size, 3), torch.rand(*size, 3)) is None


def test_psnr_of_a_known_error_and_of_equal_pictures():
    assert mse_to_psnr(0.01) == pytest.approx(20.0)
    assert psnr(torch.zeros(4, 4, 3), torch.full((4, 4, 3), 0.1)) == pytest.approx(20.0)
    assert psnr(A, A) == math.inf
