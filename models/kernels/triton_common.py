"""What the Triton kernels share: which tensors they take, and the numbering of points.

Triton's interpreter (TRITON_INTERPRET=1 before the first import) runs the same kernels on the CPU, for the tests.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once, as Triton does when it decorates a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Options of a launch whose kernel rounds after every operation, as torch does, but where it says tl.fma.
UNFUSED = {"enable_fp_fusion": False}


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: float32 on one CUDA device, or on the CPU where Triton is interpreted."""
    device = tensors[0].device
    known = device.type == "cuda" or (INTERPRETED and device.type == "cpu")
    return known and all(x.dtype == torch.float32 and x.device == device for x in tensors)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: Triton's blocks have such lengths."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def numbered(block, SIZE: tl.constexpr):
    """[SIZE] int64: the numbers of block number `block` (int32, as programs are numbered)."""
    return block.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _number(out):
    tl.store(out + tl.arange(0, 16), numbered(tl.program_id(0), 16))


def launch_once() -> None:
    """Compile and run a kernel on the current CUDA device. Raises what Triton raises where it cannot."""
    out = torch.full((16,), -1, device="cpu" if INTERPRETED else "cuda")
    _number[(1,)](out)
    if out.tolist() != list(range(16)):
        raise RuntimeError("a first kernel computed something else than it should")
