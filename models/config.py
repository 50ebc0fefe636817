"""What a field is made of, as plain values that a checkpoint can hold."""

from dataclasses import asdict, dataclass


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
        """The inverse of `to_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
