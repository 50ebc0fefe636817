"""Fidelity of a rendering to its ground truth: PSNR and SSIM (LPIPS is in `components.perceptual`).

Pictures a, b are [H, W, 3] in [0, 1].
"""

import math

import torch
from kornia.metrics import ssim as kornia_ssim
from torch import Tensor

SSIM_WINDOW = 11


def mse_to_psnr(mse: float) -> float:
    """PSNR in dB of a mean squared error of values in [0, 1]: -10 log10(mse); infinite for 0."""
    return -10.0 * math.log10(mse) if mse > 0.0 else math.inf


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of two pictures [H, W, 3], or any tensors of one shape, with values in [0, 1]."""
    return mse_to_psnr(torch.mean((a - b).square()).item())


def ssim(a: Tensor, b: Tensor) -> float | None:
    """Structural similarity of two pictures [H, W, 3], the mean over pixels and channels.

    Wang et al. 2004: 11x11 Gaussian window, sigma 1.5, k = 0.01 and 0.03, range 1, windows wholly inside the
    picture. None if the picture is smaller than the window.
    """
    if min(a.shape[:2]) < SSIM_WINDOW:
        return None
    a, b = (image.permute(2, 0, 1)[None].float() for image in (a, b))
    return kornia_ssim(a, b, SSIM_WINDOW, max_val=1.0, padding="valid").mean().item()
