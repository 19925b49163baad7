import dataclasses
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.config import AblationConfig, PromptsConfig, SweepConfig, sweep_config
from hydra_jax.core.edits import all_components
from hydra_jax.errors import UserError
from tests.helpers import models as toy_models

MODEL = toy_models.config(layers=12)
LAYERS = MODEL.layers
get_config = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "sweep.py"))["get_config"]


def refusal(call, *arguments):
    with pytest.raises(UserError) as raised:
        call(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def ablated(**settings):
    """The components that are ablated, each by itself."""
    ablations = AblationConfig(**settings).ablations(MODEL)
    assert all(ablation.single for ablation in ablations)
    return [ablation.single for ablation in ablations]


def layers(text):
    return {component.layer for component in ablated(layers=text)}


def test_the_config_file_holds_the_defaults():
    assert sweep_config(get_config()) == SweepConfig()
    assert get_config().to_dict() == dataclasses.asdict(SweepConfig())


def test_the_config_file_takes_a_model():
    assert sweep_config(get_config("tiny.gguf")) == SweepConfig(model="tiny.gguf")


def test_settings_reach_the_dataclasses():
    config = get_config()
    config.seed, config.prompts.limit, config.ablation.kind = 7, 64, "mean"
    expected = SweepConfig(seed=7, prompts=PromptsConfig(limit=64), ablation=AblationConfig(kind="mean"))
    assert sweep_config(config) == expected


@pytest.mark.parametrize(
    ("mapping", "place", "remedy"),
    [
        ({"sed": 1}, "config.sed", "'seed'"),
        ({"ablation": {"kinds": "mean"}}, "config.ablation.kinds", "'kind'"),
        ({"prompts": {"correct": True}}, "config.prompts.correct", "'correct_only'"),
        ({"qqq": 1}, "config.qqq", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(mapping, place, remedy):
    message = refusal(sweep_config, mapping)
    assert place in message
    assert remedy in message


@pytest.mark.parametrize(
    ("mapping", "place", "reason"),
    [
        ({"seed": "1"}, "config.seed", "int"),
        ({"seed": 1.0}, "config.seed", "int"),
        ({"seed": True}, "config.seed", "int"),
        ({"seed": None}, "config.seed", "int"),
        ({"model": 3}, "config.model", "str"),
        ({"identity_tolerance": True}, "config.identity_tolerance", "float"),
        ({"prompts": {"correct_only": 1}}, "config.prompts.correct_only", "bool"),
        ({"ablation": {"layers": 3}}, "config.ablation.layers", "str"),
        ({"prompts": "file.json"}, "config.prompts", "config.prompts.KEY"),
        ({"ablation": None}, "config.ablation", "config.ablation.KEY"),
        ([], "config", "KEY"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(mapping, place, reason):
    message = refusal(sweep_config, mapping)
    assert place in message
    assert reason in message


@pytest.mark.parametrize(
    ("mapping", "place", "reason"),
    [
        ({"seed": -1}, "config.seed", "0 or more"),
        ({"rows": -1}, "config.rows", "0 or more"),
        ({"bootstrap": 0}, "config.bootstrap", "1 or more"),
        ({"prompts": {"limit": -1}}, "config.prompts.limit", "0 or more"),
        ({"ablation": {"replacements": 0}}, "config.ablation.replacements", "1 or more"),
        ({"identity_tolerance": 1}, "config.identity_tolerance", "between"),
        ({"identity_tolerance": 0.0}, "config.identity_tolerance", "between"),
        ({"identity_tolerance": float("nan")}, "config.identity_tolerance", "between"),
        ({"ablation": {"kind": "resampel"}}, "config.ablation.kind", "'resample'"),
        ({"dtype": "float16"}, "config.dtype", "'bfloat16'"),
        ({"precision": "exact"}, "config.precision", "highest"),
        (dict(seed=2**32), "config.seed", "4294967295"),
        (dict(bootstrap=10**9), "config.bootstrap", "100000"),
        (dict(rows=10**30), "config.rows", "2147483647"),
        (dict(ablation=dict(replacements=10**9)), "config.ablation.replacements", "10000"),
    ],
)
def test_a_value_out_of_range_is_refused(mapping, place, reason):
    message = refusal(sweep_config, mapping)
    assert place in message
    assert reason in message


@pytest.mark.parametrize(("kind", "draws"), [("resample", 15), ("noise", 15), ("mean", 1), ("zero", 1)])
def test_only_random_kinds_draw_more_than_once(kind, draws):
    assert AblationConfig(kind=kind, replacements=15).draws == draws


spans = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1)).map(sorted)


@given(st.lists(spans, min_size=1, max_size=5), st.sampled_from([",", ", ", " ,"]))
def test_layers_are_the_union_of_numbers_and_ranges(chosen, comma):
    text = comma.join(str(first) if first == last else f"{first}-{last}" for first, last in chosen)
    assert layers(text) == {layer for first, last in chosen for layer in range(first, last + 1)}


@given(st.text("0123456789-, all", max_size=8))
def test_layers_are_understood_or_refused_by_name(text):
    try:
        assert layers(text) <= set(range(LAYERS))
    except UserError as error:
        complaint = str(error)
    else:
        complaint = "config.ablation.layers"
    assert complaint.startswith("config.ablation.layers")


@pytest.mark.parametrize("text", ["", ",", "1,", "12", "0-12", "3-2", "-1", "1-", "1-2-3", "one", "1.5", "²", "9" * 30])
def test_layers_that_are_none_are_refused(text):
    assert "config.ablation.layers" in refusal(layers, text)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [("attn", {"attn"}), ("mlp", {"mlp"}), ("attn,mlp", {"attn", "mlp"}), ("mlp, attn, mlp", {"attn", "mlp"})],
)
def test_sites_and_layers_make_components_in_forward_order(sites, expected):
    found = ablated(sites=sites, layers="3,1-2")
    wanted = [c for c in all_components(LAYERS) if c.layer in (1, 2, 3) and str(c).split()[0] in expected]
    assert found == wanted


def test_heads_are_each_a_component():
    heads = ablated(sites="heads", layers="1-2")
    assert [(c.layer, c.site, c.head) for c in heads] == [(layer, 0, head) for layer in (1, 2) for head in range(4)]


@pytest.mark.parametrize("sites", ["attn,heads", "", "attention", "attn,", "attn;mlp"])
def test_unknown_sites_are_refused(sites):
    assert "config.ablation.sites" in refusal(AblationConfig(sites=sites).ablations, MODEL)


def test_the_default_is_every_component():
    assert ablated() == all_components(LAYERS)


def test_prompts_of_text_are_never_filtered_and_need_a_file():
    text = sweep_config({"prompts": {"kind": "text", "path": "book.txt"}})
    assert text.prompts.correct_only
    assert not text.prompts.filtered
    assert SweepConfig().prompts.filtered
    assert "config.prompts.path" in refusal(sweep_config, {"prompts": {"kind": "text"}})
    assert "'text'" in refusal(sweep_config, {"prompts": {"kind": "txt"}})
