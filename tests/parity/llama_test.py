"""Against PyTorch: the same weights in `transformers`, ablated with forward hooks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydra_jax
from hydra_jax.benchmarks.peers import llama
from hydra_jax.core.edits import SITES
from hydra_jax.models.transformer import forward
from hydra_jax.text.tokenizer import encode
from hydra_jax.weights.load import load

torch = pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
transformers = pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "The mother tongue of Danielle Darrieux is",
    "In the beginning, 12345 people looked up at the $ sign — then",
)


@pytest.fixture(scope="session")
def hugging_face(smollm2):
    return llama(smollm2.params)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_of_the_real_model_equal_transformers(smollm2, hugging_face, prompt):
    ids = encode(smollm2.tokenizer, prompt)
    logits, _ = jax.jit(forward)(smollm2.params, jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        expected = hugging_face(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"tie_word_embeddings": True, "rope_theta": 500.0},
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_saved_hugging_face_model_loads_and_gives_its_logits(tmp_path, changes):
    from tests.helpers import checkpoints

    torch.manual_seed(0)
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**shape | dict(intermediate_size=48, max_position_embeddings=64) | changes)
    hf = transformers.LlamaForCausalLM(config).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hf.save_pretrained(tmp_path)
    checkpoints.tokenizer().save(str(tmp_path / "tokenizer.json"))
    ids = list(range(5, 60, 4))
    logits, _ = jax.jit(forward)(load(str(tmp_path)).params, jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)


def hooked_run(hf, ids, replace=None):
    """Logits of the last token, and every last-token write [L, 2, D]; `replace` is (layer, site, write)."""
    writes = torch.zeros(len(hf.model.layers), 2, hf.config.hidden_size)
    handles = []

    def hook(layer, site):
        def run(module, arguments, output):
            out = output[0] if isinstance(output, tuple) else output
            if replace is not None and (layer, site) == replace[:2]:
                out[0, -1] = torch.from_numpy(np.array(replace[2]))
            writes[layer, site] = out[0, -1]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return run

    for number, layer in enumerate(hf.model.layers):
        handles.append(layer.self_attn.register_forward_hook(hook(number, 0)))
        handles.append(layer.mlp.register_forward_hook(hook(number, 1)))
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0, -1].numpy()
    for handle in handles:
        handle.remove()
    return logits, writes.numpy()


@pytest.mark.parametrize("kind", ["resample", "zero"])
@pytest.mark.parametrize(
    ("layer", "site"), [(0, "attn"), (0, "mlp"), (12, "mlp"), (23, "attn"), (29, "attn"), (29, "mlp")]
)
def test_ablations_of_the_real_model_equal_pytorch_hooks(smollm2, hugging_face, layer, site, kind):
    prompt, source = PROMPTS[:2]
    ids = encode(smollm2.tokenizer, prompt)
    place = layer, SITES.index(site)
    replacement = np.zeros(smollm2.config.width, np.float32)
    if kind == "resample":
        replacement = hooked_run(hugging_face, encode(smollm2.tokenizer, source))[1][place]
    logits, clean = hooked_run(hugging_face, ids)
    ablated_logits, ablated = hooked_run(hugging_face, ids, (*place, replacement))

    target = logits.argmax()
    unembedding = hugging_face.lm_head.weight.detach().numpy()
    direction = hugging_face.model.norm.weight.detach().numpy() * (unembedding[target] - unembedding.mean(axis=0))
    final = clean.sum(axis=(0, 1)) + hugging_face.model.embed_tokens.weight[ids[-1]].detach().numpy()
    change = (ablated - clean) @ direction / np.sqrt(np.mean(final**2) + smollm2.config.norm_eps)
    total = (logits[target] - logits.mean()) - (ablated_logits[target] - ablated_logits.mean())

    found = hydra_jax.ablate(smollm2, prompt, site, layer, kind=kind, replacements=1, sources=[source])
    np.testing.assert_allclose(found["total_effect"][0], total, atol=1e-3)
    np.testing.assert_allclose(found["direct_effect"][0], -change[place], atol=1e-3)
    change[place] = 0
    np.testing.assert_allclose(found["compensation"][0], change.ravel(), atol=1e-3)
    assert abs(total) > 0.01


@pytest.mark.parametrize(("layer", "head"), [(0, 3), (23, 8), (28, 0)])
def test_a_head_ablated_in_the_real_model_equals_a_pytorch_hook(smollm2, hugging_face, layer, head):
    ids = encode(smollm2.tokenizer, PROMPTS[0])
    share = slice(head * smollm2.config.head_dim, (head + 1) * smollm2.config.head_dim)

    def silence(module, arguments):
        mixed = arguments[0].clone()
        mixed[0, -1, share] = 0
        return (mixed,)

    logits, _ = hooked_run(hugging_face, ids)
    handle = hugging_face.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
    ablated, _ = hooked_run(hugging_face, ids)
    handle.remove()
    target = logits.argmax()
    total = (logits[target] - logits.mean()) - (ablated[target] - ablated.mean())
    found = hydra_jax.ablate(smollm2, PROMPTS[0], "attn", layer, head, kind="zero")
    np.testing.assert_allclose(found["total_effect"][0], total, atol=1e-3)
    assert abs(total) > 1e-3
