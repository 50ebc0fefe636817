"""What a field is made of, as plain values that a checkpoint can hold."""

from dataclasses import asdict, dataclass

CHOICES = {
    "model_name": ("TensorVMSplit", "TensorCP"),
    "shading": ("MLP_Fea", "MLP", "MLP_PE", "SH", "RGB"),
    "density_activation": ("softplus", "relu"),
    "mlp_dtype": ("float32", "bfloat16"),
}
# The last two keep what is computed from them within float32.
MAX_COUNT, MAX_FREQUENCIES, MAX_DISTANCE, MAX_NUMBER = 100_000, 32, 1e9, 1e30


@dataclass(frozen=True)
class FieldConfig:
    """model_name: TensorVMSplit or TensorCP. n_density, n_appearance: components, one number a mode (VM) or one (CP).

    n_features: data_dim_color, inputs of the shading. *_pe: numbers of frequencies. hidden: featureC.
    density_activation: softplus or relu, of feature + density_shift (softplus only). distance_scale: factor on the
    distances in alpha. step_ratio: step in units of the mean grid spacing. weight_threshold: least weight that gets
    a colour (rm_weight_mask_thre). alpha_threshold: least alpha of the mask. near, far: ray parameter. ndc: as Scene.
    mlp_dtype: of the colour network's matrix products, float32 or bfloat16.
    """

    model_name: str
    n_density: tuple[int, ...]
    n_appearance: tuple[int, ...]
    n_features: int = 27
    shading: str = "MLP_Fea"
    pos_pe: int = 6
    view_pe: int = 2
    fea_pe: int = 2
    hidden: int = 128
    density_activation: str = "softplus"
    density_shift: float = -10.0
    distance_scale: float = 25.0
    step_ratio: float = 0.5
    weight_threshold: float = 1e-4
    alpha_threshold: float = 1e-4
    near: float = 2.0
    far: float = 6.0
    ndc: bool = False
    mlp_dtype: str = "float32"

    def to_dict(self) -> dict:
        """Plain values; tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "FieldConfig":
        """The inverse of `to_dict`. Raises TypeError or ValueError for what `check` refuses."""
        config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError for values of another type or size than a field can have; files may hold anything."""
        vm = self.model_name == "TensorVMSplit"
        for name in ("n_density", "n_appearance"):
            counts = getattr(self, name)
            # TensorCP's files may repeat their one number for every mode.
            sizes = (3,) if vm else (1, 3)
            _require(name, isinstance(counts, tuple) and len(counts) in sizes and all(_whole(n, 1) for n in counts))
        for name in ("n_features", "hidden"):
            _require(name, _whole(getattr(self, name), 1))
        for name in ("pos_pe", "view_pe", "fea_pe"):
            _require(name, _whole(getattr(self, name), 0) and getattr(self, name) <= MAX_FREQUENCIES)
        for name in ("density_shift", "distance_scale", "weight_threshold", "alpha_threshold", "near", "far"):
            _require(name, _number(getattr(self, name)))
        _require("step_ratio", _number(self.step_ratio) and 1e-3 <= self.step_ratio <= 1e3)
        _require("near, far", 0 <= self.near < self.far <= MAX_DISTANCE)
        _require("ndc", isinstance(self.ndc, bool))
        for name in ("model_name", "shading", "density_activation", "mlp_dtype"):
            _require(name, getattr(self, name) in CHOICES[name])


def _require(name: str, good: bool) -> None:
    if not good:
        raise ValueError(f"{name} is none that a field can have")


def _whole(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MAX_COUNT


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
