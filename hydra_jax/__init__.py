"""The Hydra effect, measured: ablate a layer of a language model and see which later layers repair it."""

from hydra_jax.analysis.stats import summary
from hydra_jax.api import ablate, sweep
from hydra_jax.errors import UserError
from hydra_jax.store.effects import open_effects
from hydra_jax.text.prompts import Prompt, builtin
from hydra_jax.text.prompts import read as read_prompts
from hydra_jax.version import __version__
from hydra_jax.weights.load import Model, load

__all__ = [
    "Model",
    "Prompt",
    "UserError",
    "__version__",
    "ablate",
    "builtin",
    "load",
    "open_effects",
    "read_prompts",
    "summary",
    "sweep",
]
