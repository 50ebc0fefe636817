"""Encodings of positions and directions.

Letters: x coordinates [N, D], n number of frequencies, v unit view directions [N, 3].
"""

import torch
from torch import Tensor

_C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)


def positional_encoding(x: Tensor, n: int) -> Tensor:
    """[N, 2*n*D]: sin(2^k x) of all coordinates, then cos(2^k x), k = 0..n-1 fastest (coordinate-major).

    Eq. 4 of NeRF (arXiv:2003.08934) without the factor pi, as TensoRF uses it.
    """
    frequencies = 2.0 ** torch.arange(n, device=x.device, dtype=x.dtype)
    angles = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


def spherical_harmonics(v: Tensor) -> Tensor:
    """Real spherical harmonics up to degree 2 of unit directions v: [N, 9] (PlenOctrees, arXiv:2103.14024)."""
    x, y, z = v.unbind(-1)
    bases = [
        torch.full_like(x, _C0),
        -_C1 * y,
        _C1 * z,
        -_C1 * x,
        _C2[0] * x * y,
        _C2[1] * y * z,
        _C2[2] * (2.0 * z * z - x * x - y * y),
        _C2[3] * x * z,
        _C2[4] * (x * x - y * y),
    ]
    return torch.stack(bases, dim=-1)
