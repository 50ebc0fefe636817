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


def _encode(into: Tensor, at: int, x: Tensor, n: int) -> tuple[slice, slice]:
    """Write x's positional encoding (components.encodings) into the columns from `at` on; (sines', cosines') columns."""
    width = x.shape[1] * n
    sines, cosines = slice(at, at + width), slice(at + width, at + 2 * width)
    if width:
        angles = (x[..., None] * _frequencies(n)).flatten(-2)
        torch.sin(angles, out=into[:, sines])
        torch.cos(angles, out=into[:, cosines])
    return sines, cosines


def _frequencies(n: int) -> Tensor:
    return 2.0 ** torch.arange(n, dtype=torch.float32)


def _through_encoding(grad: Tensor, encoded: Tensor, sines: slice, cosines: slice, n: int) -> Tensor | float:
    """d loss / d x [n, D] of what `_encode` wrote."""
    if sines.start == sines.stop:
        return 0.0
    slope = grad[:, sines] * encoded[:, cosines]
    slope.addcmul_(grad[:, cosines], encoded[:, sines], value=-1)
    return slope.unflatten(1, (-1, n)).matmul(_frequencies(n))


class _Layout:
    """Columns of the network's input: features, view, their encodings."""

    def __init__(self, n_features: int, fea_pe: int, view_pe: int) -> None:
        self.n_features, self.fea_pe, self.view_pe = n_features, fea_pe, view_pe
        self.width = n_features * (1 + 2 * fea_pe) + 3 * (1 + 2 * view_pe)

    def inputs(self, features: Tensor, view: Tensor) -> Tensor:
        """[n, width]."""
        x = features.new_empty(len(features), self.width)
        x[:, : self.n_features] = features
        x[:, self.n_features : self.n_features + 3] = view
        self.of_features = _encode(x, self.n_features + 3, features, self.fea_pe)
        self.of_view = _encode(x, self.of_features[1].stop, view, self.view_pe)
        return x

    def backward(self, grad: Tensor, x: Tensor, view_too: bool) -> tuple[Tensor, Tensor | None]:
        """d loss / d (features, view) from d loss / d x."""
        n = self.n_features
        to_features = grad[:, :n] + _through_encoding(grad, x, *self.of_features, self.fea_pe)
        if not view_too:
            return to_features, None
        return to_features, grad[:, n : n + 3] + _through_encoding(grad, x, *self.of_view, self.view_pe)


def _chunks(number: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, number)) for start in range(0, number, CHUNK)]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pe: tuple[int, int], keep: bool, features: Tensor, view: Tensor, *parameters: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = parameters
        n, layout = len(features), _Layout(features.shape[1], *pe)
        rgb = features.new_empty(n, 3)
        hidden = [features.new_empty(n, len(b)) for b in (b1, b2)] if keep else []

        def run(part: slice) -> None:
            size = part.stop - part.start
            first, second = (h[part] for h in hidden) if keep else (b.new_empty(size, len(b)) for b in (b1, b2))
            x = layout.inputs(features[part], view[part])
            torch.addmm(b1, x, w1.T, out=first).relu_()
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
        layout, view_too = _Layout(features.shape[1], *ctx.pe), ctx.needs_input_grad[3]
        to_features, to_view = torch.empty_like(features), torch.empty_like(view) if view_too else None
        parts = _chunks(len(features))
        own = [p.new_empty(len(parts), *p.shape) for p in parameters]

        def run(number: int, part: slice) -> None:
            first, second = (h[part] for h in hidden)
            ones = features.new_ones(len(first))
            x = layout.inputs(features[part], view[part])
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
            layer(to_first, x, *mine[:2])
            to_features[part], of_view = layout.backward(to_first @ w1, x, view_too)
            if view_too:
                to_view[part] = of_view

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
