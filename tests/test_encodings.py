"""The order of the positional encoding, and the orthonormality of the spherical harmonics."""

import math

import pytest
import torch

from components.encodings import positional_encoding, spherical_harmonics


@pytest.mark.parametrize("shape", [(4, 3), (1, 27), (0, 3)])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_encoding_is_all_sines_then_all_cosines_with_the_frequency_fastest(shape, n):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [[f(2**k * value) for f in (math.sin, math.cos) for value in row for k in range(n)] for row in x.tolist()]
    expected = torch.tensor(rows, dtype=torch.float64).view(shape[0], 2 * n * shape[1])
    torch.testing.assert_close(positional_encoding(x, n), expected)


def test_no_frequencies_encode_to_nothing():
    assert positional_encoding(torch.randn(5, 3), 0).shape == (5, 0)


def directions(n_polar=40, n_azimuth=40):
    """Unit directions [N, 3] and weights [N] of a quadrature on the sphere, exact for polynomials of degree 4."""
    edges = torch.linspace(-1, 1, n_polar + 1, dtype=torch.float64)
    # Simpson's rule in z and even spacing in azimuth are exact for the products of two functions of degree 2 up to
    # the rule's error of 1e-6.
    z = torch.cat([edges, (edges[1:] + edges[:-1]) / 2])
    ends = torch.full((n_polar + 1,), 2.0, dtype=torch.float64)
    ends[[0, -1]] = 1.0
    weight = torch.cat([ends, torch.full((n_polar,), 4.0, dtype=torch.float64)]) * (2 / n_polar) / 6
    angle = 2 * math.pi * torch.arange(n_azimuth, dtype=torch.float64) / n_azimuth
    r = (1 - z.square()).clamp_min(0).sqrt()
    xyz = torch.stack(
        [r[:, None] * torch.cos(angle), r[:, None] * torch.sin(angle), z[:, None].expand(-1, n_azimuth)], -1
    )
    return xyz.reshape(-1, 3), (weight[:, None] * 2 * math.pi / n_azimuth).expand(-1, n_azimuth).reshape(-1)


def test_spherical_harmonics_are_orthonormal_on_the_sphere():
    v, weight = directions()
    assert weight.sum().item() == pytest.approx(4 * math.pi)
    bases = spherical_harmonics(v)
    gram = bases.T @ (bases * weight[:, None])
    torch.testing.assert_close(gram, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-5)


def test_spherical_harmonics_have_the_order_and_signs_of_the_reference():
    c1, c2 = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
    c0, c20 = math.sqrt(1 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
    x, y, z = 0.48, -0.6, 0.64
    expected = [
        c0, -c1 * y, c1 * z, -c1 * x,
        c2 * x * y, -c2 * y * z, c20 * (2 * z * z - x * x - y * y), -c2 * x * z, c2 / 2 * (x * x - y * y),
    ]  # fmt: skip
    actual = spherical_harmonics(torch.tensor([[x, y, z]], dtype=torch.float64))
    assert actual[0].tolist() == pytest.approx(expected, rel=1e-6)
