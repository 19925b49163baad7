"""A sweep's inputs: which prompts are examined and kept, which others are drawn from, and what is read of each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from hydra_jax.config import SweepConfig
from hydra_jax.core.edits import Component, check_enough
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer
from hydra_jax.errors import UserError
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.clean import CleanPass, choose
from hydra_jax.sweep.draws import Pool, few
from hydra_jax.sweep.items import Item, counterfactuals, facts_beside, itemise, places_from
from hydra_jax.sweep.plan import Plan, kept
from hydra_jax.sweep.protocol import Given
from hydra_jax.sweep.readout import Readout
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A sweep's inputs, checked.

    Attributes:
      config: the settings; `ablation.replacements` no more than there are sources.
      model: the model.
      items: the prompts that are examined.
      sources: other prompts that replacements come from; None where they are those swept, or each prompt's own.
      readout: what is read of each prompt.
      components: those whose values are kept.
    """

    config: SweepConfig
    model: Model
    items: Sequence[Item]
    sources: Sequence[Item] | None
    readout: Readout
    components: Sequence[Component]

    @classmethod
    def of(cls, config: SweepConfig, model: Model, prompts: Sequence[Prompt], given: Given | None = None) -> Inputs:
        """Return the inputs of a sweep; whatever is wrong with them is found here, before anything is computed.

        Args:
          config: the settings.
          model: the model.
          prompts: those to examine.
          given: what Python gives in place of settings.

        Raises:
          UserError: if a prompt, position, token, component or source cannot be what it is.
        """
        components = kept(config.ablation, model.config)
        asked = given or Given(model, prompts)
        positions = places_from(config.prompts.positions) if asked.positions is None else asked.positions
        items = itemise(model, prompts, positions)
        target = config.readout.target if asked.target is None else asked.target
        foil = config.readout.foil if asked.foil is None else asked.foil
        readout = Readout(model, items, target, foil)
        ablation = config.ablation
        others = asked.sources
        if others is None and config.prompts.text:
            others = facts_beside(config.prompts.text, ablation.draws, config.seed)
        if ablation.paired:
            if others is not None and not config.prompts.text:
                raise UserError("sources: are not drawn from where prompts are paired; give one of the two")
            others = None
            counterfactuals(model, items)  # refused now, not after the clean pass
        sources = None if others is None else itemise(model, others)
        if asked.sources is not None and sources is not None and not ablation.match:
            draws = few(Pool(sources, ablation.match), items, ablation)
            config = dataclasses.replace(config, ablation=dataclasses.replace(ablation, replacements=draws))
        elif ablation.kind.needs_sources and not ablation.paired and not ablation.match:
            check_enough(len(items) if sources is None else len(sources) + 1, ablation.draws)
        return cls(config, model, items, sources, readout, components)

    def clean_pass(self, sizer: BatchSizer, bank: Bank, cluster: Cluster, progress: bool = False) -> CleanPass:
        """Return the maker of the clean runs."""
        return CleanPass(self.model, self.config.ablation.kind, self.components, sizer, bank, cluster, progress)

    def choose(self, clean: CleanPass) -> tuple[list[Item], list[Item]]:
        """Return the prompts that are swept, and all that were examined to find them: see `clean.choose`.

        Of prompts that are matched those are left out that have too few alike to draw from.

        Raises:
          UserError: if none is left.
        """
        chosen, examined = choose(clean, self.items, self.config.prompts, self.config.seed)
        ablation = self.config.ablation
        if not ablation.match:
            return chosen, examined
        pool = Pool(chosen if self.sources is None else self.sources, ablation.match)
        matched = [item for item in chosen if pool.others(item) >= ablation.draws]
        if not matched:
            raise UserError(
                f"config.ablation.match: no prompt has {ablation.draws} others of its {ablation.match} to draw from;"
                " lower ablation.replacements, or give more prompts alike"
            )
        if left_out := len(chosen) - len(matched):
            print(
                f"{left_out:,} of {len(chosen):,} prompts have too few others of their {ablation.match} to draw"
                f" {ablation.draws} replacements from, and are left out",
                file=sys.stderr,
            )
        return matched, examined

    def plan(self, clean: CleanPass, chosen: Sequence[Item], tokens: np.ndarray | None = None) -> Plan:
        """Return the plan of a sweep, making the clean runs that it still wants.

        Args:
          clean: has made those of the chosen prompts.
          chosen: the prompts that are swept.
          tokens: [P, 2], their targets and foils; None for what the clean runs say.

        Raises:
          UserError: if a prompt's target is its foil.
        """
        pool = counterfactuals(self.model, chosen) if self.config.ablation.paired else self.sources
        wanted = [*chosen, *(pool or [])]
        with clean.bar(len(wanted)) as bar:
            clean.run(wanted, bar)
        tokens = self.readout.tokens(chosen, clean.bank) if tokens is None else tokens
        return Plan.build(self.model, clean.bank, clean.sizer, self.config, chosen, tokens, pool)
