"""Print whether a checker of annotations wraps a function of the engine."""

from hydra_jax.engine import batched

print(hasattr(batched._values, "__wrapped__"))
