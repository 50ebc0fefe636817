"""The feature network on a CPU, derived by hand: what backward needs of the hidden layers is stored, not made again.

Letters: K samples, F features, H hidden units, n a chunk of samples. Equal to models.shading.FeatureNetwork up to
rounding. Generic recomputation (models/chunks.py) repeats the two large matrix products, a quarter of a step's
arithmetic, and autograd passes over the inputs many times; storing both hidden layers costs 8*H bytes a sample. The
inputs, more than half of what could be stored, are cheap and made again.
"""

from functools import partial

import torch
from torch import Tensor

from models.kernels import threads

# Samples at once: their inputs and hidden layers fit a core's cache.
CHUNK = 1 << 10
_TENSORS = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias")


class _Inputs:
    """The network's inputs for a chunk, transposed, [width, n]: features, view, their encodings. So each part lies
    together in memory, and matrix products take either order."""

    def __init__(self, features: Tensor, view: Tensor, fea_pe: int, view_pe: int) -> None:
        n, n_features = features.shape
        widths = [n_features, 3, *[n_features * fea_pe] * 2, *[3 * view_pe] * 2]
        self.all = features.new_empty(sum(widths), n)
        self.frequencies = [2.0 ** torch.arange(pe, dtype=features.dtype)[:, None] for pe in (fea_pe, view_pe)]
        own = self.split = self.all.split(widths)
        own[0].copy_(features.T)
        own[1].copy_(view.T)
        for x, sines, cosines, frequencies in zip(own[:2], own[2::2], own[3::2], self.frequencies, strict=True):
            # components.encodings: the frequencies of one coordinate follow each other.
            angles = (x[:, None] * frequencies).flatten(0, 1)
            torch.sin(angles, out=sines)
            torch.cos(angles, out=cosines)

    def backward(self, number: int, to_all: Tensor) -> Tensor:
        """d loss / d features (0) or view (1), [n, *], from d loss / d inputs [width, n]."""
        to_own = to_all.split([part.shape[0] for part in self.split])
        sines, cosines = self.split[2 + 2 * number], self.split[3 + 2 * number]
        slope = to_own[2 + 2 * number].mul_(cosines).addcmul_(to_own[3 + 2 * number], sines, value=-1)
        slope = slope.unflatten(0, (to_own[number].shape[0], -1)) * self.frequencies[number]
        return (to_own[number] + slope.sum(1)).T


def _chunks(number: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, number)) for start in range(0, number, CHUNK)]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pe: tuple[int, int], keep: bool, features: Tensor, view: Tensor, *parameters: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = parameters
        n = len(features)
        rgb = features.new_empty(n, 3)
        hidden = [features.new_empty(n, len(b)) for b in (b1, b2)] if keep else []

        def run(part: slice) -> None:
            size = part.stop - part.start
            first, second = (h[part] for h in hidden) if keep else (b.new_empty(size, len(b)) for b in (b1, b2))
            x = _Inputs(features[part], view[part], *pe)
            torch.addmm(b1, x.all.T, w1.T, out=first).relu_()
            torch.addmm(b2, first, w2.T, out=second).relu_()
            torch.addmm(b3, second, w3.T, out=rgb[part]).sigmoid_()

        threads.together([partial(run, part) for part in _chunks(n)])
        ctx.save_for_backward(features, view, rgb, *hidden, *parameters)
        ctx.pe = pe
        return rgb

    @staticmethod
    def backward(ctx, grad: Tensor):
        features, view, rgb, *hidden = ctx.saved_tensors[:5]
        parameters = ctx.saved_tensors[5:]
        w1, _, w2, _, w3, _ = parameters
        view_too = ctx.needs_input_grad[3]
        to_features, to_view = torch.empty_like(features), torch.empty_like(view) if view_too else None
        parts = _chunks(len(features))
        own = [p.new_empty(len(parts), *p.shape) for p in parameters]

        def run(number: int, part: slice) -> None:
            first, second = (h[part] for h in hidden)
            ones = features.new_ones(len(first))
            x = _Inputs(features[part], view[part], *ctx.pe)
            to_out = grad[part] * rgb[part] * (1 - rgb[part])
            mine = [gradient[number] for gradient in own]

            def layer(to: Tensor, given: Tensor, weight: Tensor, bias: Tensor) -> None:
                torch.mm(to.T, given, out=weight)
                torch.mv(to.T, ones, out=bias)

            layer(to_out, second, *mine[4:])
            to_second = to_out @ w3
            _stop_at_zero(to_second, second)
            layer(to_second, first, *mine[2:4])
            to_first = to_second @ w2
            _stop_at_zero(to_first, first)
            layer(to_first, x.all.T, *mine[:2])
            to_inputs = w1.T @ to_first.T
            to_features[part] = x.backward(0, to_inputs)
            if view_too:
                to_view[part] = x.backward(1, to_inputs)

        threads.together([partial(run, number, part) for number, part in enumerate(parts)])
        return None, None, to_features, to_view, *(gradient.sum(0) for gradient in own)


def _stop_at_zero(gradient: Tensor, activation: Tensor) -> None:
    """ReLU's backward, in place."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0, grad_input=gradient)


def serves(module: torch.nn.Module, *inputs: Tensor) -> bool:
    """Whether `shade` can take these: a float32 FeatureNetwork on the CPU, all of whose parameters are trained."""
    tensors = [*inputs, *module.parameters()]
    return (
        type(module).__name__ == "FeatureNetwork"
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and all(p.requires_grad for p in module.parameters())
    )


def shade(module: torch.nn.Module, features: Tensor, view: Tensor) -> Tensor:
    """rgb [K, 3] of features [K, F] seen along view [K, 3]."""
    named = dict(module.named_parameters())
    parameters = [named[name] for name in _TENSORS]
    return _Network.apply((module.fea_pe, module.view_pe), torch.is_grad_enabled(), features, view, *parameters)
