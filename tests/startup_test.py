"""What is imported when: the package gives its names at once, and --help of every command waits for nothing."""

import ast
import re
import subprocess
import sys

import pytest
from ml_collections import config_dict

import hydra_jax
from configs import benchmark, sweep, train
from hydra_jax import usage
from tests.helpers import commands
from tests.helpers.commands import ROOT
from tests.helpers.speed import few

HEAVY = {
    *("jax", "flax", "numpy", "pandas", "xarray", "zarr", "matplotlib", "plotly", "scipy"),
    *("gguf", "safetensors", "tokenizers", "huggingface_hub", "optax", "orbax", "grain"),
}
LOADS = {"jax", "flax", "numpy", "scipy", "safetensors", "tokenizers"}
"""What loading a model imports, of those; and of files' formats that of the file."""

CONFIGS = {"sweep": sweep, "train": train, "benchmark": benchmark}
COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py"))


def imported(*arguments):
    """Which of the heavy packages a Python process imports, and what it says."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(re.findall(r"\|\s+([a-z_]+)$", done.stderr, re.MULTILINE))
    return names & HEAVY, done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert imported("-c", "import hydra_jax; dir(hydra_jax)")[0] == set()


def test_loading_imports_what_it_needs():
    assert imported("-c", "import hydra_jax; hydra_jax.load, hydra_jax.Model")[0] <= LOADS


ORDERS = [
    ["import hydra_jax", "import hydra_jax.sweep.run", "import hydra_jax.api"],
    ["import hydra_jax.sweep", "from hydra_jax import sweep"],
    ["import hydra_jax.sweep.run", "import hydra_jax.sweep"],
    ["from hydra_jax.sweep.run import run", "import hydra_jax as hj; hj.sweep.__call__"],
    ["from hydra_jax import sweep", "import hydra_jax.sweep.plan"],
    ["from hydra_jax import *", "import hydra_jax.sweep.run"],
]


@pytest.mark.parametrize("statements", few(ORDERS, ORDERS[0]), ids=lambda statements: statements[0])
def test_public_names_are_never_modules_whatever_is_imported_first(statements):
    command = [sys.executable, "-m", "tests.programs.public_names", *statements]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_types_editors_and_the_package_know_the_same_names():
    tree = ast.parse((ROOT / "hydra_jax" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes["plot"] = ("hydra_jax.report.plots", "")  # a module
    assert homes == hydra_jax._HOMES
    assert {*homes, "__version__"} == set(hydra_jax.__all__) <= set(dir(hydra_jax))


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hydra_jax.nonsense
    assert not hasattr(hydra_jax, "__wrapped__")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_at_once_and_is_a_success(command):
    names, said = imported("-m", f"launch.{command}", "--help")
    assert names <= {"numpy"}  # of ml_collections
    assert "flags:" in said
    config = CONFIGS[command].get_config() if command in CONFIGS else config_dict.ConfigDict()
    shown = re.findall(r"^  --config\.([\w.]+)=(.*)$", said, re.MULTILINE)
    expected = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in usage.flat(config)
    }
    assert dict(shown) == expected
    assert len(shown) == len(expected)


@pytest.mark.parametrize("arguments", [["--helpshort"], ["--helpfull"], ["-?"], ["--help", "--nonsense=3"]], ids=str)
def test_other_ways_to_ask_for_help_are_a_success(arguments):
    done = commands.finish(commands.start("launch.inspect", *arguments))
    assert done.returncode == 0, done.err
    assert "--model" in done.out


def test_help_shows_settings_as_the_other_arguments_make_them():
    done = commands.finish(
        commands.start("launch.train", "--help", f"--config={ROOT}/configs/train.py:dropout,small", "--config.seed=7")
    )
    assert done.returncode == 0, done.err
    assert "\n  --config.seed=7\n" in done.out
    assert "\n  --config.model.width=512\n" in done.out
    assert "\n  --config.dropout.attn=0.1\n" in done.out


def test_help_of_a_config_file_that_is_not_there_is_one_line():
    done = commands.finish(commands.start("launch.sweep", "--help", "--config=missing.py"))
    assert done.returncode == 1
    (line,) = done.err.splitlines()
    assert "missing.py" in line


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_has_a_meaning_of_its_own(name):
    said = usage.meanings((ROOT / "configs" / f"{name}.py").read_text())
    assert set(said) == {setting for setting, _ in usage.flat(CONFIGS[name].get_config())}
    assert all(said.values())


def test_meanings_are_read_from_a_config_files_comments():
    code = """
config = config_dict.create(
    a=1,  # first: "one"
    b=dict(c=2, d=3),  # of none by itself
    e=dict(
        f="# not this",  # but this
        g=4,
    ) | OTHERS,
    h=5,
)
"""
    assert usage.meanings(code) == {"a": 'first: "one"', "b.c": "of none by itself", "b.d": "of none by itself"} | {
        "e.f": "but this"
    }
