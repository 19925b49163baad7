"""Tiny random models of every family as `transformers` makes and publishes them, all switches on."""

import functools

import numpy as np
import torch
import transformers

from tests.helpers import checkpoints

LAYERS, HEADS, KV_HEADS, WIDTH, HEAD_DIM, MLP_WIDTH, CONTEXT, VOCABULARY, WINDOW = 4, 4, 2, 32, 8, 48, 64, 300, 5
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=MLP_WIDTH,
    max_position_embeddings=CONTEXT,
    pad_token_id=None,
    tie_word_embeddings=False,
)
GROUPED = COMMON | dict(num_key_value_heads=KV_HEADS)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)

CONFIGS = {
    "llama": ("llama", GROUPED | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama 3": ("llama", GROUPED | dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True)),
    "llama linear": ("llama", COMMON | dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4))),
    "mistral": ("mistral", GROUPED | dict(head_dim=10, sliding_window=WINDOW)),
    "qwen2": ("qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)),
    "qwen3": ("qwen3", GROUPED | dict(head_dim=12, attention_bias=True, tie_word_embeddings=True)),
    "gpt2": (
        "gpt2",
        dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, n_inner=MLP_WIDTH),
    ),
    "pythia": ("gpt_neox", COMMON | dict(rope_parameters=dict(rope_theta=1000.0, partial_rotary_factor=0.5))),
    "gpt_neox": ("gpt_neox", COMMON | dict(use_parallel_residual=False, hidden_act="gelu_new")),
    "gemma": ("gemma", GROUPED | dict(head_dim=HEAD_DIM, tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        GROUPED
        | dict(
            head_dim=HEAD_DIM,
            tie_word_embeddings=True,
            sliding_window=WINDOW,
            query_pre_attn_scalar=13,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "gemma3_text",
        GROUPED
        | dict(
            head_dim=HEAD_DIM,
            tie_word_embeddings=True,
            sliding_window=WINDOW,
            query_pre_attn_scalar=11,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=GEMMA3_ROPE,
        ),
    ),
    "olmo2": ("olmo2", GROUPED),
    "phi3": (
        "phi3",
        GROUPED | dict(sliding_window=WINDOW, rope_parameters=dict(rope_theta=1000.0, partial_rotary_factor=0.5)),
    ),
    "opt": (
        "opt",
        {key: value for key, value in COMMON.items() if key != "intermediate_size"}
        | dict(ffn_dim=MLP_WIDTH, word_embed_proj_dim=WIDTH, tie_word_embeddings=True),
    ),
}
"""Model type and settings."""

DECODERS = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model.decoder"}
LAYER_LISTS = {"gpt2": "h"}
FINAL_NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "opt": "final_layer_norm"}
POST_NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")
PROJECTIONS = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "opt": "self_attn.out_proj"}
"""The modules that read what heads mix, where they are not self_attn.o_proj."""
WRITES = {
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), POST_NORMED),
}
"""The modules whose output is added to the stream, where they are not self_attn and mlp."""


def made(name, **changes):
    """The model as `transformers` has it, of random weights; `changes` are made to its settings."""
    torch.manual_seed(0)
    kind, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(kind, **settings | changes, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def saved(model, path):
    """A directory of it as it is published, with a tokenizer."""
    model.save_pretrained(path)
    checkpoints.tokenizer().save(str(path / "tokenizer.json"))
    return path


def layers(model):
    return getattr(decoder(model), LAYER_LISTS.get(model.config.model_type, "layers"))


def decoder(model):
    return model.get_submodule(DECODERS.get(model.config.model_type, "model"))


def final_norm(model):
    return decoder(model).get_submodule(FINAL_NORMS.get(model.config.model_type, "norm"))


def run(model, ids, replace=None):
    """One pass, watched by forward hooks.

    Returns:
      A dict: logits [T, V] and uncapped [V] of the last token; resid_pre and resid_post [L, T, D]; writes
      [L, 2, T, D]; final [D], the stream of the last token before the final norm. `replace` is (layer,
      site, write [D]), of the last token.
    """
    seen, handles = {}, []

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def keep(key, whole, what):
        def hook(module, arguments, output):
            tensor = first(output if what == "output" else arguments)
            tensor = tensor.reshape(len(ids), -1)
            if replace is not None and key == replace[:2]:
                tensor[-1] = torch.from_numpy(np.array(replace[2]))
            seen[key] = tensor.detach().clone().numpy()

        handles.append(whole.register_forward_hook(hook))

    for number, layer in enumerate(layers(model)):
        keep(("post", number), layer, "output")
        for site, module in enumerate(WRITES.get(model.config.model_type, ("self_attn", "mlp"))):
            keep((number, site), layer.get_submodule(module), "output")
    keep("final", final_norm(model), "input")
    keep("normed", final_norm(model), "output")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True)
        uncapped = model.get_output_embeddings()(torch.from_numpy(seen["normed"][-1])).numpy()
    for handle in handles:
        handle.remove()
    count = len(layers(model))
    return dict(
        logits=found.logits[0].numpy(),
        uncapped=uncapped,
        embedded=found.hidden_states[0][0].numpy(),
        resid_post=np.stack([seen["post", layer] for layer in range(count)]),
        writes=np.stack([[seen[layer, site] for site in range(2)] for layer in range(count)]),
        final=seen["final"][-1],
    )


def centred(model, stream):
    """`stream` [..., D], without its mean where the final norm takes that away."""
    return stream - stream.mean(axis=-1, keepdims=True) if isinstance(final_norm(model), torch.nn.LayerNorm) else stream


def divisor(model, final):
    """The number that the final norm divides `final` [D] by."""
    norm = final_norm(model)
    return np.sqrt(
        np.square(centred(model, final)).mean() + (norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
    )


def contribution(model, write, final, target):
    """What `write` [..., D] adds to the centred logit of `final` [D], the final norm's divisor held."""
    gain = final_norm(model).weight.detach().numpy() + (1 if "gemma" in model.config.model_type else 0)
    unembedding, mean = unembeddings(model)
    return centred(model, write) / divisor(model, final) * gain @ (unembedding[target] - mean)


@functools.lru_cache(maxsize=1)
def unembeddings(model):
    """The directions of all tokens, [V, D], and their mean, which takes long enough of a real model."""
    weight = model.get_output_embeddings().weight.detach().numpy()
    return weight, weight.mean(axis=0)
