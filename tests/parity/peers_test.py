"""The comparison with other libraries, on tiny random models; what is not installed is left out or skipped."""

import dataclasses
import sys
from importlib import metadata

import numpy as np
import pytest

from hydra_jax.benchmarks import peers
from hydra_jax.benchmarks.peers import check_comparable, installed, measure, table
from hydra_jax.errors import UserError
from tests.helpers import models as toy_models

HOOKED, BRIDGE, HOOKS = peers.PEERS
SIZES = dict(length=6, rows=12, draws=3, step=3)


def only(monkeypatch, name):
    monkeypatch.setattr(peers, "PEERS", {name: peers.PEERS[name]})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "package"), [(HOOKED, "transformer_lens"), (BRIDGE, "transformer_lens"), (HOOKS, "transformers")]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_peer_of_the_same_weights_has_the_same_total_effects(monkeypatch, name, package, tied):
    pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
    pytest.importorskip(package, reason=f"{package} is not installed")
    if name == HOOKED and int(metadata.version(package).partition(".")[0]) > 3:
        pytest.skip("transformer_lens has no HookedTransformer since version 4")
    only(monkeypatch, name)
    params = toy_models.params(tied=tied, rope_base=500.0, norm_eps=1e-3)
    check_comparable(params.config)
    (peer,), missing = installed(params, context=SIZES["length"])
    assert not missing
    (compared,) = measure(params, [peer], **SIZES)
    assert compared.difference < 1e-4 < 0.1 < compared.total_effect
    assert min(compared.peer_interventions, compared.interventions) > 0
    assert compared.ratio == pytest.approx(compared.interventions / compared.peer_interventions)
    assert len(table([compared]).splitlines()) == 2


@pytest.mark.parametrize("worse", [0.01, np.nan])
def test_a_peer_with_other_effects_is_an_error(monkeypatch, worse):
    pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")
    only(monkeypatch, HOOKS)
    (peer,), _ = installed(toy_models.params(), context=SIZES["length"])

    def run(tokens, component, values):
        logits = peer.run(tokens, component, values)
        return logits * (1 + worse) if len(tokens) > 1 and component.layer == 3 else logits

    with pytest.raises(UserError, match=r"forward hooks, mlp 3: total effects differ from ours by .* logits"):
        measure(toy_models.params(), [dataclasses.replace(peer, run=run)], **SIZES)


def test_a_peer_that_is_missing_is_left_out_with_how_to_install_it(monkeypatch):
    pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    found, missing = installed(toy_models.params(), context=6)
    assert [peer.name for peer in found] == [HOOKS]
    assert [line.partition(":")[0] for line in missing] == [HOOKED, BRIDGE]
    assert missing[0].endswith('pip install "transformer_lens<4"')


def test_no_peer_at_all_is_an_error(monkeypatch):
    for package in ("torch", "transformers", "transformer_lens"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"--peers: none is installed; pip install .*transformer_lens"):
        installed(toy_models.params(), context=6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (toy_models.BLOCKS["llama 3"], "rope_factors"),
        (toy_models.BLOCKS["gpt-2"], "norm, gated"),
        (dict(dtype="bfloat16"), "dtype"),
    ],
    ids=str,
)
def test_a_model_that_peers_cannot_be_given_is_refused(changes, named):
    with pytest.raises(UserError, match=rf"--peers: takes a Llama .*{named}"):
        check_comparable(toy_models.config(**changes))
