"""Settings as models' authors published them, in the keys of their day."""

import numpy as np
import pytest

from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import EVERYTHING, positions
from hydra_jax.weights.families import FAMILIES
from hydra_jax.weights.settings import Settings, model_config, rope_factors

PUBLISHED = {
    "Llama-3.2-1B": (
        dict(
            architectures=["LlamaForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            bos_token_id=128000,
            eos_token_id=128001,
            head_dim=64,
            hidden_act="silu",
            hidden_size=2048,
            initializer_range=0.02,
            intermediate_size=8192,
            max_position_embeddings=131072,
            mlp_bias=False,
            model_type="llama",
            num_attention_heads=32,
            num_hidden_layers=16,
            num_key_value_heads=8,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling=dict(
                factor=32.0,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
            rope_theta=500000.0,
            tie_word_embeddings=True,
            torch_dtype="bfloat16",
            transformers_version="4.45.0.dev0",
            use_cache=True,
            vocab_size=128256,
        ),
        dict(kv_heads=8, head_dim=64, rope_base=500000.0, tied=True, norm_eps=1e-5),
    ),
    "Mistral-7B-v0.1": (
        dict(
            architectures=["MistralForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
            hidden_act="silu",
            hidden_size=4096,
            initializer_range=0.02,
            intermediate_size=14336,
            max_position_embeddings=32768,
            model_type="mistral",
            num_attention_heads=32,
            num_hidden_layers=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-05,
            rope_theta=10000.0,
            sliding_window=4096,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
            transformers_version="4.34.0.dev0",
            use_cache=True,
            vocab_size=32000,
        ),
        dict(windows=(4096,) * 32, head_dim=128, tied=False),
    ),
    "Qwen2.5-0.5B": (
        dict(
            architectures=["Qwen2ForCausalLM"],
            attention_dropout=0.0,
            hidden_act="silu",
            hidden_size=896,
            initializer_range=0.02,
            intermediate_size=4864,
            max_position_embeddings=32768,
            max_window_layers=24,
            model_type="qwen2",
            num_attention_heads=14,
            num_hidden_layers=24,
            num_key_value_heads=2,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=True,
            torch_dtype="bfloat16",
            use_cache=True,
            use_mrope=False,
            use_sliding_window=False,
            vocab_size=151936,
        ),
        dict(windows=(), qkv_bias=True, out_bias=False, head_dim=64),
    ),
    "gpt2": (
        dict(
            activation_function="gelu_new",
            architectures=["GPT2LMHeadModel"],
            attn_pdrop=0.1,
            bos_token_id=50256,
            embd_pdrop=0.1,
            eos_token_id=50256,
            initializer_range=0.02,
            layer_norm_epsilon=1e-05,
            model_type="gpt2",
            n_ctx=1024,
            n_embd=768,
            n_head=12,
            n_layer=12,
            n_positions=1024,
            resid_pdrop=0.1,
            summary_activation=None,
            summary_first_dropout=0.1,
            summary_proj_to_labels=True,
            summary_type="cls_index",
            summary_use_proj=True,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
            vocab_size=50257,
        ),
        dict(mlp_width=3072, tied=True, norm="layer", gated=False, learned_positions=True, activation="gelu_tanh"),
    ),
    "pythia-160m": (
        dict(
            architectures=["GPTNeoXForCausalLM"],
            bos_token_id=0,
            eos_token_id=0,
            hidden_act="gelu",
            hidden_size=768,
            initializer_range=0.02,
            intermediate_size=3072,
            layer_norm_eps=1e-05,
            max_position_embeddings=2048,
            model_type="gpt_neox",
            num_attention_heads=12,
            num_hidden_layers=12,
            rotary_emb_base=10000,
            rotary_pct=0.25,
            tie_word_embeddings=False,
            torch_dtype="float16",
            use_cache=True,
            use_parallel_residual=True,
            vocab_size=50304,
        ),
        dict(rotary_dim=16, parallel=True, rope_base=10000.0, qkv_bias=True, out_bias=True, mlp_bias=True),
    ),
    "gemma-2b": (
        dict(
            architectures=["GemmaForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            head_dim=256,
            hidden_act="gelu",
            hidden_activation=None,
            hidden_size=2048,
            intermediate_size=16384,
            max_position_embeddings=8192,
            model_type="gemma",
            num_attention_heads=8,
            num_hidden_layers=18,
            num_key_value_heads=1,
            rms_norm_eps=1e-06,
            rope_scaling=None,
            rope_theta=10000.0,
            torch_dtype="bfloat16",
            vocab_size=256000,
        ),
        dict(activation="gelu_tanh", embedding_scale=2048**0.5, tied=True, query_scalar=0.0),
    ),
    "gemma-2-27b": (
        dict(
            architectures=["Gemma2ForCausalLM"],
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=128,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            hidden_size=4608,
            intermediate_size=36864,
            max_position_embeddings=8192,
            model_type="gemma2",
            num_attention_heads=32,
            num_hidden_layers=46,
            num_key_value_heads=16,
            query_pre_attn_scalar=144,
            rms_norm_eps=1e-06,
            rope_theta=10000.0,
            sliding_window=4096,
            vocab_size=256000,
        ),
        dict(windows=(4096, 0) * 23, query_scalar=144.0, attn_softcap=50.0, final_softcap=30.0, post_norm=True),
    ),
    "gemma-3-4b": (
        dict(
            architectures=["Gemma3ForConditionalGeneration"],
            boi_token_index=255999,
            image_token_index=262144,
            mm_tokens_per_image=256,
            model_type="gemma3",
            text_config=dict(
                hidden_size=2560,
                intermediate_size=10240,
                model_type="gemma3_text",
                num_hidden_layers=34,
                rope_scaling=dict(factor=8.0, rope_type="linear"),
                sliding_window=1024,
            ),
            vision_config=dict(hidden_size=1152),
        ),
        dict(
            windows=tuple(0 if layer % 6 == 5 else 1024 for layer in range(34)),
            rope_base=1e6,
            local_rope_base=1e4,
            rope_factors=(8.0,) * 128,
            qk_norm="head",
            vocab_size=262_208,
            query_scalar=256.0,
        ),
    ),
    "Phi-3-mini-4k": (
        dict(
            architectures=["Phi3ForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            embd_pdrop=0.0,
            hidden_act="silu",
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
            model_type="phi3",
            num_attention_heads=32,
            num_hidden_layers=32,
            num_key_value_heads=32,
            original_max_position_embeddings=4096,
            resid_pdrop=0.0,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=2047,
            tie_word_embeddings=False,
            vocab_size=32064,
        ),
        dict(windows=(2047,) * 32, head_dim=96, rotary_dim=0),
    ),
    "opt-125m": (
        dict(
            _remove_final_layer_norm=False,
            activation_dropout=0.0,
            activation_function="relu",
            architectures=["OPTForCausalLM"],
            attention_dropout=0.0,
            do_layer_norm_before=True,
            dropout=0.1,
            ffn_dim=3072,
            hidden_size=768,
            init_std=0.02,
            layerdrop=0.0,
            max_position_embeddings=2048,
            model_type="opt",
            num_attention_heads=12,
            num_hidden_layers=12,
            prefix="</s>",
            vocab_size=50272,
            word_embed_proj_dim=768,
        ),
        dict(activation="relu", learned_positions=True, tied=True, gated=False),
    ),
}


def read(stated) -> ModelConfig:
    family = FAMILIES[stated["model_type"]]
    s = Settings(stated[family.nested] if family.nested else stated, family.defaults)
    return model_config("config.json", s, lambda: family.fields(s))


@pytest.mark.parametrize(("stated", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_settings_are_read(stated, expected):
    config = read(stated)
    assert expected == {name: getattr(config, name) for name in expected}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights is False"),
        ("opt-125m", dict(do_layer_norm_before=False), "do_layer_norm_before is False"),
        ("opt-125m", dict(word_embed_proj_dim=512), "word_embed_proj_dim is 512"),
        ("pythia-160m", dict(rotary_pct=0.0), "rotary_pct"),
        ("Phi-3-mini-4k", dict(rope_scaling=dict(type="longrope", factor=2.0)), "rotary scaling of type 'longrope'"),
        ("Phi-3-mini-4k", dict(rope_scaling=dict(type="linear", short_factor=[1.0])), "short_factor"),
        ("gemma-2b", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma-2b", dict(attn_logit_softcapping=5.0), "attn_logit_softcapping"),
        ("gemma-2-27b", dict(layer_types=["full_attention"]), "layer_types must be 46"),
        ("gemma-2-27b", dict(layer_types=["chunked_attention"] * 46), "layer_types must be 46"),
        ("gemma-2-27b", dict(sliding_window=None, layer_types=["sliding_attention"] * 46), "sliding_window"),
        ("gemma-2-27b", dict(sliding_window="4096"), "windows"),
        ("gpt2", dict(n_layer=10**9), "n_layer must be 1 to 10,000"),
        ("gpt2", dict(activation_function="quick_gelu"), "quick_gelu"),
    ],
)
def test_what_would_change_the_computation_is_refused(name, change, reason):
    with pytest.raises(UserError) as raised:
        read(PUBLISHED[name][0] | change)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_an_old_file_leaves_out_is_as_its_authors_meant_it():
    pythia, qwen = (dict(PUBLISHED[name][0]) for name in ("pythia-160m", "Qwen2.5-0.5B"))
    del pythia["rotary_pct"], qwen["sliding_window"]
    assert read(pythia).rotary_dim == 16
    assert read(qwen).windows == ()
    sliding = read(qwen | dict(use_sliding_window=True, max_window_layers=22))
    assert sliding.windows == (0,) * 22 + (4096,) * 2


def test_gelu_is_approximate_under_gemmas_old_key_alone():
    old, new = (PUBLISHED[name][0] for name in ("gemma-2b", "gemma-2-27b"))
    assert read(old).activation == read(old | dict(hidden_act="gelu_pytorch_tanh")).activation == "gelu_tanh"
    assert read(new | dict(hidden_activation="gelu")).activation == "gelu"
    assert read(new | dict(hidden_activation=None, hidden_act="gelu")).activation == "gelu_tanh"


def test_windows_and_frequencies_are_of_each_layer():
    config = read(PUBLISHED["gemma-3-4b"][0])
    at = positions(config)
    assert at.frequencies.shape == (34, 128)
    np.testing.assert_array_equal(at.window[4:7], [1024, EVERYTHING, 1024])
    np.testing.assert_allclose(at.frequencies[4], 1e4 ** (-np.arange(128) / 128), rtol=1e-6)
    np.testing.assert_allclose(at.frequencies[5], 1e6 ** (-np.arange(128) / 128) / 8, rtol=1e-6)


def test_llama_3_stretches_long_waves_alone():
    factors = np.array(read(PUBLISHED["Llama-3.2-1B"][0]).rope_factors)
    assert (factors[:10] == 1).all()
    assert (factors[-10:] == 32).all()
    assert (np.diff(factors) >= 0).all()
    assert 0 < np.count_nonzero((factors > 1) & (factors < 32)) < 10
    assert rope_factors({}, 1e4, 64) == ()
