"""What a CUDA graph does, on a CPU: the operations of a call are recorded, and played again on the same tensors.

Whatever a recorded call takes from Python - numbers, branches, shapes - is what it was while recording, as in a graph;
what would fail there (numbers read back, random numbers of an unregistered generator) is an error here. Memory is not
shared as it is among graphs: a tensor that should have been kept alive, or a race, is not found out.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "rand", "lift_fresh")


class Tape(TorchDispatchMode):
    """Records torch's operations and the launches of interpreted Triton kernels."""

    active: "Tape | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __enter__(self):
        Tape.active = self
        return super().__enter__()

    def __exit__(self, *args):
        Tape.active = None
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.lstrip("_").startswith(tuple(word.lstrip("_") for word in FORBIDDEN)):
            raise AssertionError(f"{name} cannot be recorded")
        if any(x.dtype == torch.bool for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and "index" in name):
            raise AssertionError(f"{name} by a mask cannot be recorded")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def launch(self, run, args, kwargs) -> None:
        """Record and make a launch of a kernel."""
        self.calls.append((run, args, kwargs, None))
        with _disable_current_modes():
            run(*args, **kwargs)

    @torch.no_grad()
    def play(self) -> None:
        """The recorded calls again, their results in the tensors that held them."""
        for call, args, kwargs, out in self.calls:
            given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            again = call(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _memory(old) not in given:
                    assert (old.shape, old.dtype) == (new.shape, new.dtype), call
                    old.detach().copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tape_recorder(monkeypatch):
    """Stands for models.fixed_steps.graph_recorder. A recorded call is made once, which a graph's is not: what it
    changes must be nothing then."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def taped(self, *args, **kwargs):
        if Tape.active is None:
            return run(self, *args, **kwargs)
        return Tape.active.launch(lambda *a, **k: run(self, *a, **k), args, kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", taped)

    def recorder():
        def record(part):
            tape = Tape()
            with tape:
                part()
            return tape.play

        return record

    return recorder
