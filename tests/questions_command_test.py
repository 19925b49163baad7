"""Commands that ask for sets, freezes, pairs, cascades, foils, metrics, every token, or counterfactuals."""

import concurrent.futures
import time

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.special

import hydra_jax as hj
from hydra_jax.models.transformer import forward
from hydra_jax.store import effects as store
from hydra_jax.text import prompts
from hydra_jax.text.tokenizer import answer_tokens, encode, spelled
from tests.helpers import sweeps
from tests.helpers.commands import finish

pytestmark = pytest.mark.slow

PROMPTS, LIMIT = 12, 8
A_CHUNK_A_PROMPT = f"--config.rows={sweeps.REPLACEMENTS}"
ASKED = {
    "sets": [
        "--config.ablation.components=attn 0, mlp 0 + attn 1.2, layer 1",
        "--config.readout.target= in",
        "--config.readout.foil= the",
        "--config.readout.metrics=log_probability, kl, rank, top_changed",
        "--config.readout.responders=heads",
    ],
    "pairs": [
        "--config.ablation.components=attn 0, mlp 0, attn 1.2",
        "--config.ablation.freeze=mlp 1, norm",
        "--config.ablation.interactions=True",
        "--config.ablation.cascade=2",
        "--config.readout.metrics=top_changed",
    ],
    "everywhere": [
        "--config.ablation.components=attn 0, mlp 1",
        "--config.prompts.positions=all",
        f"--config.prompts.limit={2 * LIMIT}",
    ],
    "counterfactuals": [
        "--config.prompts.path=builtin:ioi",
        f"--config.prompts.limit={LIMIT}",
        "--config.ablation.paired=True",
        "--config.ablation.components=attn 0, attn 1, layer 1",
        "--config.readout.metrics=kl",
        "--config.rows=1",
    ],
}
CHANGED = {
    "sets": {"ablation.components": "attn 0", "readout.foil": "he", "readout.metrics": "", "ablation.match": "length"},
    "pairs": {"ablation.freeze": "mlp 1", "ablation.cascade": "3", "ablation.interactions": "False"},
    "everywhere": {"prompts.positions": "last"},
    "counterfactuals": {"ablation.paired": "False", "readout.responders": "heads"},
}
VARIABLES = {
    "sets": {"log_probability_drop", "kl", "top_changed", "head_compensation"},
    "pairs": {"free_total_effect", "cut_component", "cut_logit", "cut_compensation", "top_changed"},
    "everywhere": set(),
    "counterfactuals": {"kl"},
}
REFUSED = {
    "a set": (
        ["--config.ablation.components=attn 0 + attn 0.1"],
        "config.ablation.components: attn 0.1 is named twice",
    ),
    "both": (
        ["--config.ablation.components=attn 0", "--config.ablation.freeze=attn 0"],
        "config.ablation.freeze: attn",
    ),
    "no foil": (["--config.readout.foil=foil"], "has no foil of its own"),
    "a token": (["--config.readout.foil=Paris"], "foil: 'Paris' is 5 tokens of"),
    "a part": (["--config.prompts.positions=cat"], "position 'cat' is not in its text"),
    "a metric": (
        ["--config.readout.metrics=ranks"],
        "config.readout.metrics: 'ranks' is unknown; did you mean 'rank'?",
    ),
    "unpaired": (["--config.ablation.paired=True"], "has no source"),
    "cuts": (["--config.ablation.cascade=-1"], "config.ablation.cascade: is -1; give 0 or more"),
    "a set of prompts": (["--config.prompts.path=builtin:iou"], "did you mean ioi?"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return sweeps.inputs(tmp_path_factory.mktemp("inputs"), PROMPTS)


def interrupted(inputs, workdir, arguments):
    """A sweep killed after its first chunk, and the same command again; how many chunks there were in between."""
    (running,) = sweeps.start(inputs, workdir, A_CHUNK_A_PROMPT, *arguments)
    while not sweeps.written(workdir) and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    finish(running)
    chunks = sweeps.written(workdir)
    sweeps.done(inputs, workdir, A_CHUNK_A_PROMPT, *arguments)
    assert chunks.items() <= sweeps.written(workdir).items()
    return len(chunks)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Every run, two at a time: a process spends most of its life importing."""
    directory = tmp_path_factory.mktemp("runs")
    few = ["--report", "--config.bootstrap=20"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = {}
        for case, asked in ASKED.items():
            whole, killed = directory / case, directory / f"{case} killed"
            made[case] = pool.submit(sweeps.done, inputs, whole, A_CHUNK_A_PROMPT, *asked, *few)
            made[f"{case} killed"] = pool.submit(interrupted, inputs, killed, asked)
        yield directory, {name: future.result for name, future in made.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def finished(runs, request):
    """The directory of a finished sweep of the test's `case`."""
    case = request.getfixturevalue("case")
    runs[1][case]()
    return runs[0] / case


each_case = pytest.mark.parametrize("case", ASKED)


@each_case
def test_a_command_stores_what_is_asked_for_and_writes_a_page(finished, case):
    effects = store.open_effects(finished)
    assert effects["finished"].values.all()
    assert effects.variables.keys() >= VARIABLES[case]
    names = ["attn 0", "mlp 0 + attn 1.2", "layer 1"]
    pairs = ["attn 0", "mlp 0", "attn 1.2", "layer 0", "attn 0 + attn 1.2", "mlp 0 + attn 1.2"]
    expected = {"sets": names, "pairs": pairs, "everywhere": ["attn 0", "mlp 1"]}
    assert list(effects["ablated_name"].values) == expected.get(case, ["attn 0", "attn 1", "layer 1"])
    page = (finished / "report.html").read_text("utf-8")
    assert "attn 0" in page
    assert len(list(finished.glob("*.png"))) == len(list(finished.glob("*.pdf"))) > 0
    if case == "sets":
        assert set(effects["target_text"].values) == {" in"}
        assert set(effects["foil_text"].values) == {" the"}
    if case == "everywhere":
        assert len(set(effects["text_id"].values)) < effects.sizes["prompt"] == 2 * LIMIT
        assert (effects["position"].values == effects["length"].values - 1).all()
    if case == "counterfactuals":
        known = {prompt.id: prompt for prompt in prompts.builtin("ioi")}
        assert effects.sizes["prompt"] == LIMIT
        for name, source in zip(effects["prompt_id"].values, effects["source_text"].values, strict=True):
            assert source == known[name].source


@each_case
def test_a_killed_command_goes_on_to_the_same_store_bit_for_bit(runs, finished, case):
    assert 0 < runs[1][f"{case} killed"]() < PROMPTS
    killed = runs[0] / f"{case} killed"
    for read in (store.open_effects, store.open_examples):
        found, expected = read(killed), read(finished)
        assert found.variables.keys() == expected.variables.keys()
        assert found.attrs == expected.attrs
        for name in expected.variables:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert (killed / "prompts.csv").read_bytes() == (finished / "prompts.csv").read_bytes()


@pytest.mark.parametrize("case", ["sets", "counterfactuals"])
def test_a_command_is_what_python_is_asked(inputs, finished, case):
    """The same numbers, where prompts are the same."""
    effects = store.open_effects(finished).load()
    model = hj.load(str(inputs / "tiny.gguf"))
    known = {prompt.id: prompt for prompt in (*prompts.builtin("ioi"), *prompts.read(str(inputs / "prompts.jsonl")))}
    given = [known[name] for name in effects["prompt_id"].values]
    asked = {
        "sets": dict(
            components=["attn 0", ["mlp 0", "attn 1.2"], "layer 1"],
            target=" in",
            foil=" the",
            metrics=["log_probability", "kl", "top_changed"],
            responders="heads",
            replacements=sweeps.REPLACEMENTS,
        ),
        "counterfactuals": dict(components=["attn 0", "attn 1", "layer 1"], paired=True, metrics="kl"),
    }
    found = hj.sweep(model, given, **asked[case])
    for name in found.data_vars:
        np.testing.assert_allclose(found[name], effects[name], atol=1e-5, err_msg=name)


@each_case
def test_another_question_in_its_directory_is_refused_by_its_name(inputs, finished, case):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for name, value in CHANGED[case].items():
        arguments = [A_CHUNK_A_PROMPT, *ASKED[case], f"--config.{name}={value}"]
        process = finish(sweeps.start(inputs, finished, *arguments)[0])
        assert process.returncode == 1
        assert "Traceback" not in process.err
        assert f"{finished}: " in process.err
        assert f"{name} was " in process.err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_that_cannot_be_is_refused_in_a_line(inputs, tmp_path, case):
    arguments, words = REFUSED[case]
    process = finish(sweeps.start(inputs, tmp_path / "new", *arguments)[0])
    assert process.returncode == 1
    (line,) = [line for line in process.err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in process.err
    assert not (tmp_path / "new").exists()


def test_examples_with_ranks_are_read(inputs, tmp_path):
    """As every command that ends with a page does."""
    model = hj.load(str(inputs / "tiny.gguf"))
    texts = ["the", "of the", "in the of"]
    hj.sweep(model, texts, replacements=2, metrics="rank", components="mlp 1", workdir=tmp_path)
    assert "target_rank" in store.open_examples(tmp_path)


@pytest.mark.parametrize("case", ["counterfactuals", "sets"])
def test_the_table_of_prompts_tells_probabilities_of_the_tokens_beside_them(inputs, finished, case):
    model = hj.load(str(inputs / "tiny.gguf"))
    table = pd.read_csv(finished / "prompts.csv", keep_default_na=False)
    assert len(table) >= LIMIT
    for row in table.head(4).to_dict("records"):
        tokens = encode(model.tokenizer, row["text"])
        logits = forward(model.params, jnp.array(tokens, jnp.int32))[0][-1]
        probabilities = scipy.special.softmax(np.asarray(logits, np.float64))
        top = int(probabilities.argmax())
        assert row["top_token"] == model.tokenizer.decode([top])
        assert row["probability"] == pytest.approx(probabilities[top], rel=1e-4)
        if case == "sets":
            assert row["answer_token"] == ""
            assert row["answer_probability"] in ("", 0)
            continue
        answer = spelled(answer_tokens(model.tokenizer, row["text"], row["answer"]), top)
        assert row["answer_token"] == model.tokenizer.decode([answer])
        assert float(row["answer_probability"]) == pytest.approx(probabilities[answer], rel=1e-4)
        assert row["correct"] == (top == answer)
