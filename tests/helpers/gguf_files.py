"""GGUF files of the models of `families`, made as llama.cpp's converter makes them."""

import gguf
import numpy as np
import torch

from tests.helpers import checkpoints, families

CHANGES = {
    "gpt_neox": dict(hidden_act="gelu"),
    "gemma2": dict(query_pre_attn_scalar=families.HEAD_DIM),
    "gemma3": dict(
        query_pre_attn_scalar=families.HEAD_DIM,
        num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "qwen2": dict(use_sliding_window=False),
}
"""What no GGUF file says is as its readers assume."""

NAMES = [name for name in families.CONFIGS if name not in ("mistral", "opt")]
"""Mistral's files are Llama's there, and OPT has none."""

ARCHITECTURES = {"gpt_neox": "gptneox", "gemma3_text": "gemma3"}


def rotated(rows, heads):
    """The order of rows in which neighbouring pairs turn together."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(model):
    """(GGUF name, array) of every weight."""
    c = model.config
    kind = c.model_type
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES.get(kind, kind))
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    tied = c.tie_word_embeddings
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if tied and name.startswith("lm_head"):
            continue
        if kind == "llama" and ".q_proj." in name:
            array = rotated(array, c.num_attention_heads)
        if kind == "llama" and ".k_proj." in name:
            array = rotated(array, c.num_key_value_heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if kind == "gpt2" and array.ndim == 2 and ".c_" in name:
            array = array.T
        if kind == "gpt_neox" and "query_key_value" in name:
            heads = c.num_attention_heads
            array = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        published = "output.weight" if name.startswith("lm_head") else names.get_name(name, (".weight", ".bias"))
        yield published, np.ascontiguousarray(array)
    if kind == "llama" and c.rope_parameters["rope_type"] == "llama3":
        half = torch.arange(0, c.head_dim, 2) / c.head_dim
        plain = c.rope_parameters["rope_theta"] ** -half
        yield "rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).float().numpy()


def written(model, path):
    """Write the model's file and return its path."""
    c = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(c.model_type, c.model_type))
    writer.add_context_length(families.CONTEXT)
    writer.add_embedding_length(families.WIDTH)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(families.MLP_WIDTH)
    writer.add_head_count(c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    if c.model_type in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(getattr(c, "layer_norm_eps", None) or c.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.model_type == "gpt_neox":
        writer.add_parallel_residual(c.use_parallel_residual)
    if rope := getattr(c, "rope_parameters", None):
        if share := rope.get("partial_rotary_factor"):
            writer.add_rope_dimension_count(int(families.WIDTH // families.HEADS * share))
        full = rope.get("full_attention", rope)
        writer.add_rope_freq_base(full["rope_theta"])
        if full["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(full["factor"])
    if c.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if c.model_type == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    checkpoints.add_tokenizer(writer)
    for name, array in tensors(model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
