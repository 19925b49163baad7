"""Print whether a checker of annotations wraps a function of the engine."""

from hydra_jax.engine import blocks

print(hasattr(blocks.values, "__wrapped__"))
