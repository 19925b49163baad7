"""The Hydra effect, measured: ablate a layer of a language model and see which later layers repair it."""

import importlib
import sys
import types
import typing

from hydra_jax.version import __version__

if typing.TYPE_CHECKING:
    from hydra_jax.analysis.stats import summary
    from hydra_jax.api.looks import contributions, trace
    from hydra_jax.api.programs import intervene, program
    from hydra_jax.api.sweeps import ablate, cascade, interactions, sweep
    from hydra_jax.core.programs import Program
    from hydra_jax.errors import UserError
    from hydra_jax.report import plots as plot
    from hydra_jax.report import report
    from hydra_jax.store.datasets import concat, save
    from hydra_jax.store.effects import open_effects
    from hydra_jax.text.prompts import Prompt, builtin
    from hydra_jax.text.prompts import read as read_prompts
    from hydra_jax.weights.load import load
    from hydra_jax.weights.model import Model

__all__ = [
    "Model",
    "Program",
    "Prompt",
    "UserError",
    "__version__",
    "ablate",
    "builtin",
    "cascade",
    "concat",
    "contributions",
    "interactions",
    "intervene",
    "load",
    "open_effects",
    "plot",
    "program",
    "read_prompts",
    "report",
    "save",
    "summary",
    "sweep",
    "trace",
]

_HOMES = {
    "Model": ("hydra_jax.weights.model", "Model"),
    "Program": ("hydra_jax.core.programs", "Program"),
    "Prompt": ("hydra_jax.text.prompts", "Prompt"),
    "UserError": ("hydra_jax.errors", "UserError"),
    "ablate": ("hydra_jax.api.sweeps", "ablate"),
    "builtin": ("hydra_jax.text.prompts", "builtin"),
    "cascade": ("hydra_jax.api.sweeps", "cascade"),
    "concat": ("hydra_jax.store.datasets", "concat"),
    "contributions": ("hydra_jax.api.looks", "contributions"),
    "interactions": ("hydra_jax.api.sweeps", "interactions"),
    "intervene": ("hydra_jax.api.programs", "intervene"),
    "load": ("hydra_jax.weights.load", "load"),
    "open_effects": ("hydra_jax.store.effects", "open_effects"),
    "plot": ("hydra_jax.report.plots", ""),
    "program": ("hydra_jax.api.programs", "program"),
    "read_prompts": ("hydra_jax.text.prompts", "read"),
    "report": ("hydra_jax.report", "report"),
    "save": ("hydra_jax.store.datasets", "save"),
    "summary": ("hydra_jax.analysis.stats", "summary"),
    "sweep": ("hydra_jax.api.sweeps", "sweep"),
    "trace": ("hydra_jax.api.looks", "trace"),
}
"""The home of each public name: its module, and its name there, "" for the module itself.

They are imported on first use: JAX and xarray take a second, for which a command's --help need not wait.
"""


class _Package(types.ModuleType):
    """This package, in which a public name is never a module.

    Whoever imports `hydra_jax.sweep.run`, wherever that is, has the import system set the attribute `sweep` of this
    package to the folder `hydra_jax/sweep`. Then `hydra_jax.sweep` would be the function or the folder, depending
    on which was imported last. So that attribute is not set; `from hydra_jax.sweep import ...` works all the same.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _HOMES[name]
    home = importlib.import_module(module)
    value = getattr(home, inner) if inner else home
    globals()[name] = value  # so that this is called once a name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
