"""The page of sweeps that ask for more than the usual: pictures, words, columns, commands and examples."""

import re

import numpy as np
import pytest

from hydra_jax.analysis.results import Results
from hydra_jax.errors import UserError
from hydra_jax.report import figures, payload, tables
from hydra_jax.report import page as report
from tests.helpers import effects as toy_effects


def test_the_page_holds_figures_of_what_only_some_sweeps_ask_for():
    effects = toy_effects.rich()
    text = report.page(Results(effects, samples=10))
    alts = re.findall('class="picture" alt="([^"]*)"', text)
    assert len(alts) == len(figures.OPTIONAL)
    assert "Bars of 7 ablations; attn 1 + attn 3 has the largest total effect" in alts[0]
    words = re.findall("<dt>([^<]*)</dt>", text)
    assert {"KL", "interaction", "woken", "cascade", "frozen", "position", "set", "free total effect"} <= set(words)
    assert '<th scope="col">KL</th>' in text
    assert "at 24 positions of 6 texts" in text
    assert "less those of a foil" in text
    plain = report.page(Results(toy_effects.effects(np.ones((3, 2, 1), np.float32), 0), samples=5))
    assert 'class="picture"' not in plain
    assert not {"KL", "woken", "set", "position"} & set(re.findall("<dt>([^<]*)</dt>", plain))
    assert "at the last token of 3 prompts" in plain


def test_the_command_of_a_sweep_names_what_was_asked():
    protocol = toy_effects.protocol(toy_effects.rich(prompts=4))
    protocol["ablation"] |= {"components": "attn 1, mlp 2", "freeze": "norm", "interactions": True, "cascade": 3}
    protocol["ablation"] |= {"paired": False, "match": ""}
    protocol["readout"] = {"target": "answer", "foil": "auto", "metrics": "kl,rank", "responders": "heads"}
    protocol["prompts"] |= {"positions": "every", "correct_only": True}
    command = report._command(protocol)
    for setting in (
        "ablation.components='attn 1, mlp 2'",
        "ablation.freeze=norm",
        "ablation.interactions=True",
        "ablation.cascade=3",
        "readout.target=answer",
        "readout.metrics=kl,rank",
        "readout.responders=heads",
        "prompts.positions=every",
    ):
        assert f"--config.{setting} " in command + " "
    for absent in ("sites", "layers", "paired", "match", "foil", "correct_only"):
        assert absent not in command


def examples_of(effects, ablated):
    """The examples of a sweep: its first prompt with one ablation."""
    one = effects.isel(prompt=[0], ablated=ablated).rename(prompt="example")
    one["ablated_unembed"] = (one["delta_unembed"] + one["compensation"]).expand_dims(replacement=2, axis=1)
    return one.assign_attrs(kind="resample")


@pytest.mark.parametrize("labelled", [True, False])
def test_examples_of_single_components_and_of_several(tmp_path, labelled):
    effects = toy_effects.rich(prompts=5, positions=1, replacements=2)
    for ablated, name in ((0, "attn 1"), (3, "attn 1 + mlp 2")):
        examples = examples_of(effects, ablated)
        if not labelled and name == "attn 1":
            examples = examples.drop_vars("ablated_name")  # older ones lack it
        shown = Results(effects, examples, samples=5)
        assert f"ablation of {name}, the {'attention layer' if ablated == 0 else 'components'} of" in tables.one_prompt(
            shown
        )
        assert payload.payload(shown, (), None)["examples"][0]["ablated"] == ablated
        figures.save(tmp_path, "single", figures.figures_of(shown)["single_prompts"])
    with pytest.raises(UserError, match="run the sweep again"):
        tables.one_prompt(Results(effects, examples_of(effects, 0).isel(example=[]), samples=5))
