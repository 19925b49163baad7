import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hydra_jax.models.shapes import SHAPES
from hydra_jax.models.transformer import forward
from hydra_jax.sweep.cost import cost, describe, parameters
from hydra_jax.weights import source
from hydra_jax.weights.load import load
from tests.helpers import checkpoints
from tests.helpers import models as toy_models
from tests.helpers.speed import few


@pytest.mark.parametrize("block", toy_models.BLOCKS)
def test_parameters_are_counted_and_no_more_made(block):
    params = toy_models.block(block)
    assert parameters(params.config) == sum(leaf.size for leaf in jax.tree.leaves(params.weights))


def test_published_sizes_are_the_published_ones():
    found = {name: round(parameters(shape) / 1e6) for name, shape in SHAPES.items()}
    assert found["random-1b"] == 1236  # Llama 3.2 1B
    assert found["pythia-160m"] == 162
    assert found["qwen2.5-0.5b"] == 494
    assert found["qwen3-0.6b"] == 596
    assert found["gemma2-2b"] == 2614
    assert found["gemma3-270m"] == 268
    assert found["olmo2-1b"] == 1485
    assert found["opt-125m"] == 125
    assert found["gpt2"] == 124
    assert found["tinyllama-1.1b"] == 1100
    assert found["gemma-2b"] == 2506
    assert found["mistral-7b"] == 7242
    assert found["phi3-mini"] == 3821


def test_the_cost_of_a_sweep_is_counted():
    params = toy_models.params()
    of = cost(params.config, prompts=3, length=8, draws=5)
    assert of.weight_bytes == 4 * parameters(params.config)
    assert of.ablations == 3 * 5 * 8
    assert of.prompts_at_once == 3
    in_layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights["layers"]))
    assert of.streamed_bytes == of.weight_bytes - in_layers + 2 * in_layers // 4
    twice = cost(params.config, prompts=3, length=8, draws=5, edges=True)
    assert twice.ablation_operations == 2 * of.ablation_operations
    rows = (of.work_bytes - of.least_work_bytes) / (3 * 5 * (8 - 1))
    assert rows > 4 * params.config.width  # of each a shift, and what is recorded
    assert twice.work_bytes - of.work_bytes == pytest.approx(3 * 5 * 8 * rows)
    assert twice.least_work_bytes - of.least_work_bytes == pytest.approx(3 * 5 * rows)


def test_arithmetic_of_a_clean_run_is_about_what_xla_counts():
    shape = toy_models.config(layers=1, width=64, mlp_width=256, head_dim=16)  # a scan counts its body once
    params = toy_models.params(layers=1, width=64, mlp_width=256, head_dim=16)
    of = cost(shape, prompts=1, length=16, draws=1)
    counted = jax.jit(forward).lower(params, toy_models.tokens(16)).compile().cost_analysis()["flops"]
    extra = 2 * 15 * shape.vocab_size * shape.width  # forward unembeds every position
    assert of.clean_operations / 2 + extra == pytest.approx(counted, rel=0.15)


def test_both_files_of_a_model_are_described_alike_without_their_weights(tmp_path):
    directory = checkpoints.hugging_face_directory(tmp_path / "tiny")
    file = checkpoints.gguf_file(tmp_path / "tiny.gguf")
    for path in (file, directory):
        opened = source.open(str(path))
        assert (opened.architecture, opened.config()) == ("llama", load(str(file)).config)
    (directory / "model.safetensors").unlink()
    opened = source.open(str(directory))
    architecture, config = opened.architecture, opened.config(dtype="bfloat16")
    text = describe(architecture, config, prompts=10, length=4, draws=2)
    assert "norm_eps 1.52588e-05, dtype bfloat16" in text
    assert f"{10 * 2 * 4:,} ablations" in text
    assert "sequential" in text
    assert re.search(r"^streamed    \S+ GB of weights \(what is not in a layer, and 2 layers at a time\)$", text, re.M)
    assert "parallel" in describe("gpt_neox", SHAPES["pythia-160m"], 10, 4, 2)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    few(
        [
            (["--model={model}"], 0, "parameters"),
            (["--model={model}", "--length=129"], 1, "at most 128"),
            (["--model={model}.not"], 1, "not found"),
            (["--model={model}", "--prompts=0"], 1, "prompts"),
        ],
        (["--model={model}"], 0, "parameters"),
    ),
)
def test_the_command(tmp_path, arguments, status, words):
    model = checkpoints.gguf_file(tmp_path / "tiny.gguf")
    command = [sys.executable, "-m", "launch.inspect", *(argument.format(model=model) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == status
    said = done.stderr if status else done.stdout
    assert words in said
    assert not status or len(said.splitlines()) == 1
