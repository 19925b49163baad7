"""Traces and contributions against `transformers`: hidden states, attention, and the parts of a logit by hooks."""

import numpy as np
import pytest

from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep.activations import trace
from hydra_jax.sweep.contributions import contributions
from hydra_jax.sweep.items import Item
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.load import load

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

import torch

from tests.helpers import families

IDS = list(range(5, 60, 4))
ITEM = Item(Prompt("a text", "a text"), tuple(IDS))
FOIL = 77
TOLERANCE = 2e-5
TOP = Contrast(np.array([MOST_LIKELY]), np.array([1.0]))
DIFFERENCE = Contrast(np.array([MOST_LIKELY, FOIL]), np.array([1.0, -1.0]))


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2", "pythia", "gemma2", "gemma3", "olmo2", "opt"])
def both(request, tmp_path_factory):
    """A family's model of ours, and that of `transformers`."""
    model = families.made(request.param)
    return load(str(families.saved(model, tmp_path_factory.mktemp("saved")))), model


def test_hidden_states_and_attention_equal_transformers(both):
    ours, model = both
    found = trace(ours, ITEM)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    for layer in range(families.LAYERS):
        np.testing.assert_allclose(found["resid_pre"][layer], expected.hidden_states[layer][0], atol=TOLERANCE)
        np.testing.assert_allclose(found["pattern"][layer], expected.attentions[layer][0], atol=TOLERANCE)
    assert np.ptp(found["pattern"].values[:, :, -1, -4:]) > 0.05
    by_hooks = families.run(model, IDS)
    for name, array in zip(("attn_out", "mlp_out"), np.swapaxes(by_hooks["writes"], 0, 1), strict=True):
        np.testing.assert_allclose(found[name], array, atol=TOLERANCE)
    np.testing.assert_allclose(found["resid_post"], by_hooks["resid_post"], atol=TOLERANCE)
    said = expected.logits[0].softmax(dim=-1).max(dim=-1)
    np.testing.assert_array_equal(found["top_id"], said.indices)
    np.testing.assert_allclose(found["top_probability"], said.values, atol=TOLERANCE)


@pytest.mark.parametrize("place", [len(IDS) - 1, 4])
@pytest.mark.parametrize("contrast", [TOP, DIFFERENCE], ids=["target", "difference"])
def test_contributions_equal_those_of_hooks(both, contrast, place):
    ours, model = both
    found = contributions(ours, ITEM, place, contrast)
    clean = families.run(model, IDS[: place + 1])
    logits, target = clean["uncapped"], clean["uncapped"].argmax()

    def adds(write):
        of_target = families.contribution(model, write, clean["final"], target)
        return of_target - (families.contribution(model, write, clean["final"], FOIL) if contrast is DIFFERENCE else 0)

    for layer in range(families.LAYERS):
        for site, name in enumerate(("attn", "mlp")):
            one = found["contribution"].sel(part=f"{name} {layer}")
            np.testing.assert_allclose(one, adds(clean["writes"][layer, site, -1]), atol=TOLERANCE)
    embedding = found["contribution"].sel(part="embedding")
    np.testing.assert_allclose(embedding, adds(clean["embedded"][-1]), atol=TOLERANCE)
    expected = logits[target] - (logits[FOIL] if contrast is DIFFERENCE else logits.mean())
    np.testing.assert_allclose(found["contribution"].sum(), expected, atol=TOLERANCE)
    assert found.attrs["target_id"] == target
    assert np.abs(found["contribution"]).max() > 0.1


def shares_of_heads(model, ids):
    """Each head's share of the last token's attention writes, [L, H, D], the post-norm's divisor held."""
    shares, handles, norms = {}, [], {}
    kind = model.config.model_type

    def project(layer):
        def hook(module, arguments, output):
            heads = arguments[0].reshape(len(ids), -1)[-1].reshape(families.HEADS, -1)
            alone = torch.eye(families.HEADS)[:, :, None] * heads
            of_each = torch.nn.functional.linear if hasattr(module, "in_features") else torch.matmul
            shares[layer] = of_each(alone.reshape(families.HEADS, -1), module.weight)
            norms[layer] = output.reshape(len(ids), -1)[-1]

        return hook

    def write(layer):
        def hook(module, arguments, output):
            written = (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1)[-1]
            shares[layer] = shares[layer] * (written / norms[layer])

        return hook

    for number, layer in enumerate(families.layers(model)):
        projection = layer.get_submodule(families.PROJECTIONS.get(kind, "self_attn.o_proj"))
        handles.append(projection.register_forward_hook(project(number)))
        module = layer.get_submodule(families.WRITES.get(kind, ("self_attn", "mlp"))[0])
        handles.append(module.register_forward_hook(write(number)))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([shares[layer] for layer in range(families.LAYERS)]).detach().numpy()


def test_heads_add_what_hooks_say(both):
    ours, model = both
    found = contributions(ours, ITEM, len(IDS) - 1, TOP, by_head=True)
    clean = families.run(model, IDS)
    expected = families.contribution(model, shares_of_heads(model, IDS), clean["final"], clean["uncapped"].argmax())
    for layer, head in np.ndindex(expected.shape):
        one = found["contribution"].sel(part=f"attn {layer}.{head}")
        np.testing.assert_allclose(one, expected[layer, head], atol=TOLERANCE)


def test_the_lens_is_the_final_norm_and_the_unembedding_of_every_stream(both):
    ours, model = both
    found = contributions(ours, ITEM, len(IDS) - 1, DIFFERENCE)
    clean = families.run(model, IDS)
    streams = np.concatenate([clean["embedded"][None], clean["resid_post"]])[:, -1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logits = model.get_output_embeddings()(families.final_norm(model)(torch.from_numpy(streams)))
        shares = (cap * torch.tanh(logits / cap) if cap else logits).softmax(dim=-1).numpy()
    logits, target = logits.numpy(), clean["uncapped"].argmax()
    np.testing.assert_allclose(found["lens_logit"], logits[:, target] - logits[:, FOIL], atol=TOLERANCE)
    np.testing.assert_allclose(found["lens_probability"], shares[:, target], atol=TOLERANCE)
    np.testing.assert_array_equal(found["lens_rank"], (logits > logits[:, [target]]).sum(axis=1))
    np.testing.assert_array_equal(found["lens_top_id"], logits.argmax(axis=1))
