import dataclasses
import json

import numpy as np
import pytest
import xarray as xr

import hydra_jax
from hydra_jax.config import AblationConfig, PromptsConfig, SweepConfig
from hydra_jax.core.edits import ATTN, MLP, Component, Kind
from hydra_jax.engine import mesh
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store.variables import EFFECTS
from hydra_jax.sweep import chunks, plan
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.clean import CleanPass, choose
from hydra_jax.sweep.items import by_length, itemise
from hydra_jax.sweep.run import run
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.prompts import Prompt
from hydra_jax.text.tokenizer import encode
from tests.helpers import checkpoints

ZERO = AblationConfig(kind="zero")
TEXTS = ["the", "in the of", "the the in of the", "a b c d e f", "of in", "the of the", "12345 in the", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hydra_jax.load(str(checkpoints.gguf_file(tmp_path_factory.mktemp("model") / "tiny.gguf")))


def by_id(effects: xr.Dataset) -> xr.Dataset:
    """In order of id, with the sources as ids too."""
    ids = effects["prompt_id"].values
    named = effects.assign(source=effects["source"].copy(data=np.append(ids, "")[effects["source"].values]))
    return named.isel(prompt=np.argsort(ids))


def assert_same(left: xr.Dataset, right: xr.Dataset):
    left, right = by_id(left), by_id(right)
    np.testing.assert_array_equal(left["source"], right["source"])
    np.testing.assert_array_equal(left["prompt_id"], right["prompt_id"])
    for name in (*EFFECTS, "compensation", "delta_unembed", "clean_logit", "final_scale"):
        np.testing.assert_allclose(left[name], right[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_order_and_chunking_change_nothing(model, kind):
    first = hydra_jax.sweep(model, TEXTS, kind=kind, replacements=3)
    second = hydra_jax.sweep(model, TEXTS[::-1], kind=kind, replacements=3, rows=6)
    assert_same(first, second)
    assert first["finished"].all()
    assert np.abs(first["total_effect"]).max() > 1e-3
    assert first.sizes["replacement"] == (3 if kind in ("resample", "noise") else 1)
    assert (first["source"] >= 0).all() == (kind == "resample")


def test_the_identity_holds_in_every_entry(model):
    effects = hydra_jax.sweep(model, TEXTS, replacements=3)
    repaired = sum(effects[f"{by}_compensation"] for by in ("attn", "mlp", "norm"))
    np.testing.assert_allclose(effects["total_effect"], effects["direct_effect"] - repaired, atol=1e-4)
    downstream = (effects["attn_compensation"] + effects["mlp_compensation"]).mean("replacement")
    np.testing.assert_allclose(effects["compensation"].sum("component"), downstream, atol=1e-5)


def clean_pass(model, ablation):
    wanted = plan.asked(SweepConfig(ablation=ablation), model.config, streamed=False)
    sizer = BatchSizer(model.config, mesh.mesh_of(model.params), wanted, 1e9)
    kept = plan.kept(ablation, model.config)
    return CleanPass(model, ablation.kind, kept, sizer, Bank(model.config.dtype), Cluster(0, 1))


def planned(model, items, ablation, tolerance=1e-4, non_finite=0.0):
    passed = clean_pass(model, ablation)
    with passed.bar(len(items)) as bar:
        passed.run(items, bar)
    tokens = np.array([(passed.bank.rows[item.key].top, -1) for item in items])
    config = SweepConfig(ablation=ablation, identity_tolerance=tolerance, non_finite=non_finite)
    return plan.Plan.build(model, passed.bank, passed.sizer, config, items, tokens)


def test_a_broken_identity_stops_the_sweep_and_names_the_prompt(model):
    items = sorted(itemise(model, [Prompt(text, text) for text in TEXTS]), key=by_length)
    exact = planned(model, items, AblationConfig(kind="zero"), tolerance=1e-12)
    with pytest.raises(UserError, match=r"prompt '.*', (attn|mlp) [01]: total effect") as raised:
        chunks.ablate_chunk(exact, slice(0, 8), Sources(exact), 8)
    assert "\n" not in str(raised.value)


def overflowing(model):
    """The model, but that what attention 1 writes is no number where the last token is "of"."""
    spoilt = model.tokenizer.token_to_id("of")
    weights = model.params.weights
    embedding = weights["embedding"].at[spoilt].mul(1e20)
    return dataclasses.replace(model, params=model.params.replace(weights=weights | {"embedding": embedding})), spoilt


def test_values_that_are_no_numbers_are_recorded_and_left_out(model, tmp_path, capsys):
    """One of the prompts overflows, and so do others where they take its writes."""
    broken, token = overflowing(model)
    spoilt = [text for text in TEXTS if token in encode(model.tokenizer, text)]
    assert 0 < len(spoilt) < len(TEXTS)
    items = sorted(itemise(broken, [Prompt(text, text) for text in TEXTS]), key=by_length)
    made = planned(broken, items, AblationConfig(replacements=2), non_finite=1.0)
    dataset = chunks.in_memory(made)

    def write(chunk, arrays):
        for name, array in arrays.items():
            dataset[name][chunk] = array

    chunks.fill(made, [slice(0, 8)], write, progress=True)
    lost = dataset["non_finite"]
    assert f"not finite, recorded and left out of averages: prompt {spoilt[0]!r}" in capsys.readouterr().err
    assert (lost.sel(prompt=dataset["prompt_id"].isin(spoilt)) > 0).any()
    assert (dataset["total_effect"].isnull().sum("replacement") == lost).all()
    assert not store.holes(dataset)
    part = dataset.where(lost < 2, drop=True)["compensation"]
    assert part.notnull().all()  # of the replacements that are finite
    dataset["finished"][:] = True
    kept = store.finite(dataset, "here")
    assert kept.sizes["prompt"] == 8 - kept.attrs["left_out"] < 8
    assert np.isfinite(kept["total_effect"]).all()
    with pytest.raises(UserError, match=r"interventions are no numbers, more than non_finite=0 allows"):
        chunks.fill(dataclasses.replace(made, non_finite=0.0), [slice(0, 8)], write, progress=False)


def test_values_on_the_devices_are_those_sent_to_them(model):
    items = sorted(itemise(model, [Prompt(text, text) for text in TEXTS]), key=by_length)
    made = planned(model, items, AblationConfig(replacements=2))
    there, sent = Sources(made, resident=True), Sources(made, resident=False)
    for component in (Component(0, ATTN), Component(1, MLP)):
        prompts = np.array([2, 5, 5])
        found = there(prompts, component)
        np.testing.assert_array_equal(found, sent(prompts, component))
        values = made.bank.values([made.pool_keys[index] for index in made.sources[5]])
        np.testing.assert_array_equal(found[1], values[:, made.places[component]])


def test_ablate_is_one_entry_of_a_sweep(model):
    effects = hydra_jax.sweep(model, TEXTS, kind="mean", sources=TEXTS)
    place = {"ablated": 2, "prompt": int(np.flatnonzero(effects["prompt_id"] == TEXTS[1])[0])}
    one = hydra_jax.ablate(model, TEXTS[1], "attn", 1, kind="mean", sources=TEXTS)
    swept = effects.isel(place)
    for name in EFFECTS:
        np.testing.assert_allclose(one[name], swept[name], atol=1e-5)
    np.testing.assert_allclose(one["compensation"][0], swept["compensation"], atol=1e-5)
    moved = one["ablated_unembed"] - one["delta_unembed"]
    np.testing.assert_allclose(moved.sel(component=3), one["compensation"].sel(component=3), atol=1e-5)
    np.testing.assert_allclose(moved.sel(component=2), -one["direct_effect"], atol=1e-5)
    assert list(one["layer"].values) == [0, 0, 1, 1]
    assert list(one["site"].values) == ["attn", "mlp"] * 2


@pytest.mark.slow
def test_a_resampled_write_is_the_sources_own(model):
    effects = hydra_jax.sweep(model, TEXTS, replacements=2, sites="mlp", layers="1")
    ids = effects["prompt_id"].values
    for prompt in range(3):
        for draw in range(2):
            source = ids[effects["source"].values[prompt, draw]]
            one = hydra_jax.ablate(model, ids[prompt], "mlp", 1, replacements=1, sources=[source])
            swept = effects["total_effect"].values[prompt, 0, draw]
            np.testing.assert_allclose(one["total_effect"].values[0], swept, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_heads_are_swept_like_writes(model, kind):
    effects = hydra_jax.sweep(model, TEXTS, kind=kind, replacements=2, sites="heads")
    assert effects["ablated_head"].values.tolist() == [0, 1, 2, 3] * 2
    assert effects["ablated_layer"].values.tolist() == [0] * 4 + [1] * 4
    whole = hydra_jax.sweep(model, TEXTS, kind=kind, replacements=2, sites="attn")
    assert whole["ablated_head"].values.tolist() == [-1, -1]
    contributions = effects["ablated_delta_unembed"].values.reshape(-1, 2, 4).sum(axis=2)
    np.testing.assert_allclose(contributions, whole["ablated_delta_unembed"], atol=1e-5)
    if kind != "noise":  # the write is linear in what the heads mixed, and so is the direct effect
        direct = effects["direct_effect"].values
        together = direct.reshape(len(TEXTS), 2, 4, -1).sum(axis=2)
        np.testing.assert_allclose(together, whole["direct_effect"], atol=1e-5)
    one = hydra_jax.ablate(model, TEXTS[1], "attn", 1, 2, kind="zero")
    zero = hydra_jax.sweep(model, TEXTS, kind="zero", sites="heads")
    swept = zero.isel(ablated=6, prompt=int(np.flatnonzero(zero["prompt_id"] == TEXTS[1])[0]))
    np.testing.assert_allclose(one["total_effect"], swept["total_effect"], atol=1e-5)


@pytest.mark.slow
def test_noise_follows_the_seed(model):
    first, again, other = (hydra_jax.sweep(model, TEXTS, kind="noise", replacements=2, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first["total_effect"], again["total_effect"])
    assert not np.allclose(first["total_effect"], other["total_effect"])
    drawn = first["direct_effect"].values
    assert not np.allclose(drawn[..., 0], drawn[..., 1])


@pytest.mark.slow
def test_chosen_components_are_the_ones_ablated(model):
    effects = hydra_jax.sweep(model, TEXTS, kind="zero", sites="mlp", layers="1")
    assert effects["ablated_layer"].values.tolist() == [1]
    assert effects["ablated_site"].values.tolist() == ["mlp"]
    whole = hydra_jax.sweep(model, TEXTS, kind="zero")
    np.testing.assert_allclose(effects["total_effect"][:, 0], whole["total_effect"][:, 3], atol=1e-5)


def chosen(model, prompts, **wanted):
    kept, examined = choose(clean_pass(model, ZERO), itemise(model, prompts), PromptsConfig(**wanted), seed=0)
    return [item.prompt.id for item in kept], [item.prompt.id for item in examined]


@pytest.mark.slow
def test_a_limit_picks_the_same_prompts_in_any_order(model):
    prompts = [Prompt(str(number), text) for number, text in enumerate(TEXTS)]
    kept, _ = chosen(model, prompts, correct_only=False, limit=3)
    assert len(kept) == 3
    assert kept == chosen(model, prompts[::-1], correct_only=False, limit=3)[0]
    assert set(kept) <= set(chosen(model, prompts, correct_only=False, limit=5)[0])


def test_correct_only_keeps_what_the_model_answers_right(model):
    effects = hydra_jax.sweep(model, TEXTS, kind="zero")
    says = dict(zip(effects["text"].values, effects["target_text"].values, strict=True))
    items = itemise(model, [Prompt(text, text, "z") for text in TEXTS])
    targets = dict(zip(TEXTS, planned(model, items, ZERO).targets, strict=True))
    right = set(TEXTS[::2])
    answered = [
        dataclasses.replace(item, answers=(targets[item.prompt.id] if item.prompt.id in right else -5,))
        for item in items
    ]
    kept, examined = choose(clean_pass(model, ZERO), answered, PromptsConfig(), seed=0)
    assert {item.prompt.id for item in kept} == right
    assert {item.prompt.id for item in examined} == set(TEXTS) == set(says)


@pytest.mark.slow
def test_the_real_model_knows_where_the_eiffel_tower_is(smollm2):
    text = "The Eiffel Tower is located in the city of"
    assert encode(smollm2.tokenizer, text) == [504, 414, 46682, 18669, 314, 3807, 281, 260, 2240, 282]
    effects = hydra_jax.ablate(smollm2, text, "attn", 29, kind="zero")
    assert effects.attrs["target_text"] == " Paris"
    assert round(effects.attrs["clean_probability"], 2) == 0.70


@pytest.mark.slow
def test_the_real_model_repairs_itself(smollm2):
    # The Hydra effect where it is strongest: of what ablated late attention wrote, much comes back.
    effects = hydra_jax.sweep(smollm2, correct_only=True, limit=24, sites="attn", layers="27-29", replacements=8)
    direct, total = (effects[name].mean(["prompt", "replacement"]) for name in ("direct_effect", "total_effect"))
    assert (direct > 0.1).all()
    assert (total < 0.8 * direct).all()


@pytest.mark.parametrize(
    ("prompts", "settings", "word"),
    [
        ("one text", {}, "need 16"),
        (TEXTS, {"layers": [1]}, "layers: .* is not"),
        (TEXTS, {"kind": "zeros"}, "'zero'"),
        (TEXTS[:3], {}, "need 16"),
        (TEXTS[:1], {"kind": "mean"}, "one prompt"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(model, prompts, settings, word):
    with pytest.raises(UserError, match=word) as raised:
        hydra_jax.sweep(model, prompts, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "spelt"), [("attn 1", ("attn", 1)), ("mlp 0", ("mlp", 0)), ("attn 1.2", ("attn", 1, 2))]
)
def test_a_component_may_be_given_by_its_name(model, name, spelt):
    by_name, by_parts = (hydra_jax.ablate(model, TEXTS[0], *each, kind="zero") for each in ((name,), spelt))
    xr.testing.assert_identical(by_name, by_parts)


NAMES = [("attn 2",), ("mlp 0.1",), ("attn 0.4",), ("attn",), ("attn 1.2", None, 1), ("attn 1", 1), ("1",)]


@pytest.mark.parametrize("component", NAMES)
def test_a_name_of_no_component_of_the_model_is_refused_in_one_line(model, component):
    with pytest.raises(UserError, match=r"is not a|is none|names a head") as raised:
        hydra_jax.ablate(model, TEXTS[0], *component, kind="zero")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("component", [("attn", 2), ("resid", 0), ("mlp", 0, 1), ("attn", 0, 4), ("attn", -3)])
def test_a_component_that_is_not_there_is_refused(model, component):
    with pytest.raises(UserError, match="is not a"):
        hydra_jax.ablate(model, TEXTS[0], *component, kind="zero")


def test_a_token_without_a_row_is_refused_where_a_prompt_has_it(tmp_path):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny")
    text = checkpoints.tokenizer()
    text.add_special_tokens(["<image>"])  # as Gemma 3's text models have one
    text.save(str(path / "tokenizer.json"))
    model = hydra_jax.load(str(path))
    assert len(itemise(model, [Prompt("1", "the of")])) == 1
    with pytest.raises(UserError, match=r"^prompt '2': token <image> has no row in the embedding of .*tiny"):
        itemise(model, [Prompt("1", "the of"), Prompt("2", "the <image> of")])


@pytest.mark.slow
def test_a_sweep_in_the_stored_type_says_which_it_was(tmp_path):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny", torch_dtype="bfloat16")
    prompts = checkpoints.json_lines(tmp_path / "p.jsonl", [{"prompt": text} for text in TEXTS[:3]])
    asked = SweepConfig(
        model=str(path),
        dtype="auto",
        prompts=PromptsConfig(path=str(prompts), correct_only=False),
        ablation=AblationConfig(kind="zero", edges=False),
        identity_tolerance=0.9,
    )
    made = run(asked, tmp_path / "out", progress=False)
    assert json.loads(made.attrs["protocol"])["dtype"] == "bfloat16"
    run(dataclasses.replace(asked, dtype="bfloat16"), tmp_path / "out", progress=False)  # the same protocol
