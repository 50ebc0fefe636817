"""Golden files, random fields, what waits for a device, and where real data may lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from components.types import Rays
from models import build_field
from models.alpha_mask import AlphaMask
from models.config import FieldConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = ROOT.parent / "shared"

GOLDEN_FIELDS = ("vm_mlpfea", "vm_sh", "vm_mlp", "vm_rgb", "cp_mlpfea", "vm_ndc_relu")


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in float32 proper, not TF32, which a training run in the same process may have chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def golden(name: str) -> dict[str, torch.Tensor]:
    """All arrays of a golden npz as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def golden_config(name: str) -> FieldConfig:
    """The configuration of golden field `name` (golden/README.md)."""
    ndc = name == "vm_ndc_relu"
    cp = name.startswith("cp")
    shading = {"vm_sh": "SH", "vm_mlp": "MLP", "vm_rgb": "RGB"}.get(name, "MLP_Fea")
    return FieldConfig(
        model_name="TensorCP" if cp else "TensorVMSplit",
        n_density=(6,) if cp else (3, 4, 5),
        n_appearance=(9,) if cp else (6, 7, 8),
        n_features=3 if shading == "RGB" else 27,
        shading=shading,
        pos_pe=3,
        view_pe=0 if ndc else 2,
        fea_pe=0 if ndc else 2,
        hidden=32,
        density_activation="relu" if ndc else "softplus",
        density_shift=0.0 if ndc else -10.0,
        near=0.0 if ndc else 2.0,
        far=1.0 if ndc else 6.0,
        ndc=ndc,
    )


def load_parameters(field, arrays: dict, prefix: str) -> None:
    """Copy arrays `prefix/a/b/0` into the field's parameters `a.b.0`; every parameter must be there."""
    state = {k[len(prefix) :].replace("/", "."): v for k, v in arrays.items() if k.startswith(prefix)}
    missing = field.load_state_dict(state, strict=False).missing_keys
    assert not [k for k in missing if k in dict(field.named_parameters())], missing


def golden_field(name: str, arrays: dict, config: FieldConfig | None = None):
    """The field whose parameters are `param/...` of the arrays."""
    grid = tuple(arrays.get("grid_size", torch.tensor([21, 25, 17])).tolist())
    field = build_field(config or golden_config(name), arrays["aabb"], grid)
    load_parameters(field, arrays, "param/")
    return field


def golden_rays(arrays: dict) -> Rays:
    return Rays(arrays["rays"][:, :3], arrays["rays"][:, 3:])


def random_field(seed: int, model_name="TensorVMSplit", ndc=False, masked=True, grid=(19, 23, 15), shading="MLP_Fea"):
    """A field with interesting densities in an off-centre box, and a random mask if `masked`."""
    generator = torch.Generator().manual_seed(seed)
    vm = model_name == "TensorVMSplit"
    config = FieldConfig(
        model_name=model_name,
        n_density=(3, 2, 4) if vm else (5,),
        n_appearance=(4, 5, 3) if vm else (6,),
        shading=shading,
        n_features=3 if shading == "RGB" else 27,
        pos_pe=2,
        hidden=16,
        density_shift=-4.0,
        near=0.0 if ndc else 0.3,
        far=1.0 if ndc else 6.0,
        ndc=ndc,
    )
    aabb = torch.tensor([[-1.5, -1.2, -1.0], [1.3, 1.6, 0.9]])
    field = build_field(config, aabb, grid, seed)
    with torch.no_grad():
        for factor in [f for kind in (field.density_factors(), field.appearance_factors()) for fs in kind for f in fs]:
            factor.copy_(torch.randn(factor.shape, generator=generator) * 1.2)
    if masked:
        volume = torch.rand(11, 13, 9, generator=generator) < 0.15
        field.alpha_mask = AlphaMask(volume, aabb)
    return field


def random_rays(seed: int, n: int, ndc=False) -> Rays:
    """Rays from all round, some starting inside the box, some missing it, one along an axis."""
    generator = torch.Generator().manual_seed(seed)
    if ndc:
        origins = torch.rand(n, 3, generator=generator) * 2.4 - 1.2
        origins[:, 2] = -1.0
        directions = torch.randn(n, 3, generator=generator) * 0.3
        directions[:, 2] = 2.0
        return Rays(origins, directions)
    origins = torch.randn(n, 3, generator=generator)
    origins = origins / origins.norm(dim=-1, keepdim=True) * (torch.rand(n, 1, generator=generator) * 4.0 + 0.2)
    targets = torch.randn(n, 3, generator=generator) * 0.9
    directions = targets - origins
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins[0], directions[0] = torch.tensor([0.1, 0.2, -4.0]), torch.tensor([0.0, 0.0, 1.0])
    directions[1] = -directions[1]
    return Rays(origins, directions)


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device: numbers read back, and shapes that depend on data."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_copy")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        to_host = name != "_to_copy" or (kwargs or {}).get("device") == torch.device("cpu")
        self.count += any(name.startswith(wait) for wait in self.names) and to_host
        # Indexing by a mask looks for its true entries; a repetition by counts asks for their sum, unless it is told.
        indices = args[1] if name.lstrip("_").startswith(("index", "unsafe_index")) and len(args) > 1 else ()
        by_mask = isinstance(indices, list | tuple) and any(x is not None and x.dtype == torch.bool for x in indices)
        self.count += by_mask
        told = (kwargs or {}).get("output_size") is not None
        self.count += name.startswith("repeat_interleave") and isinstance(args[0], torch.Tensor) and not told
        return function(*args, **(kwargs or {}))


def counted_in_mask(rendering, field, rays, mask=None):
    """How many of each ray's samples lie in the mask, of up to 90 that begin before the field's box and go on behind
    it, and of rays that are NaN or have none."""
    device = rays.origins.device
    t_enter = torch.linspace(-0.5, 5.0, len(rays), device=device)
    n_candidates = torch.arange(len(rays), device=device) % 91
    origins = rays.origins.clone()
    origins[1::50] = torch.nan
    return rendering.count_in_mask(
        Rays(origins, rays.directions), t_enter, n_candidates, field.step, mask or field.alpha_mask
    )
