"""Meshes of eight CPU devices, in a process of its own: pytest's has four."""


import pytest

from tests import builders, commands
from tests.commands import finish

MESHES = {"one device": (1, 1, 1), "data 8": (8, 8, 1), "data 4, model 2": (8, 4, 2), "model 8": (8, 1, 8)}
PROMPTS = 22


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    builders.gguf_file(directory / "tiny.gguf")
    records = [{"id": f"p{i}", "prompt": f"the {i} of {'x' * (i % 9)} in"} for i in range(PROMPTS)]
    builders.json_lines(directory / "prompts.jsonl", records)
    return directory


def start(inputs, workdir, *arguments, devices=8, **variables):
    """A sweep of the tiny model; every compiled program is kept for the next."""
    settings = [
        f"--config.model={inputs}/tiny.gguf",
        f"--config.prompts.path={inputs}/prompts.jsonl",
        "--config.prompts.correct_only=False",
        "--config.ablation.replacements=3",
        "--config.bootstrap=5",
        f"--workdir={workdir}",
    ]
    kept = commands.kept(inputs / "compiled")
    return commands.start("launch.sweep", *settings, *arguments, devices=devices, **kept, **variables)


def sweep(*arguments, **options):
    done = finish(start(*arguments, **options))
    assert done.returncode == 0, done.err
    return done
