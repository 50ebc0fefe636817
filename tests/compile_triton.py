"""Compile every Triton kernel for GPUs of the compute capabilities in argv (80, 90, ...); no GPU is needed.

    python -m tests.compile_triton 80 90 network

Says one line a kernel. The marching kernels must hold no fused multiply-add: they would round otherwise than torch.
"""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from models.kernels import triton_common, triton_evaluation, triton_lookups, triton_network, triton_rendering

# Types of the parameters; what is not here and not a size is a pointer to float32.
LONGS = ["n_candidates", "counts", "offsets", "rays", "coloured", "coloured_offsets"]
TYPES = {**dict.fromkeys(LONGS, "*i64"), **dict.fromkeys(("cells", "allowed"), "*u8")}
TYPES |= dict.fromkeys(("ray", "count"), "*i64") | dict.fromkeys(("begin", "end"), "i32")
TYPES |= {"n": "i32", "n_samples": "i32", "step": "fp32", "shift": "fp32", "opaque": "fp32"}
# Bytes of shared memory that a program may have on an H100.
SHARED = 227 << 10


def compiled(kernel, capability: int, constants: dict, types=(), **options) -> str:
    """PTX of a kernel; constants that it does not have are left out."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {**TYPES, **{name: "i32" for name in names if name.startswith("size_")}, **dict(types)}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    result = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    if result.metadata.shared > SHARED:
        raise SystemExit(f"{kernel.__name__} needs {result.metadata.shared} bytes of shared memory: {constants}")
    print(f"compiled {kernel.__name__} for {capability}: {constants}")
    return result.asm["ptx"]


def compile_network() -> None:
    """The colour network's kernels for a usual and an odd network, in all precisions, and for an H100, the only one
    that they are for; they must fit into its shared memory."""
    usual = {"F": 27, "FEA_PE": 2, "VIEW_PE": 2, "WIDTH": 176, "H": 128, "F2": 32, "V2": 16, "H2": 128}
    odd = {"F": 64, "FEA_PE": 0, "VIEW_PE": 10, "WIDTH": 128, "H": 100, "F2": 64, "V2": 64, "H2": 128}
    network = triton_network
    for sizes, precision in ((usual, "tf32"), (usual, "bf16"), (usual, "tf32x3"), (odd, "tf32"), (odd, "tf32x3")):
        flags = {"COUNTED": precision == "tf32", "VIEW": precision != "tf32", "PRECISION": precision}
        for kernel in (network._network_forward, network._hidden_gradients, network._input_gradients):
            compiled(kernel, 90, sizes | flags | {"P": network._ROWS}, **network._LAUNCH)


def main() -> None:
    warp, exact = {"num_warps": triton_rendering._WARPS}, triton_common.UNFUSED
    block = {"BLOCK": triton_rendering._BLOCK}
    if "network" in sys.argv[1:]:
        compile_network()
    for capability in (int(word) for word in sys.argv[1:] if word != "network"):
        compiled(triton_common._number, capability, {}, {"out": "*i64"})
        for count, padded, summed in ((16, 16, True), (48, 64, False), (5, 8, False)):
            tile = {"SUM": summed, "P": triton_lookups._TILE // padded}
            modes = {f"C_{m}": count for m in range(3)} | {f"C2_{m}": padded for m in range(3)} | tile
            one = {"C": count, "C2": padded} | tile
            walks = one | {"P": triton_lookups._GRADIENT_TILE // padded, "LENGTH": triton_lookups._LENGTH}
            mode = {"U": 0, "V": 2, "W": 1, "WIDTH": 3 * count, "OFFSET": count}
            compiled(triton_lookups._vm_gradients, capability, walks | mode)
            compiled(triton_lookups._cp_gradients, capability, walks)
            if count == 16:
                compiled(triton_lookups._vm_positions, capability, modes)
                compiled(triton_lookups._cp_positions, capability, one)
                segment = {"SOFTPLUS": True, "SEGMENT": triton_evaluation._SEGMENT}
                scalar = {"scale": "fp32"}
                compiled(triton_evaluation._vm_until_opaque, capability, modes | segment, scalar)
                compiled(triton_evaluation._cp_until_opaque, capability, one | segment, scalar)
            if count == 48:
                compiled(triton_lookups._vm_forward, capability, modes)
                compiled(triton_lookups._cp_forward, capability, one)
        for flag in (False, True):
            for ndc in (False, True):
                flags = {"NDC": ndc, "JITTERED": flag and not ndc, "MASKED": flag} | block
                for kernel in (triton_rendering._count, triton_rendering._fill):
                    if "fma" in compiled(kernel, capability, flags, **warp, **exact):
                        raise SystemExit(f"{kernel.__name__} fuses multiplications and additions")
            flags = {"SOFTPLUS": not flag, "DISTANCES": flag} | block
            for kernel in (triton_rendering._weights_forward, triton_rendering._weights_backward):
                compiled(kernel, capability, flags, {"scale": "fp32"}, **warp)
        compiled(triton_rendering._composite_forward, capability, block, **warp)
        compiled(triton_rendering._composite_backward, capability, {"BLOCK": triton_rendering._FLAT_BLOCK})


if __name__ == "__main__":
    main()
