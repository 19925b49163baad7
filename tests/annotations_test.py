"""The annotations of models/, core/ and engine/ are checked in every test: here, that the check bites."""

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from hydra_jax.core.prefill import prefill
from hydra_jax.core.replay import replay
from hydra_jax.engine import mesh
from hydra_jax.engine.walk import clean_program, embed_program
from hydra_jax.models import pieces
from hydra_jax.models.layers import Linear
from hydra_jax.models.transformer import forward, unembed
from tests.helpers import annotations
from tests.helpers import models as toy_models

ROOT = Path(__file__).parent.parent
FILES = [path for name in annotations.MODULES for path in sorted((ROOT / name.replace(".", "/")).glob("*.py"))]


def last_run():
    tokens = toy_models.tokens(5)
    return prefill(toy_models.params(), tokens, jnp.int32(len(tokens)))


WRONG = {
    "models: rank": lambda: forward(toy_models.params(), toy_models.tokens(5)[None]),
    "models: type": lambda: unembed(toy_models.params(), jnp.zeros(toy_models.config().width, int)),
    "models: a method": lambda: Linear(toy_models.config(), 3).init(jax.random.key(0), jnp.zeros(4, int)),
    "models: under jit": lambda: jax.jit(forward)(toy_models.params(), toy_models.tokens(5)[None]),
    "core: rank": lambda: replay(toy_models.params(), last_run(), (jnp.int32(0), jnp.int32(0)), jnp.zeros((1, 24))),
    "core: a record's method": lambda: last_run().lens(jnp.zeros((2, 24))),
    "core: not a record": lambda: replay(toy_models.params(), None, (jnp.int32(0), jnp.int32(0)), jnp.zeros(24)),
    "engine: rank": lambda: embed_program(toy_models.params())(toy_models.params(), jnp.zeros(5, int)),
    "engine: axes that differ": lambda: clean_program(toy_models.params())(
        pieces.layer_of(toy_models.params(), 0), jnp.zeros((2, 5, 24)), jnp.zeros((3, 1), int)
    ),
    "engine: not an array": lambda: mesh.put(mesh.mesh_of(toy_models.params()), [1, 2], mesh.Spec()),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_or_type_is_refused(call):
    with pytest.raises(TypeCheckError, match=r"hydra_jax\.(models|core|engine)\."):
        call()


def test_records_hold_whatever_jax_puts_in_them():
    clean = jax.eval_shape(last_run)
    assert isinstance(clean.readout, jax.ShapeDtypeStruct)
    assert jax.tree.map(lambda leaf: leaf.ndim, clean).readout == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_function_says_its_shapes(path):
    """No bare arrays; and every annotation can be resolved, without which it would go unchecked in silence."""
    signatures = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    for node in signatures:
        hints = [node.returns, *(argument.annotation for argument in [*node.args.args, *node.args.kwonlyargs])]
        assert not any("jax.Array" in ast.unparse(hint) for hint in hints if hint), node.name
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    members = [module, *(value for _, value in inspect.getmembers(module, inspect.isclass))]
    for member in members:
        for _, value in inspect.getmembers(
            member, lambda value: inspect.isfunction(value) or isinstance(value, property)
        ):
            function = value.fget if isinstance(value, property) else value
            if function.__module__ == module.__name__ and function.__name__ != "__init__":
                # config.py imports jax where it is used alone: its annotation by a name of jax holds no array.
                typing.get_type_hints(inspect.unwrap(function), localns={"jax": jax})


def test_commands_are_not_checked():
    """What users run imports no checker, and no hook; only shapes as annotations."""

    def said(program, *arguments):
        command = [sys.executable, "-m", f"tests.programs.{program}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()

    assert said("loaded", "hydra_jax.engine.walk", "beartype") == []
    assert said("unchecked") == ["False"]
