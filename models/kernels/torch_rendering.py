"""Marching, weights and compositing in plain torch, the definition that every other backend must equal."""

from components.compositing import composite, ray_weights
from components.marching import count_in_mask, march_box, march_ndc

__all__ = ["composite", "count_in_mask", "march_box", "march_ndc", "ray_weights"]
