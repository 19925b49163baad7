"""A tiny Llama-family model as it is published: a GGUF file, or a Hugging Face directory of the same weights."""

import gzip
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP_WIDTH, CONTEXT = 2, 16, 4, 2, 4, 24, 128
NORM_EPS, ROPE_BASE = 2.0**-16, 10_000.0
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "in"), ("o", "f")]
CONTROL = "<|endoftext|>"
VOCABULARY = [CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def weights(tied=False, seed=0, layers=LAYERS):
    """Random weights by their Hugging Face names."""
    random = np.random.default_rng(seed)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (queries, WIDTH),
        "self_attn.k_proj": (keys, WIDTH),
        "self_attn.v_proj": (keys, WIDTH),
        "self_attn.o_proj": (WIDTH, queries),
        "mlp.gate_proj": (MLP_WIDTH, WIDTH),
        "mlp.up_proj": (MLP_WIDTH, WIDTH),
        "mlp.down_proj": (WIDTH, MLP_WIDTH),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }

    def draw(shape):
        array = random.normal(size=shape) * shape[-1] ** -0.5 + (len(shape) == 1)
        return array.astype(np.float32)

    tensors = {"model.embed_tokens.weight": 4 * draw((len(VOCABULARY), WIDTH)), "model.norm.weight": draw((WIDTH,))}
    if not tied:
        tensors["lm_head.weight"] = draw((len(VOCABULARY), WIDTH))
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": draw(shape) for name, shape in shapes.items()}
    return tensors


def gguf_name(name):
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    inner = inner.removesuffix(".weight")
    return f"blk.{layer}.{GGUF_NAMES.get(inner, inner)}.weight"


def interleaved(rows, heads):
    """As llama.cpp's converter permutes the rows of queries and keys."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def add_tokenizer(writer, pre="smollm"):
    """The tiny tokenizer, in a GGUF file's fields."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_token_types([gguf.TokenType.CONTROL if t == CONTROL else gguf.TokenType.NORMAL for t in VOCABULARY])


def gguf_file(path, tensors=None, architecture="llama", pre="smollm", stored=None, **fields):
    """Write a GGUF file of `tensors`, those of `stored`, {name: (bytes, type)}, as they are; `fields` are metadata."""
    tensors = weights() if tensors is None else tensors
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(len([name for name in tensors if name.endswith("input_layernorm.weight")]))
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    add_tokenizer(writer, pre)
    for key, text in fields.items():
        writer.add_string(key.replace("__", "."), text)
    for name, array in tensors.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if name in (stored or {}):
            writer.add_tensor(gguf_name(name), stored[name][0], raw_dtype=stored[name][1])
        else:
            writer.add_tensor(gguf_name(name), interleaved(array, heads) if heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def settings(tied=False):
    """A Hugging Face `config.json`."""
    return dict(
        model_type="llama",
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=MLP_WIDTH,
        max_position_embeddings=CONTEXT,
        rope_theta=ROPE_BASE,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=tied,
        hidden_act="silu",
    )


def tokenizer():
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(CONTROL, special=True)])
    return made


def hugging_face_directory(path, tensors=None, shards=1, **changes):
    """Write a model directory of `tensors`; `changes` are made to its config."""
    tensors = weights() if tensors is None else tensors
    path.mkdir()
    config = settings(tied="lm_head.weight" not in tensors) | changes
    (path / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(path / "tokenizer.json"))
    names, shard_of = sorted(tensors), {}
    for shard in range(shards):
        chosen = {name: tensors[name] for name in names[shard::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file(chosen, path / file)
        shard_of |= dict.fromkeys(chosen, file)
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return path


def wheel(path, members):
    """Write a zip file of {name: content}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def text_file(path, text):
    """Write text, gzipped if the name ends so."""
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(path, records):
    return text_file(path, "".join(json.dumps(record) + "\n" for record in records))
