import numpy as np
import pytest

from hydra_jax.analysis import findings
from hydra_jax.analysis.findings import FAILS, HOLDS, PARTLY, UNTOLD
from hydra_jax.analysis.stats import bootstrap
from tests.helpers import effects as toy_effects

LAYERS, PROMPTS = 8, 150


@pytest.fixture
def random():
    return np.random.default_rng(0)


def verdicts(effects, dropout=0.0):
    found = findings.findings(effects, bootstrap(effects, samples=100), dropout)
    assert len(found) == 6
    assert all(finding.measured.endswith(".") and "nan" not in finding.measured for finding in found)
    return [finding.verdict for finding in found]


def sweep(random, restored, prompts=PROMPTS):
    """Attention of every layer matters; `restored` of its direct effect comes back, all from downstream attention."""
    direct = random.normal(2, 0.5, (prompts, 2 * LAYERS, 2)).astype(np.float32)
    compensation = restored * direct + random.normal(0, 0.1, (prompts, 2 * LAYERS, 1)).astype(np.float32)
    return toy_effects.effects(direct, compensation)


def test_a_model_that_does_as_the_paper_says(random):
    effects = sweep(random, 0.7)
    for ablated in range(2 * LAYERS):
        effects["compensation"][:, ablated, ablated + 1 :] = 0.001
        effects["compensation"][:, ablated, ablated + 1 : ablated + 2] = 1.4  # one of many moves
    late = [2 * layer + 1 for layer in range(LAYERS - 3, LAYERS)]
    effects["delta_unembed"][:, late] = -1 + random.normal(0, 0.1, (PROMPTS, 3))
    effects["compensation"][:, :, late] = 0.15  # pushed down less, if by less than a tenth of the direct effect
    contributions = random.normal(0, 1, (PROMPTS, 2 * LAYERS)).astype(np.float32)
    total = effects["total_effect"].mean("replacement").values
    contributions[:, -4:] = total[:, -4:]
    effects["ablated_delta_unembed"][:] = contributions
    assert verdicts(effects) == [HOLDS] * 6


def test_a_model_that_does_not(random):
    effects = sweep(random, -0.5)  # made worse downstream
    for ablated in range(2 * LAYERS):
        effects["compensation"][:, ablated, ablated + 1 :] = -1.0
    effects["delta_unembed"][:] = 1
    effects["ablated_delta_unembed"][:] = effects["total_effect"].mean("replacement")
    effects["ablated_delta_unembed"][:, -4:] = random.normal(0, 1, (PROMPTS, 4))
    assert verdicts(effects) == [FAILS] * 5 + [UNTOLD]


def test_single_layers_can_be_repaired_where_all_together_are_not(random):
    effects = sweep(random, -0.5)
    effects["attn_compensation"][:, 4] = 0.5
    assert verdicts(effects)[0] == PARTLY


def test_dropout_is_judged_only_where_it_is_known(random):
    effects = sweep(random, 0.7)
    assert [verdicts(effects, dropout)[5] for dropout in (0.0, 0.1, None)] == [HOLDS, UNTOLD, UNTOLD]


@pytest.mark.slow
def test_few_prompts_get_no_verdict(random):
    assert verdicts(sweep(random, 0.7, prompts=5))[:5] == [UNTOLD] * 5


@pytest.mark.slow
def test_nothing_is_said_where_no_attention_was_ablated(random):
    effects = sweep(random, 0.7)
    assert verdicts(effects.isel(ablated=slice(1, None, 2)))[:5] == [UNTOLD] * 5
