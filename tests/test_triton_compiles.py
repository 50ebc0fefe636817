"""A training step's and an evaluation's own launches of Triton kernels, compiled for an H100 without a GPU.

tests/compile_triton.py names types and constants itself. Here the project's functions launch as they do on a GPU: what
they pass is bound, typed and specialised by Triton and compiled down to machine code; only nothing runs. Each model is
one process, `python -m tests.test_triton_compiles MODEL`, because this one's Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CAPABILITY = 90
ROOT = Path(__file__).resolve().parent.parent
# By model: its kernels, and how often each is compiled - sums and products, modes, with and without jitter.
COMMON = {"_count": 2, "_fill": 2, "_weights_forward": 1, "_weights_backward": 1}
COMMON |= {"_composite_forward": 1, "_composite_backward": 1}
# With and without a number of samples that only the device knows.
COMMON |= {"_network_forward": 2, "_hidden_gradients": 2, "_input_gradients": 2}
KERNELS = {
    "TensorVMSplit": {"_vm_forward": 2, "_vm_gradients": 6, "_vm_positions": 2, "_vm_until_opaque": 1},
    "TensorCP": {"_cp_forward": 2, "_cp_gradients": 2, "_cp_positions": 2, "_cp_until_opaque": 1},
}
# Bytes a thread that do not fit into its registers, of 1020.
SPILLED = {"_hidden_gradients": 320, "_input_gradients": 32}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    """What `main` says of each model; both at once."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    command = [sys.executable, "-m", "tests.test_triton_compiles"]
    processes = {model: subprocess.Popen([*command, model], **pipes) for model in KERNELS}
    ended = {model: process.communicate() for model, process in processes.items()}
    assert not any(p.returncode for p in processes.values()), "\n".join(err[-3000:] for _, err in ended.values())
    return {model: json.loads(out.splitlines()[-1]) for model, (out, _) in ended.items()}


@pytest.mark.parametrize("model", KERNELS)
def test_each_kernel_compiles_once_whatever_the_numbers_of_points_and_the_grid(compiled, model):
    names = [kernel["name"] for kernel in compiled[model]["kernels"]]
    assert {name: names.count(name) for name in set(names)} == COMMON | KERNELS[model]
    assert compiled[model]["compiled_later"] == []


@pytest.mark.parametrize("model", KERNELS)
def test_registers_suffice(compiled, model):
    for kernel in compiled[model]["kernels"]:
        most = SPILLED.get(kernel["name"], 0)
        assert kernel["local"] == 0, kernel
        assert kernel["stack"] <= most, kernel


@pytest.mark.parametrize("model", KERNELS)
def test_marching_fuses_nothing_in_machine_code_either(compiled, model):
    marching = [kernel for kernel in compiled[model]["kernels"] if kernel["name"] in ("_count", "_fill")]
    assert len(marching) == 4
    assert all(kernel["adds"] and not kernel["fused"] for kernel in marching)


def test_rows_are_read_and_added_to_sixteen_bytes_at_once(compiled):
    for kernel in compiled["TensorVMSplit"]["kernels"]:
        if kernel["name"] in ("_vm_forward", "_vm_gradients", "_vm_until_opaque"):
            # A mode's plane has four corners, its line two; forward takes three modes.
            modes = 1 if kernel["name"] == "_vm_gradients" else 3
            assert kernel["wide_reads"] >= 6 * modes, kernel
        if kernel["name"] == "_vm_gradients":
            assert kernel["wide_additions"] >= 6, kernel
            assert kernel["narrow_additions"] == 0, kernel


# --- the other process -----------------------------------------------------------------------------------------------
def main(model: str) -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Target:
        """A device to compile for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

    launch, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        """Compile what is launched, and put plausible values where the next steps depend on them."""
        assert all(number > 0 for number in grid)
        found.setdefault(
            (self.__name__, (kernel := launch(self, *args, grid=grid, warmup=True, **options)).hash), kernel
        )
        if self.__name__ == "_count":  # (counts, n_candidates, ...)
            args[0].copy_(args[1].clamp_max(5))
        elif self.__name__ == "_fill":  # (rays, ts, deltas, positions, box_scale, offsets, ...)
            rays = torch.repeat_interleave(args[5].diff())
            args[0][: len(rays)].copy_(rays)
            for out, value in zip(args[1:4], (2.0, 0.01, 0.5), strict=True):
                out.fill_(value)
        elif self.__name__ != "_composite_backward":
            for out in args[: {"_weights_forward": 2, "_composite_forward": 3}.get(self.__name__, 1)]:
                out.fill_(0.05)
        return kernel

    driver.set_active(Target())
    JITFunction.run = compile_only

    from models import FieldConfig, build_field, kernels
    from models.alpha_mask import AlphaMask
    from models.growth import upsample
    from models.kernels import (
        compiled_network,
        triton_common,
        triton_evaluation,
        triton_lookups,
        triton_network,
        triton_rendering,
    )

    triton_common.INTERPRETED = True  # so that tensors on the CPU are taken
    triton_network.suits = lambda _: True
    torch.set_float32_matmul_precision("high")  # as utils.device.choose_device
    compiled_network.serves = lambda *_: False
    # Full lego's components; CP with some that are no power of two, and the other activation.
    counts = {"TensorVMSplit": ((16,) * 3, (48,) * 3, "softplus"), "TensorCP": ((21,), (88,), "relu")}
    density, appearance, activation = counts[model]
    config = FieldConfig(model, density, appearance, near=2.0, far=6.0, density_activation=activation)
    box = torch.tensor([[-1.5] * 3, [1.5] * 3])
    field = build_field(config, box, (16, 17, 18))
    field.alpha_mask = AlphaMask(torch.ones(9, 8, 7, dtype=torch.bool), box)
    field.kernels = kernels.Kernels(
        "cuda-triton",
        triton_lookups,
        triton_rendering,
        triton_evaluation.weights_until_opaque,
        network=triton_network,
    )

    step(field, 64)
    first = set(found)
    # Numbers of rays, points and grid points that are 1, odd, or no longer divisible by 16: nothing to compile again.
    field.alpha_mask = AlphaMask(torch.ones(16, 5, 2, dtype=torch.bool), box)
    upsample(field, (19, 32, 2))
    for n_rays in (1, 37):
        step(field, n_rays)
    report = [described(name, kernel.asm) for (name, _), kernel in found.items()]
    print(json.dumps({"kernels": report, "compiled_later": [name for name, _ in set(found) - first]}))


def step(field, n_rays: int) -> None:
    """A training step's gradients, those of the rays included as soft mining asks for, the same with room for more
    samples, and an evaluation."""
    import torch

    from components.types import Capacity, Rays

    towards = torch.nn.functional.normalize(torch.tensor([0.1, 0.2, -1.0]), dim=0)
    rays = Rays(torch.tensor([[0.1, 0.2, 4.0]]).repeat(n_rays, 1), towards.repeat(n_rays, 1))
    own = Rays(rays.origins.clone().requires_grad_(), rays.directions.clone().requires_grad_())
    out = field.render(own, 1.0, torch.rand(n_rays, 1), 40)
    assert out.n_live == out.n_colour == 5 * n_rays
    out.rgb.sum().backward()
    assert all(parameter.grad is not None for parameter in [*field.parameters(), own.origins, own.directions])
    for spare in (2, 3):
        field.render(own, 1.0, torch.rand(n_rays, 1), 40, Capacity(5 * n_rays + spare, 5 * n_rays)).rgb.sum().backward()
    with torch.no_grad():
        field.render(rays, 1.0)


def described(name: str, asm: dict) -> dict:
    """What a compiled kernel is made of."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def dumped(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dumped("--dump-resource-usage")
        machine_code = dumped("--dump-sass") if name in ("_count", "_fill") else ""
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    additions = re.findall(r"(?:atom|red)\.global\.[\w.]*add[\w.]*", asm["ptx"])
    return {
        "name": name,
        "registers": registers,
        "stack": stack,
        "local": local,
        "fused": len(re.findall(r"\bFFMA", machine_code)),
        "adds": len(re.findall(r"\bFADD", machine_code)),
        "wide_reads": len(re.findall(r"ld\.global[\w.]*\.v4\.b32", asm["ptx"])),
        "wide_additions": sum(".v4." in addition for addition in additions),
        "narrow_additions": sum(".v4." not in addition for addition in additions),
    }


if __name__ == "__main__":
    main(sys.argv[1])
