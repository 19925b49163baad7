"""Questions for sweeps of a tiny model whose tokens are words, and the comparison of their answers."""

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit

import hydra_jax as hj
from hydra_jax.core.edits import all_components
from hydra_jax.models.transformer import Edits, forward
from tests.helpers import models as toy_models

TEXTS = [
    "w1 w5 w3",
    "w3 w1 w4 w0 w5",
    "w4 w4 w8",
    "w9 w8 w7 w6 w5",
    "w6 w2 w1",
    "w2 w7 w1 w8 w2",
]
SOURCES = ["w2 w5 w3", "w3 w1 w4 w0 w6", "w4 w9 w8", "w9 w1 w7 w6 w4", "w6 w2 w3", "w2 w7 w1 w8 w9 w9"]
RECORDS = [
    {"id": f"p{n}", "prompt": text, "answer": "w3", "foil": "w7", "source": source, "relation": "xy"[n // 3]}
    for n, (text, source) in enumerate(zip(TEXTS, SOURCES, strict=True))
]

_forward = jax.jit(forward)


def model(block="llama 3"):
    """A model of four layers, of one of `models.BLOCKS`."""
    text = Tokenizer(models.WordLevel({f"w{i}": i for i in range(toy_models.config().vocab_size)}, unk_token="w0"))
    text.pre_tokenizer = WhitespaceSplit()
    return hj.Model("tiny", toy_models.block(block), text, "")


def tokens(text):
    """The token ids of a text."""
    return [int(word[1:]) for word in text.split()]


def writes(model, text):
    """What every component writes at a text's last token, by name."""
    trace = _forward(model.params, jnp.array(tokens(text), jnp.int32))[1]
    both = np.stack([trace.attn_out[:, -1], trace.mlp_out[:, -1]], axis=1)
    return {str(one): both[one.layer, one.site] for one in all_components(model.config.layers)}


def logits(model, text, values=None):
    """The logits after a text, in a whole forward pass in which components write `values`, by name."""
    c, ids = model.config, tokens(text)
    mask = np.zeros((c.layers, 2, len(ids)), bool)
    given = np.zeros((c.layers, 2, 1, c.width), np.float32)
    for one in all_components(c.layers):
        if str(one) in (values or {}):
            mask[one.layer, one.site, -1] = True
            given[one.layer, one.site, 0] = values[str(one)]
    edits = Edits(jnp.asarray(mask), jnp.asarray(given))
    return np.asarray(_forward(model.params, jnp.array(ids, jnp.int32), edits)[0][-1], np.float64)


def centred(row):
    """Logits less their mean."""
    return row - row.mean()


def aligned(effects):
    """A sweep's arrays, prompts in order of id and ablations in order of name, sources as ids."""
    order = {"prompt": np.argsort(effects["prompt_id"].values)}
    if effects.sizes.get("ablated"):
        order["ablated"] = np.argsort(effects["ablated_name"].values)
    ids = np.append(effects["prompt_id"].values, "")
    named = effects.assign(source=effects["source"].copy(data=ids[effects["source"].values]))
    return {name: variable.values for name, variable in named.isel(order).variables.items()}


def assert_same(found, expected, atol=0.0, without=()):
    """Two sweeps are the same, in whatever order they are."""
    found, expected = aligned(found), aligned(expected)
    assert found.keys() - set(without) == expected.keys() - set(without)
    for name in found.keys() - set(without):
        if found[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
