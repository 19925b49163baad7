"""A finished sweep and everything that tables, figures and the page show of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import cascades, interactions, names, positions, stats
from hydra_jax.analysis.bootstrap import Bootstrap
from hydra_jax.analysis.findings import Finding, findings
from hydra_jax.core.edits import SITES, WHOLE
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import variables


@dataclasses.dataclass(frozen=True)
class Results:
    """A sweep and its statistics.

    Attributes:
      effects: the effects of the finished prompts.
      examples: single prompts with every replacement; None where they are not written yet.
      samples: the number of bootstrap resamples.
      seed: of the resamples.
      select: the share of prompts by which each ablation is also judged, those of its largest direct effects.
    """

    effects: xr.Dataset
    examples: xr.Dataset | None = None
    samples: int = 1000
    seed: int = 0
    select: float | None = None

    @functools.cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that the sweep's results depend on."""
        return stats.protocol(self.effects)

    @functools.cached_property
    def resampled(self) -> stats.Resampled:
        """The sweep's statistics and their resamples, which every interval comes from."""
        return stats.bootstrap(self.effects, self.samples, self.seed)

    @property
    def draws(self) -> Bootstrap | None:
        """The prompts that resamples draw; None where there are no ablations, only cascades."""
        return self.resampled.draws if self.effects.sizes["ablated"] else None

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """The table of `stats.tabulate`."""
        return stats.tabulate(self.effects, self.resampled)

    @functools.cached_property
    def erasure(self) -> pd.DataFrame:
        """The table of `stats.erasure`."""
        return stats.erasure(self.effects, self.resampled)

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """The findings and their verdicts."""
        return findings(self.effects, self.resampled, self.protocol["model"].get("dropout"))

    @functools.cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name, as written to files."""
        tables = {
            "summary": self.summary,
            "erasure": self.erasure,
            "findings": pd.DataFrame([dataclasses.asdict(finding) for finding in self.findings]),
        }
        if self.select is not None:
            tables["selected"] = stats.selected(self.effects, self.resampled, self.select)
        if self.interactions is not None:
            tables["interactions"] = self.interactions
        if self.cascade is not None:
            tables |= {"cascade": self.cascade, "cascade_steps": cascades.cascade_steps(self.effects)}
        if self.positions is not None:
            tables["positions"] = self.positions
        return tables

    @functools.cached_property
    def interactions(self) -> pd.DataFrame | None:
        """The table of `interactions.interaction_table`; None without pairs."""
        has_pairs = bool(interactions.pairs(self.effects))
        return interactions.interaction_table(self.effects, self.resampled) if has_pairs else None

    @functools.cached_property
    def cascade(self) -> pd.DataFrame | None:
        """The table of `cascades.cascade`; None without cascades."""
        has_cascades = cascades.has_cascades(self.effects)
        return cascades.cascade(self.effects, self.draws, self.samples, self.seed) if has_cascades else None

    @functools.cached_property
    def positions(self) -> pd.DataFrame | None:
        """The table of `positions.by_position`; None where each text was read at one position."""
        has_positions = positions.has_positions(self.effects)
        return positions.by_position(self.effects, self.resampled) if has_positions else None

    @functools.cached_property
    def means(self) -> xr.Dataset:
        """Effects as means over replacements, (prompt, ablated)."""
        return self.effects[list(variables.EFFECTS)].mean("replacement")

    @property
    def kind(self) -> str:
        """The kind of ablation."""
        return self.protocol["ablation"]["kind"]

    @property
    def unit(self) -> str:
        """The quantity that effects are drops of, in a few words."""
        return "logits of the target less the foil's" if self.has_foils else "logits of the target token"

    @property
    def has_foils(self) -> bool:
        """Whether what is read is a difference of logits, in some prompt at least."""
        foils = self.effects.coords.get("foil_id")
        return foils is not None and bool((foils >= 0).any())

    @functools.cached_property
    def by_head(self) -> bool:
        """Whether single heads were ablated."""
        return bool((self.effects["ablated_head"] != WHOLE).any())

    @property
    def sites(self) -> list[str]:
        """The sites of which single components were ablated."""
        return [site for site in SITES if (self.effects["ablated_site"] == site).any()]

    @property
    def caption(self) -> str:
        """Model, ablation and prompts in a few words."""
        left_out = self.effects.attrs.get("left_out", 0)
        return f"{self.protocol['model']['name']}, {self.kind} ablation, {self.prompts}" + (
            f" ({left_out:,} more are not finite)" if left_out else ""
        )

    @property
    def prompts(self) -> str:
        """The number of prompts, or of positions and of texts, in words."""
        count = self.effects.sizes["prompt"]
        if not positions.has_positions(self.effects):
            return f"{count:,} prompt" + ("s" if count != 1 else "")
        texts = len(set(self.effects["text_id"].values.tolist()))
        return f"{count:,} positions of {texts:,} text" + ("s" if texts != 1 else "")

    def ablated(self, site: str) -> np.ndarray:
        """Return the indices along `ablated` of a site's ablations; those of several components have the site SET."""
        return np.flatnonzero(self.effects["ablated_site"].values == site)

    @functools.cached_property
    def ablated_names(self) -> list[str]:
        """The names of what was ablated, as in "attn 3", "attn 3.1" or "attn 3 + mlp 5"."""
        return names.ablated_names(self.effects)

    @property
    def has_sets(self) -> bool:
        """Whether several components were ablated together."""
        return bool(names.is_set(self.effects).any())

    @functools.cached_property
    def component_names(self) -> list[str]:
        """The names of every component."""
        return names.component_names(self.effects)


def load(workdir: Path, samples: int = 1000, seed: int = 0, select: float | None = None) -> Results:
    """Load the results in a directory; `samples`, `seed` and `select` as in `Results`.

    Raises:
      UserError: if there is no sweep, or it cannot be read.
    """
    effects = store.load_effects(workdir)
    return Results(effects, examples_in(workdir), samples, seed, select)


def examples_in(workdir: Path) -> xr.Dataset | None:
    """Load the examples in a directory; None where there are none.

    Raises:
      UserError: if they cannot be read.
    """
    return store.open_examples(workdir).load() if (workdir / store.EXAMPLES).is_dir() else None


def beside(results: Results, others: Sequence[Results]) -> tuple[list[Results], Results | None]:
    """Sort other sweeps of the same model by what they show beside one.

    Returns:
      The sweep and those of other ablation kinds, all cut to the prompts that they have in common; and the
      sweep of heads, or None.

    Raises:
      UserError: if a sweep is of another model, two are of a kind, or they have no prompt in common.
    """
    kinds, heads = [results], results if results.by_head else None
    for other in others:
        if other.protocol["model"]["sha256"] != results.protocol["model"]["sha256"]:
            raise UserError(
                f"--also: a sweep of {other.protocol['model']['name']} beside one of"
                f" {results.protocol['model']['name']}; give sweeps of the same model"
            )
        if other.by_head and heads is None:
            heads = other
        elif not other.by_head and not results.by_head and other.kind not in {sweep.kind for sweep in kinds}:
            kinds.append(other)
        else:
            what = "heads" if other.by_head else f"{other.kind} ablation"
            raise UserError(f"--also: there are two sweeps of {what}; give one of each kind, and one of heads")
    prompt_ids = [sweep.effects["prompt_id"].values for sweep in kinds]
    common = set.intersection(*map(set, prompt_ids))
    if not common:
        raise UserError("--also: the sweeps have no prompt in common; sweep the same prompts with each kind")
    if all(len(set(ids)) == len(common) for ids in prompt_ids):
        return kinds, heads
    return [
        dataclasses.replace(
            sweep, effects=sweep.effects.isel(prompt=np.flatnonzero([prompt_id in common for prompt_id in ids]))
        )
        for sweep, ids in zip(kinds, prompt_ids, strict=True)
    ], heads
