"""The Python interface: questions about a model's components, asked in a line, answered in arrays with names."""

from hydra_jax.api.looks import contributions, trace
from hydra_jax.api.programs import intervene, program
from hydra_jax.api.sweeps import ablate, cascade, interactions, sweep

__all__ = ["ablate", "cascade", "contributions", "interactions", "intervene", "program", "sweep", "trace"]
