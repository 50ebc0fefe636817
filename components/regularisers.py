"""Regularisers of the field's factors, as objects in a list: each knows its weight and how the weight decays.

The field offers its factors (`density_factors()`, `appearance_factors()` -> planes, lines); see TensoRF's
section 4.3 (arXiv:2203.09517) for what they are for.
"""

from typing import Protocol

import torch
from torch import Tensor


class HasFactors(Protocol):
    """What a regulariser needs of a field: lists of planes [1, C, H, W] (empty for CP) and lines [1, C, N, 1]; and the
    density factors' `l1_norm`, as fast as the field knows it."""

    def density_factors(self) -> tuple[list[Tensor], list[Tensor]]: ...

    def appearance_factors(self) -> tuple[list[Tensor], list[Tensor]]: ...

    def density_l1(self) -> Tensor: ...


def l1_norm(planes: list[Tensor], lines: list[Tensor]) -> Tensor:
    """Sum over modes of mean|plane| + mean|line|."""
    # A norm is one pass over memory; |x| would be written and read again.
    return sum(torch.linalg.vector_norm(factor, ord=1) / factor.numel() for factor in [*planes, *lines])


def squared_differences(factor: Tensor) -> Tensor:
    """2 * (mean squared difference along rows + the same along columns) of a factor [1, C, H, W]."""
    along_rows = (factor[:, :, 1:, :] - factor[:, :, :-1, :]).square()
    total = along_rows.mean()
    if factor.shape[3] > 1:
        total = total + (factor[:, :, :, 1:] - factor[:, :, :, :-1]).square().mean()
    return 2.0 * total


def total_variation(planes: list[Tensor], lines: list[Tensor]) -> Tensor:
    """TV of VM planes (1e-2 each); of the lines (1e-3 each) where there are no planes (CP)."""
    if planes:
        return sum(1e-2 * squared_differences(plane) for plane in planes)
    return sum(1e-3 * squared_differences(line) for line in lines)


def orthogonality(lines: list[Tensor]) -> Tensor:
    """Sum over lines [1, C, N, 1] of mean |off-diagonal entry| of the Gram matrix of their components.

    A line of a single component has no off-diagonal entry and adds nothing.
    """
    total = lines[0].new_zeros(())
    for line in lines:
        vectors = line[0, :, :, 0]
        n = vectors.shape[0]
        if n > 1:
            gram = vectors @ vectors.T
            off_diagonal = gram.flatten()[1:].view(n - 1, n + 1)[:, :-1]
            total = total + off_diagonal.abs().mean()
    return total


class Regulariser:
    """A term of the loss: weight * penalty(field). `decay`: the weight shrinks by lr_factor before every use."""

    name: str
    decay = False

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def penalty(self, field: HasFactors) -> Tensor:
        raise NotImplementedError

    def advance(self, lr_factor: float) -> None:
        """The weight's decay, before every use."""
        if self.decay:
            self.weight *= lr_factor

    def __call__(self, field: HasFactors, lr_factor: float) -> Tensor:
        """The weighted penalty of this step, a scalar; advances the weight's decay."""
        self.advance(lr_factor)
        return self.weight * self.penalty(field)


class L1Density(Regulariser):
    """Sparsity of the density factors."""

    name = "reg_l1"

    def penalty(self, field: HasFactors) -> Tensor:
        return field.density_l1()


class TVDensity(Regulariser):
    """Total variation of the density factors."""

    name = "reg_tv_density"
    decay = True

    def penalty(self, field: HasFactors) -> Tensor:
        return total_variation(*field.density_factors())


class TVAppearance(Regulariser):
    """Total variation of the appearance factors."""

    name = "reg_tv_app"
    decay = True

    def penalty(self, field: HasFactors) -> Tensor:
        return total_variation(*field.appearance_factors())


class Orthogonality(Regulariser):
    """Orthogonality of the components of the lines, density and appearance."""

    name = "reg_ortho"

    def penalty(self, field: HasFactors) -> Tensor:
        return orthogonality(field.density_factors()[1]) + orthogonality(field.appearance_factors()[1])


def build_regularisers(l1: float, tv_density: float, tv_app: float, ortho: float) -> list[Regulariser]:
    """The regularisers whose weight is positive."""
    terms = [Orthogonality(ortho), L1Density(l1), TVDensity(tv_density), TVAppearance(tv_app)]
    return [term for term in terms if term.weight > 0]
