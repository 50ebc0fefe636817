"""How large a field is, without building it: what a checkpoint or options ask for is weighed before it is allocated."""

from models.config import FieldConfig
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

# In training: the parameter, its gradient and Adam's two moments, float32 each. In a checkpoint: all but the gradient.
TRAINING_BYTES, CHECKPOINT_BYTES = 16, 12


def n_parameters(config: FieldConfig, grid: tuple[int, int, int]) -> int:
    """Numbers in all parameters of the field that `build_field` makes of config at `grid` (x, y, z) points."""
    counts = (config.n_density, config.n_appearance)
    if config.model_name == "TensorVMSplit":
        points = [grid[u] * grid[v] + grid[w] for (u, v), w in zip(PLANE_AXES, LINE_AXES, strict=True)]
        factors = sum(n * p for numbers in counts for n, p in zip(numbers, points, strict=True))
        products = sum(config.n_appearance)
    else:
        factors = sum(numbers[0] for numbers in counts) * sum(grid)
        products = config.n_appearance[0]
    return factors + products * config.n_features + _n_shading(config)


def _n_shading(config: FieldConfig) -> int:
    f, h, view = config.n_features, config.hidden, 3 * (1 + 2 * config.view_pe)
    inputs = {
        "MLP_Fea": f * (1 + 2 * config.fea_pe) + view,
        "MLP": f + view,
        "MLP_PE": f + view + 3 * (1 + 2 * config.pos_pe),
    }.get(config.shading)
    return 0 if inputs is None else (inputs + 1) * h + (h + 1) * h + (h + 1) * 3
