import dataclasses

import pytest

from configs import train
from hydra_jax.errors import UserError
from hydra_jax.sweep.cost import parameters
from hydra_jax.training.config import TrainConfig, train_config

REFUSED = [
    ({"nonsense": 1}, r"config\.nonsense: is not a setting"),
    ({"dropout": {"attention": 0.1}}, r"config\.dropout\.attention: is not a setting; did you mean 'attn'"),
    ({"dropout": {"attn": 1.0}}, r"config\.dropout\.attn: is 1\.0; give a rate from 0 to below 1"),
    ({"dropout": {"depth": -0.1}}, r"config\.dropout\.depth: is -0\.1"),
    ({"model": {"heads": 3}}, r"config\.model\.width: 128 does not divide into 3 heads"),
    ({"model": {"kv_heads": 3}}, r"config\.model: model config: 4 query heads cannot share 3"),
    ({"model": {"layers": 0}}, r"config\.model\.layers: is 0; give 1 or more"),
    ({"accumulate": 3}, r"config\.batch: 32 does not divide into config\.accumulate=3"),
    ({"checkpoint": {"keep_every": 150}}, r"config\.checkpoint\.keep_every: 150 is not a multiple"),
    ({"optimizer": {"learning_rate": 0.0}}, r"config\.optimizer\.learning_rate: is 0\.0"),
    ({"data": {"kind": "texts"}}, r"config\.data\.kind: 'texts' is unknown; did you mean 'text'"),
    ({"data": {"holdout": 1.0}}, r"config\.data\.holdout: is 1\.0"),
    ({"arm": "../elsewhere"}, r"config\.arm: is '\.\./elsewhere'"),
    ({"dropout": {"attn": 0.1}}, r"config\.dropout: is not 0, in the arm no_dropout"),
    ({"data": {"path": "a.txt"}}, r"config\.data\.path: is not read"),
    ({"optimizer": {"beta2": 1.0}}, r"config\.optimizer\.beta2: is 1\.0"),
    ({"optimizer": {"weight_decay": -1.0}}, r"config\.optimizer\.weight_decay: is -1\.0"),
    ({"dtype": "float16"}, r"config\.dtype: 'float16' is unknown"),
    ({"steps": "many"}, r"config\.steps: 'many' is not of type int"),
]


@pytest.mark.parametrize(("changes", "complaint"), REFUSED)
def test_refusals(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        train_config(changes)


def test_the_file_and_the_class_have_the_same_defaults():
    assert train_config(train.get_config()) == TrainConfig()


@pytest.mark.parametrize("preset", train.PRESETS)
def test_arms_differ_in_dropout_alone(preset):
    arms = [train_config(train.get_config(f"{arm},{preset}")) for arm in train.ARMS]
    assert len({dataclasses.astuple(arm.dropout) for arm in arms}) == 3
    same = [dataclasses.replace(arm, arm="same", dropout=arms[0].dropout) for arm in arms]
    assert same[0] == same[1] == same[2]
    assert {arm.preset for arm in arms} == {preset}


def test_base_has_about_125m_parameters():
    config = train_config(train.get_config("no_dropout,base"))
    assert 1.1e8 < parameters(config.decoder(config.data.vocab_size)) < 1.4e8


@pytest.mark.parametrize("name", ["nonsense", "dropout,nonsense"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="'nonsense' is none of"):
        train.get_config(name)
