"""Models and tokenizers of `transformers` in memory against themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydra_jax as hj
from hydra_jax.engine import mesh as meshes
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import forward
from hydra_jax.weights.load import load

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

import torch
import transformers

from tests.helpers import checkpoints, families

IDS = list(range(5, 60, 4))
TOLERANCE = 2e-5
jit_forward = jax.jit(forward)
GEMMA3 = dict(
    text_config=dict(families.CONFIGS["gemma3"][1], model_type="gemma3_text"),
    vision_config=dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=14
    ),
)


@pytest.fixture(scope="module")
def text():
    control = checkpoints.CONTROL
    return transformers.PreTrainedTokenizerFast(tokenizer_object=checkpoints.tokenizer(), eos_token=control)


def logits(model):
    return jit_forward(model.params, jnp.asarray(IDS, jnp.int32))[0]


def expected(model):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


@pytest.mark.parametrize("name", families.CONFIGS)
def test_logits_of_every_family_equal_transformers(name, text, tmp_path):
    model = families.made(name)
    here, there = load(model.train(), text), load(str(families.saved(model, tmp_path)))
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params.weights, there.params.weights)
    np.testing.assert_allclose(logits(here), expected(model), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_every_type_are_read(dtype, text):
    model = families.made("gpt2").to(getattr(torch, dtype))  # without rotary frequencies, which are rounded too
    here = load(model, text)
    np.testing.assert_allclose(logits(here), expected(model.float()), atol=TOLERANCE)
    auto = load(model.to(getattr(torch, dtype)), text, dtype="auto")
    assert auto.config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")


def test_a_head_of_its_own_counts(text):
    model = families.made("gemma")
    assert load(model, text).config.tied
    head = torch.nn.Linear(families.WIDTH, families.VOCABULARY, bias=False)
    model.lm_head = head
    here = load(model, text)
    assert not here.config.tied
    np.testing.assert_allclose(logits(here), expected(model), atol=TOLERANCE)
    with torch.no_grad():
        head.weight.copy_(model.get_input_embeddings().weight)
    assert load(model, text).config.tied


def test_the_text_of_a_multimodal_model_is_read(text):
    config = transformers.AutoConfig.for_model("gemma3", **GEMMA3)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    np.testing.assert_allclose(logits(load(model, text)), expected(model), atol=TOLERANCE)


def test_the_users_model_and_tokenizer_are_left_alone(text):
    model = families.made("gpt2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = text.backend_tokenizer.to_str()
    here = load(model, text)
    was = np.asarray(logits(here))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(logits(here), was)
    model.load_state_dict(before)
    assert model.training
    assert text.backend_tokenizer.to_str() == own
    assert load(model, text).weights_hash == here.weights_hash


def test_a_model_in_memory_can_be_ablated(text):
    model = families.made("olmo2")
    result = hj.ablate(load(model, text), "the 12 in of", "attn", 1, kind="zero")
    assert np.isfinite(result["total_effect"]).all()


def test_layers_are_not_read_after_training_went_on(text, capsys):
    model = families.made("llama")
    config = load(model, text).config
    streamed = load(model, text, memory=meshes.bytes_a_device(config, 1) / 1e9)
    assert streamed.streamed
    assert "streaming layers" in capsys.readouterr().err
    assert len(list(streamed.layers)) == families.LAYERS
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match="has changed since the model was loaded"):
        list(streamed.layers)


def test_models_made_in_inference_mode_are_read(text):
    with torch.inference_mode():
        model = families.made("llama")
    np.testing.assert_allclose(logits(load(model, text)), expected(model), atol=TOLERANCE)


def test_a_beginning_of_sequence_token_is_put_where_theirs_puts_it():
    control = checkpoints.CONTROL
    begun = transformers.PreTrainedTokenizerFast(
        tokenizer_object=checkpoints.tokenizer(), bos_token=control, eos_token=control
    )
    model = families.made("llama")
    for asked in (True, False):
        begun.add_bos_token = asked
        ids = load(model, begun).tokenizer.encode("a b").ids
        assert ids == begun("a b").input_ids
        assert (ids[0] == 0) == asked


def refusal(*given):
    with pytest.raises(UserError) as refused:
        load(*given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_other_models_and_tokenizers_are_refused(text):
    model = families.made("llama")
    assert "ByT5Tokenizer is a slow tokenizer" in refusal(model, transformers.ByT5Tokenizer())
    assert "has no tokenizer" in refusal(model)
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert "is an encoder with a decoder" in refusal(transformers.T5ForConditionalGeneration(config), text)
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    assert "architecture 'bert'" in refusal(transformers.BertModel(transformers.BertConfig(**sizes)), text)
    with torch.device("meta"):
        assert "on the meta device" in refusal(transformers.LlamaForCausalLM(model.config), text)
    bare = refusal(model.model, text)
    assert "lm_head.weight is missing; give the model as AutoModelForCausalLM makes it" in bare
    classifier = transformers.AutoModelForSequenceClassification.from_config(families.made("gpt2").config)
    assert "score.weight is more than" in refusal(classifier, text)
