"""Programs of any kind from Python: what is read, where, of which values; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit

import hydra_jax as hj
from hydra_jax.core.programs import from_words
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import forward
from tests.helpers import models as toy_models

TEXTS = ["w1 w5 w3 w9 w2 w7", "w4 w4 w8", "w6 w2 w2 w1 w3", "w9 w8 w7 w6 w5 w4 w3 w2"]
CUT = {"clamp": ["attn 1", "mlp 2"]}


def made(block):
    text = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    text.pre_tokenizer = WhitespaceSplit()
    return hj.Model("tiny", toy_models.block(block), text, "")


@pytest.fixture(scope="module", params=["llama 3", "gpt-2"])
def model(request):
    return made(request.param)


@pytest.fixture(scope="module")
def llama():
    return made("llama 3")


def found(model, texts=TEXTS, **asked):
    asked = {"kind": "zero"} | asked
    return hj.intervene(model, texts, {"cut": hj.program(model, **CUT)}, **asked)


def logits(model, text, edits=None):
    tokens = jnp.array([int(word[1:]) for word in text.split()], jnp.int32)
    return np.asarray(forward(model.params, tokens, edits)[0][-1], np.float64)


def zeroed(model, text):
    length = len(text.split())
    edits = toy_models.edit(model.config, length, 1, 0, -1, jnp.zeros(model.config.width))
    return logits(model, text, edits.replace(mask=edits.mask.at[2, 1, -1].set(True)))


def test_a_contrast_is_the_combination_of_logits_that_is_asked_for(model):
    """Of whole forward passes, in which both writes are zero."""
    combinations = [({"target": 3}, [(3, 1)]), ({"target": "w3", "foil": 7}, [(3, 1), (7, -1)])]
    combinations += [({"target": {3: 0.5, 4: 0.5, 7: -1.0}}, [(3, 0.5), (4, 0.5), (7, -1)])]
    for asked, weights in combinations:
        effects = found(model, **asked)["total_effect"].squeeze(["program", "reading", "replacement"])
        for text, total in zip(TEXTS, effects.values, strict=True):
            clean, cut = (
                sum(weight * (row[token] - row.mean()) for token, weight in weights)
                for row in (logits(model, text), zeroed(model, text))
            )
            np.testing.assert_allclose(total, clean - cut, atol=1e-5)
            assert abs(total) > 1e-3


def test_metrics_are_those_of_the_whole_distribution(model):
    asked = ["log_probability", "kl", "rank", "top_changed"]
    effects = found(model, target=3, metrics=asked).squeeze(["program", "reading", "replacement"])
    for number, text in enumerate(TEXTS):
        clean, cut = (row - np.log(np.exp(row).sum()) for row in (logits(model, text), zeroed(model, text)))
        one = effects.isel(prompt=number)
        np.testing.assert_allclose(one["log_probability_drop"], clean[3] - cut[3], atol=1e-5)
        np.testing.assert_allclose(one["kl"], (np.exp(clean) * (clean - cut)).sum(), atol=1e-5)
        assert one["target_rank"] == (cut > cut[3]).sum()
        assert one["top_changed"] == (clean.argmax() != cut.argmax())


def test_readings_are_the_texts_cut_there(model):
    every = found(model, positions="all")
    for number, text in enumerate(TEXTS):
        words = text.split()
        for place in range(len(words)):
            one = found(model, [" ".join(words[: place + 1])])
            here = every.isel(prompt=number, reading=place)
            for name in ("total_effect", "change", "direct_effect", "clean_logit", "delta_unembed"):
                there = one[name].isel(prompt=0, reading=0)
                np.testing.assert_allclose(here[name], there, atol=1e-5, err_msg=name)
            assert here["target_id"] == one["target_id"]
            assert here["token"] == words[place]
        assert np.isnan(every["total_effect"].isel(prompt=number).values[0, len(words) :]).all()
        assert (every["position"].values[number, len(words) :] == -1).all()
    some = found(model, positions=[[0, 2], [1], [4, 0], [7]])
    for number, places in enumerate([[0, 2], [1], [4, 0], [7]]):
        for reading, place in enumerate(places):
            np.testing.assert_allclose(
                some["total_effect"].values[number, 0, reading],
                every["total_effect"].values[number, 0, place],
                atol=1e-5,
            )


def test_values_come_from_the_sources(llama):
    """Of one other prompt: clamping a write to it equals the clean run with that prompt's write."""
    programs = {"cut": hj.program(llama, clamp=["mlp 1"])}
    effects = hj.intervene(llama, TEXTS[0], programs, sources=TEXTS[1:3], replacements=1, target=3)
    runs = [
        hj.intervene(llama, TEXTS[0], programs, sources=[text] * 1 + TEXTS[1:3], replacements=2, target=3)
        for text in TEXTS[3:]
    ]
    every = np.concatenate([run["total_effect"].values.ravel() for run in [effects, *runs]])
    expected = []
    for source in TEXTS[1:]:
        tokens = jnp.array([int(word[1:]) for word in source.split()], jnp.int32)
        value = forward(llama.params, tokens)[1].mlp_out[1, -1]
        edits = toy_models.edit(llama.config, len(TEXTS[0].split()), 1, 1, -1, value)
        expected.append(
            np.subtract(*(row[3] - row.mean() for row in (logits(llama, TEXTS[0]), logits(llama, TEXTS[0], edits))))
        )
    assert all(np.abs(np.array(expected) - total).min() < 1e-5 for total in every)


@pytest.mark.parametrize("kind", ["resample", "mean", "zero", "noise"])
def test_the_identity_holds_for_every_kind(llama, kind):
    effects = found(llama, kind=kind, replacements=2, positions="all", responders="heads")
    assert np.nanmax(np.abs(effects["residual"])) < 1e-5
    heads = effects["head_change"].sum("head", skipna=False).isel(attn_layer=3)
    np.testing.assert_allclose(heads, effects["change"].isel(component=6), atol=1e-5)


def test_order_of_prompts_and_programs_changes_nothing(llama):
    programs = {"late": hj.program(llama, clamp=["mlp 3"]), "early": hj.program(llama, clamp=["attn 0.1"])}
    one = hj.intervene(llama, TEXTS, programs, replacements=2)
    other = hj.intervene(llama, TEXTS[::-1], dict(reversed(programs.items())), replacements=2)
    assert list(one["program"].values) == ["late", "early"]
    other = other.isel(prompt=slice(None, None, -1)).sel(program=["late", "early"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        {name: one[name].values for name in ("total_effect", "change")},
        {name: other[name].values for name in ("total_effect", "change")},
    )


REFUSED = {
    "positions outside a text": (
        dict(positions=[[0], [3], [0], [0]]),
        "prompt 'w4 w4 w8': position 3 is past its end; it has tokens 0-2",
    ),
    "positions before it": (dict(positions=[[-7], [0], [0], [0]]), "position -7 is before its beginning"),
    "a position twice": (dict(positions=[[-1, 5], [0], [0], [0]]), "positions: mean a token of prompt"),
    "positions of other prompts": (dict(positions=[[0]]), "positions: are given for 1 prompts of 4"),
    "positions of none": (dict(positions=[[], [0], [0], [0]]), "positions: are none; give"),
    "positions unknown": (dict(positions="first"), "position 'first' is not in its text"),
    "a token": (dict(target=99), "target: 99 is no token of tiny; give ids from 0 to"),
    "a foil": (dict(target=1, foil=-5), "target: -5 is no token"),
    "a target": (dict(target="w1 w2"), "target: 'w1 w2' is 2 tokens of tiny"),
    "positions of no kind": (dict(positions=3.5), "positions: is 3.5; give 'last', 'all'"),
    "a metric": (dict(metrics=["entropy"]), "metrics"),
    "responders": (dict(responders="neurons"), "responders"),
    "a kind": (dict(kind="random"), "kind"),
    "no prompts": (dict(texts=[]), "prompts: there are none"),
    "no sources": (dict(kind="resample", texts=TEXTS[:1], sources=TEXTS[:1]), "sources: have nothing beside prompt"),
}


@pytest.mark.parametrize(("asked", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(llama, asked, words):
    with pytest.raises(UserError) as refused:
        found(llama, **asked)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_programs_of_another_model_are_refused(llama):
    other = hj.Model("other", toy_models.params(layers=2), llama.tokenizer, "")
    with pytest.raises(UserError, match="is of another shape than the model's 4 layers"):
        hj.intervene(llama, TEXTS, {"cut": hj.program(other, clamp=["attn 1"])})
    with pytest.raises(UserError, match="has 8 words, a model of 4 layers has 9"):
        from_words(llama.config, [0] * 8)
    with pytest.raises(UserError, match="programs: there are none"):
        hj.intervene(llama, TEXTS, {})
    for unnamed in (hj.program(llama, clamp="attn 1"), [hj.program(llama, clamp="attn 1")]):
        with pytest.raises(UserError, match="programs: have no names; give them as in"):
            hj.intervene(llama, TEXTS, unnamed)
