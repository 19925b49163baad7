"""Run statements that import parts of the package, one an argument, and check its public names after each."""

import sys
import types

for statement in sys.argv[1:]:
    exec(statement, {})
    package = sys.modules["hydra_jax"]
    for name in set(package.__all__) - {"plot"}:
        assert not isinstance(getattr(package, name), types.ModuleType), (statement, name)
    assert package.sweep is sys.modules["hydra_jax.api"].sweep, statement
    names = {}
    exec("from hydra_jax import *", names)
    assert {name: getattr(package, name) for name in package.__all__}.items() <= names.items(), statement
    exec("from hydra_jax import sweep\nassert callable(sweep)", {})
    # The folder is there as well.
    exec("from hydra_jax.sweep import run\nassert run.__name__ == 'hydra_jax.sweep.run'", {})
