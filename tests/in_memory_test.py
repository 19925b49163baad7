"""Models in memory that have what PyTorch's have, without PyTorch; `parity/in_memory_test.py` has the real ones."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import hydra_jax as hj
from hydra_jax.engine import mesh as meshes
from hydra_jax.errors import UserError
from hydra_jax.weights import source
from hydra_jax.weights.load import load
from tests.helpers import checkpoints

HEAD, EMBEDDING, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
IN_MEMORY = dict(
    return_dict=True,
    output_attentions=False,
    is_encoder_decoder=False,
    pruned_heads={},
    id2label={0: "LABEL_0"},
    top_k=50,
)


class Tensor:
    """A tensor with NumPy's numbers."""

    def __init__(self, array, dtype=None, device="cuda"):
        self.array, self.device, self._version = array, types.SimpleNamespace(type=device), 0
        self.dtype, self.shape = f"torch.{dtype or array.dtype}", array.shape

    def detach(self):
        return self

    def cpu(self):
        return Tensor(self.array, self.dtype.removeprefix("torch."), "cpu")

    def float(self):
        return Tensor(self.array.astype(np.float32), device=self.device.type)

    def numpy(self):
        if self.device.type != "cpu" or self.dtype == "torch.bfloat16":
            raise TypeError("can't convert to numpy")
        return self.array


class Subclass(Tensor):
    pass


def unreadable(array):
    tensor = Tensor(array)
    tensor.detach = mock.Mock(side_effect=RuntimeError("out of memory"))
    return tensor


class TinyForCausalLM:
    """A model of `transformers`, as far as it is needed."""

    def __init__(self, tensors=None, **changes):
        tensors = checkpoints.weights() if tensors is None else tensors
        self.tensors = {n: array if isinstance(array, Tensor) else Tensor(array) for n, array in tensors.items()}
        values = checkpoints.settings(tied=HEAD not in tensors) | IN_MEMORY | changes
        self.config = types.SimpleNamespace(to_dict=lambda: values, _name_or_path=values.get("_name_or_path", ""))

    def state_dict(self):
        return self.tensors


class Fast:
    """A fast tokenizer of `transformers`; it changes the one inside it as that does."""

    all_special_ids = (0,)

    def __init__(self, backend, before=(), after=()):
        self.backend_tokenizer, self.before, self.after = backend, before, after

    def __call__(self, text):
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return {"input_ids": [*self.before, *self.backend_tokenizer.encode(text).ids, *self.after]}


class Slow:
    def convert_ids_to_tokens(self, ids):
        raise NotImplementedError


def fast(**ends):
    return Fast(checkpoints.tokenizer(), **ends)


def refusal(*given, **settings):
    with pytest.raises(UserError) as refused:
        load(*given, **settings)
    message = str(refused.value)
    assert "\n" not in message
    assert "; " in message
    return message


def replaced(name, tensor):
    return checkpoints.weights() | {name: tensor}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory_is_that_of_its_directory(tmp_path, tied):
    tensors = checkpoints.weights(tied)
    there = load(str(checkpoints.hugging_face_directory(tmp_path / "tiny", tensors)))
    here = load(TinyForCausalLM(tensors), fast())
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params.weights, there.params.weights)
    assert here.tokenizer.to_str() == there.tokenizer.to_str()
    assert here.dropout is None
    assert here.name == "TinyForCausalLM"


def test_a_model_is_called_what_it_was_loaded_from():
    assert load(TinyForCausalLM(_name_or_path="owner/tiny"), fast()).name == "owner/tiny"


def test_arguments_are_told_apart_by_what_they_are(tmp_path):
    path = str(checkpoints.hugging_face_directory(tmp_path / "tiny"))
    tiny, text = TinyForCausalLM(), fast()
    assert load(path, "bfloat16", "high").config == load(name=path, dtype="bfloat16", precision="high").config
    here = [load(tiny, text, "high", dtype="bfloat16"), load(tiny, tokenizer=text, precision="high", dtype="bfloat16")]
    assert here[0].config == here[1].config == load(path, "bfloat16", "high").config
    with pytest.raises(TypeError, match="dtype"):
        load(path, "bfloat16", dtype="float32")


def test_a_sweep_of_a_model_in_memory_is_that_of_its_directory(tmp_path):
    there = load(str(checkpoints.hugging_face_directory(tmp_path / "tiny")))
    results = [
        hj.sweep(model, ["the 12 in", "of the"], replacements=1) for model in (there, load(TinyForCausalLM(), fast()))
    ]
    np.testing.assert_array_equal(*(result["total_effect"] for result in results))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64", "float32"])
def test_weights_of_every_type_are_read(stored):
    rounded = {name: array.astype(jnp.dtype(stored)) for name, array in checkpoints.weights().items()}
    tiny = TinyForCausalLM({name: Tensor(array, stored) for name, array in rounded.items()}, dtype="float32")
    single, kept = load(tiny, fast()), load(tiny, fast(), dtype="auto")
    np.testing.assert_array_equal(
        single.params.weights["layers"]["mlp"]["up"]["kernel"][0], rounded[UP].astype(np.float32).T
    )
    assert single.config.dtype == "float32"
    assert kept.config.dtype == ("bfloat16" if stored == "bfloat16" else "float32")  # whatever the config says


def test_layers_are_streamed_alike():
    opened = source.in_memory(TinyForCausalLM(checkpoints.weights(layers=4), num_hidden_layers=4), fast())
    whole = opened.load()
    streamed = opened.load(limit=meshes.bytes_a_device(whole.config, 1), say=lambda line: None)
    assert streamed.streamed
    for one, other in zip(whole.layers, streamed.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_layer_that_was_trained_meanwhile_is_not_read():
    tiny = TinyForCausalLM(checkpoints.weights(layers=4), num_hidden_layers=4)
    opened = source.in_memory(tiny, fast())
    streamed = opened.load(limit=meshes.bytes_a_device(opened.config(), 1), say=lambda line: None)
    tiny.tensors[UP]._version += 1
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight has changed .*copy\.deepcopy"):
        list(streamed.layers)


def test_the_head_counts_where_it_is_not_the_embedding():
    tensors = checkpoints.weights()
    model = load(TinyForCausalLM(tensors, tie_word_embeddings=True), fast())
    assert not model.config.tied
    np.testing.assert_array_equal(model.params.weights["unembedding"], tensors[HEAD].T)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    assert load(TinyForCausalLM(tensors, tie_word_embeddings=True), fast()).config.tied
    assert not load(TinyForCausalLM(tensors, tie_word_embeddings=False), fast()).config.tied


def test_the_hash_is_of_what_the_model_is():
    def of(tensors=None, text=None, **changes):
        return source.in_memory(TinyForCausalLM(tensors, **changes), text or fast()).weights_hash

    first = of()
    assert len(first) == 64
    assert first == of() == load(TinyForCausalLM(), fast()).weights_hash == of(_name_or_path="x", use_cache=False)
    spoiled = checkpoints.weights()[UP].copy()
    spoiled[3, 5] += 1
    other = checkpoints.tokenizer()
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    half = Tensor(checkpoints.weights()[UP].astype(jnp.bfloat16), "bfloat16")
    others = [of(replaced(UP, spoiled)), of(replaced(UP, half)), of(rms_norm_eps=1e-3), of(text=Fast(other))]
    assert len({first, *others}) == 5


def test_the_users_own_tokenizer_stays_as_it_was():
    text = fast()
    text.backend_tokenizer.enable_padding(length=30)
    text.backend_tokenizer.enable_truncation(3)
    before = text.backend_tokenizer.to_str()
    for given in (text, text.backend_tokenizer):
        made = source.in_memory(TinyForCausalLM(), given).tokenizer()
        assert text.backend_tokenizer.to_str() == before
        assert made.padding is made.truncation is None
        assert len(made.encode("the capital of").ids) > 3
        made.add_tokens(["more"])
    assert text.backend_tokenizer.to_str() == before


def test_special_tokens_are_those_of_the_given_tokenizer():
    assert load(TinyForCausalLM(), fast(after=[0])).tokenizer  # the end is never read
    begun = fast()
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(["B", "$A"], special_tokens=[("B", 0)])
    assert load(TinyForCausalLM(), begun).tokenizer.encode("a").ids[0] == 0
    message = refusal(TinyForCausalLM(), fast(before=[0]))
    assert "Fast encodes 'a b' as [0, " in message
    assert "give the tokenizers.Tokenizer" in message


class PeftModel(TinyForCausalLM):
    def __init__(self, place):
        super().__init__({place.format(name): array for name, array in checkpoints.weights().items()})


WORDS = {str(word): word for word in range(len(checkpoints.VOCABULARY) + 1)}
REFUSED = {
    "no tokenizer": ((TinyForCausalLM(),), "load(model, tokenizer)"),
    "a str for one": ((TinyForCausalLM(), "float32"), "load(model, tokenizer)"),
    "a slow tokenizer": ((TinyForCausalLM(), Slow()), "use_fast=True"),
    "no tokenizer at all": ((TinyForCausalLM(), 3), "3 is not a tokenizer"),
    "a bigger tokenizer": (
        (TinyForCausalLM(), Tokenizer(models.WordLevel(WORDS, unk_token="0"))),
        "tokens, the embedding 263 rows; give the tokenizer that the model was trained with",
    ),
    "a name with a tokenizer": (("smollm2-135m", fast()), "has a tokenizer of its own"),
    "no model": ((3, fast()), "3: is not a model"),
    "a step": ((TinyForCausalLM(), fast(), "highest", 3), "step 3: a model in memory has no checkpoints"),
    "another architecture": ((TinyForCausalLM(model_type="bert"), fast()), "architecture 'bert' is not supported"),
    "an encoder": ((TinyForCausalLM(is_encoder_decoder=True), fast()), "give a causal language model"),
    "pruned heads": ((TinyForCausalLM(pruned_heads={0: [1]}), fast()), "pruned_heads: may change"),
    "quantised": (
        (TinyForCausalLM(quantization_config={"load_in_4bit": True}), fast()),
        "without quantization_config",
    ),
    "integers": (
        (TinyForCausalLM(replaced(UP, Tensor(np.ones((24, 16), np.int8)))), fast()),
        "up_proj.weight holds int8, not plain floats",
    ),
    "a subclass": ((TinyForCausalLM(replaced(UP, Subclass(np.ones((24, 16))))), fast()), "holds a Subclass"),
    "on no device": (
        (TinyForCausalLM(replaced(UP, Tensor(np.ones((24, 16)), device="meta"))), fast()),
        "up_proj.weight is on the meta device",
    ),
    "adapters": ((PeftModel("base_model.model.{}"), fast()), "merge_and_unload"),
    "adapters inside": (
        (TinyForCausalLM(checkpoints.weights() | {UP.replace("weight", "lora_A.weight"): np.ones((2, 2))}), fast()),
        "merge_and_unload",
    ),
    "no head": (
        (TinyForCausalLM(checkpoints.weights(tied=True), tie_word_embeddings=False), fast()),
        "lm_head.weight is missing; give the model as AutoModelForCausalLM makes it",
    ),
    "another head": (
        (TinyForCausalLM(checkpoints.weights() | {"score.weight": np.ones((2, 16))}), fast()),
        "score.weight is more than this architecture has; give the model as AutoModelForCausalLM makes it",
    ),
    "a wrong shape": ((TinyForCausalLM(replaced(UP, np.ones((23, 16)))), fast()), "has shape (23, 16)"),
    "NaN": ((TinyForCausalLM(replaced(UP, np.full((24, 16), np.nan))), fast()), "holds NaN or infinity"),
    "what cannot be read": (
        (TinyForCausalLM(replaced(UP, unreadable(np.ones((24, 16))))), fast()),
        "tensor model.layers.0.mlp.up_proj.weight cannot be read (out of memory)",
    ),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_model_with_its_tokenizer_is_refused_in_a_line(given, reason):
    assert reason in refusal(*given)


def test_a_failing_model_is_refused_in_a_line():
    def fail():
        raise RuntimeError("two\nlines")

    tiny = TinyForCausalLM()
    tiny.state_dict = fail
    assert "TinyForCausalLM: its config and tensors cannot be read (two lines)" in refusal(tiny, fast())


def test_a_compiled_model_is_the_model_inside_it():
    tiny = TinyForCausalLM()
    outer = types.SimpleNamespace(_orig_mod=tiny, config=tiny.config, state_dict=dict)
    assert load(outer, fast()).weights_hash == load(tiny, fast()).weights_hash


def test_the_check_at_load_is_of_models_in_memory_too(monkeypatch):
    monkeypatch.setattr("hydra_jax.weights.check.TOLERANCES", {("float32", "highest"): -1.0})
    assert refusal(TinyForCausalLM(), fast()).startswith("TinyForCausalLM: the writes do not sum")
