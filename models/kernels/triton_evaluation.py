"""Weights where no gradient is asked for: density lookups and weights in one Triton kernel, which ends a ray as soon
as it is opaque.

Letters: K samples, SEGMENT samples of a ray at once, T transmittance. One program takes a ray, a segment at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from components.marching import Samples
from models.kernels import triton_lookups, triton_rendering
from models.kernels.triton_common import UNFUSED, serves
from models.kernels.triton_lookups import Call, cp_products, vm_products
from models.kernels.triton_rendering import opacities

# Samples that are looked up together: at most so many behind the last one that can be seen.
_SEGMENT = 32
# A transmittance that counts as none: float32's rounding of 1, as on the CPU.
_OPAQUE = 1e-7


@triton.jit
def _segment(
    weights, feature, delta, i, valid, carried, shift, scale, opaque, SOFTPLUS: tl.constexpr, SEGMENT: tl.constexpr
):
    """Writes the weights of samples i [SEGMENT], before which `carried` of the light is left; what is left after."""
    alpha = opacities(feature, delta, i, valid, shift, scale, SOFTPLUS)
    left = 1 - alpha + 1e-10
    after = carried * tl.cumprod(left, 0)
    # Exact enough: where T is not yet `opaque`, the product is above 1e-17, and at least a part in 1e10 is left.
    before = after / left
    tl.store(weights + i, tl.where(before < opaque, 0.0, alpha * before), mask=valid)  # which keeps NaN
    return tl.sum(tl.where(tl.arange(0, SEGMENT) == SEGMENT - 1, after, 0.0), 0)


@triton.jit(do_not_specialize=["shift", "scale", "opaque", *triton_lookups.SIZES])
def _vm_until_opaque(
    weights, xyz, delta, offsets, shift, scale, opaque, plane0, line0, plane1, line1, plane2, line2,
    size_u0, size_v0, size_w0, size_u1, size_v1, size_w1, size_u2, size_v2, size_w2,
    C_0: tl.constexpr, C_1: tl.constexpr, C_2: tl.constexpr,
    C2_0: tl.constexpr, C2_1: tl.constexpr, C2_2: tl.constexpr, SOFTPLUS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """weights [K], zero before, of a VM density."""
    ray = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    carried = 1.0
    while (first < end) & (carried >= opaque):
        i = first + tl.arange(0, SEGMENT)
        valid = i < end
        feature = tl.sum(vm_products(plane0, line0, xyz, i, valid, size_u0, size_v0, size_w0, 0, 1, 2, C_0, C2_0), 1)
        feature += tl.sum(vm_products(plane1, line1, xyz, i, valid, size_u1, size_v1, size_w1, 0, 2, 1, C_1, C2_1), 1)
        feature += tl.sum(vm_products(plane2, line2, xyz, i, valid, size_u2, size_v2, size_w2, 1, 2, 0, C_2, C2_2), 1)
        carried = _segment(weights, feature, delta, i, valid, carried, shift, scale, opaque, SOFTPLUS, SEGMENT)
        first += SEGMENT


@triton.jit(do_not_specialize=["shift", "scale", "opaque", "size_0", "size_1", "size_2"])
def _cp_until_opaque(
    weights, xyz, delta, offsets, shift, scale, opaque, line0, line1, line2, size_0, size_1, size_2,
    C: tl.constexpr, C2: tl.constexpr, SOFTPLUS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """weights [K], zero before, of a CP density."""
    ray = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    carried = 1.0
    while (first < end) & (carried >= opaque):
        i = first + tl.arange(0, SEGMENT)
        valid = i < end
        feature = tl.sum(cp_products(line0, line1, line2, xyz, i, valid, size_0, size_1, size_2, C, C2), 1)
        carried = _segment(weights, feature, delta, i, valid, carried, shift, scale, opaque, SOFTPLUS, SEGMENT)
        first += SEGMENT


def weights_until_opaque(
    planes: list[Tensor], lines: list[Tensor], samples: Samples, activation: str, shift: float, scale: float
) -> Tensor:
    """Weights [K] without gradients, as ray_weights of the density's features (planes are empty for CP), but what lies
    behind 1 - 1e-7 of a ray's opacity weighs nothing, and segments that begin there are not looked up."""
    if not serves(samples.position, samples.delta, *planes, *lines):
        lookups, position = triton_lookups, samples.position
        feature = lookups.vm_density(planes, lines, position) if planes else lookups.cp_density(lines, position)
        return triton_rendering.ray_weights(feature, samples, activation, shift, scale)
    factors = triton_lookups.in_order(planes, lines) if planes else lines
    call = Call([factor.detach().contiguous(memory_format=torch.channels_last) for factor in factors])
    weights = torch.zeros_like(samples.t)
    if len(samples):
        kernel = _vm_until_opaque if planes else _cp_until_opaque
        numbers = (float(shift), float(scale), _OPAQUE)
        given = (samples.position.contiguous(), samples.delta.contiguous(), samples.offsets, *numbers)
        factors = (*call.factors, *call.sizes, *call.counts, *call.padded)
        options = {"SOFTPLUS": activation == "softplus", "SEGMENT": _SEGMENT} | UNFUSED
        with torch.cuda.device_of(weights):
            kernel[(samples.n_rays,)](weights, *given, *factors, **options)
    return weights
