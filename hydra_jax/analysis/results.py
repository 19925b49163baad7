"""A finished sweep with all that tables, figures and the report read off it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.findings import Finding, findings
from hydra_jax.core.edits import SITES, WHOLE, Component
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import variables


@dataclasses.dataclass(frozen=True)
class Results:
    """A sweep and its statistics.

    Attributes:
      effects: of the prompts that are finished.
      examples: single prompts with every replacement; None where they are not written yet.
      samples: bootstrap resamples.
      seed: of them.
    """

    effects: xr.Dataset
    examples: xr.Dataset | None = None
    samples: int = 1000
    seed: int = 0

    @functools.cached_property
    def protocol(self) -> dict[str, Any]:
        """What the sweep's results depend on."""
        return json.loads(self.effects.attrs["protocol"])

    @functools.cached_property
    def resampled(self) -> stats.Bootstrap:
        """The bootstrap behind every interval."""
        return stats.bootstrap(self.effects, self.samples, self.seed)

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """`stats.tabulate`."""
        return stats.tabulate(self.effects, self.resampled)

    @functools.cached_property
    def erasure(self) -> pd.DataFrame:
        """`stats.erasure`."""
        return stats.erasure(self.effects, self.resampled)

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """`findings.findings`."""
        return findings(self.effects, self.resampled, self.protocol["model"].get("dropout"))

    @functools.cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name, as they are written to files."""
        return {
            "summary": self.summary,
            "erasure": self.erasure,
            "findings": pd.DataFrame([dataclasses.asdict(finding) for finding in self.findings]),
        }

    @functools.cached_property
    def means(self) -> xr.Dataset:
        """Effects as means over replacements, (prompt, ablated)."""
        return self.effects[list(variables.EFFECTS)].mean("replacement")

    @property
    def kind(self) -> str:
        """Of ablation."""
        return self.protocol["ablation"]["kind"]

    @functools.cached_property
    def by_head(self) -> bool:
        """Whether single heads were ablated."""
        return bool((self.effects["ablated_head"] != WHOLE).any())

    @property
    def sites(self) -> list[str]:
        """The sites that were ablated."""
        return [site for site in SITES if (self.effects["ablated_site"] == site).any()]

    @property
    def caption(self) -> str:
        """Model, ablation and prompts in a few words."""
        left_out = self.effects.attrs.get("left_out", 0)
        return f"{self.protocol['model']['name']}, {self.kind} ablation, {self.effects.sizes['prompt']:,} prompts" + (
            f" ({left_out:,} more are not finite)" if left_out else ""
        )

    def ablated(self, site: str) -> np.ndarray:
        """Places along `ablated` of a site's ablations."""
        return np.flatnonzero(self.effects["ablated_site"].values == site)

    @functools.cached_property
    def ablated_names(self) -> list[str]:
        """What was ablated, as in "attn 3" or "attn 3 head 1"."""
        return self._names("ablated_layer", "ablated_site", "ablated_head")

    @functools.cached_property
    def component_names(self) -> list[str]:
        """Every component."""
        return self._names("layer", "site")

    def _names(self, *coordinates: str) -> list[str]:
        labels = zip(*(self.effects[coordinate].values for coordinate in coordinates), strict=True)
        return [str(Component.named(*label)) for label in labels]


def load(workdir: Path, samples: int = 1000, seed: int = 0) -> Results:
    """The results in a directory.

    Raises:
      UserError: if there is no sweep, or it cannot be read.
    """
    effects = store.load_effects(workdir)
    examples = store.open_examples(workdir).load() if (workdir / store.EXAMPLES).is_dir() else None
    return Results(effects, examples, samples, seed)


def beside(results: Results, others: Sequence[Results]) -> tuple[list[Results], Results | None]:
    """Sweeps of the same model beside one.

    Returns:
      The sweep and those of other ablation kinds, all cut to the prompts that all of them have; and the
      sweep of heads, None where there is none.

    Raises:
      UserError: if one is of another model, there are two of a kind, or they have no prompt in common.
    """
    kinds, heads = [results], results if results.by_head else None
    for each in others:
        if each.protocol["model"]["sha256"] != results.protocol["model"]["sha256"]:
            raise UserError(
                f"--also: a sweep of {each.protocol['model']['name']} beside one of"
                f" {results.protocol['model']['name']}; give sweeps of the same model"
            )
        if each.by_head and heads is None:
            heads = each
        elif not each.by_head and not results.by_head and each.kind not in {other.kind for other in kinds}:
            kinds.append(each)
        else:
            what = "heads" if each.by_head else f"{each.kind} ablation"
            raise UserError(f"--also: there are two sweeps of {what}; give one of each kind, and one of heads")
    ids = [set(each.effects["prompt_id"].values) for each in kinds]
    common = set.intersection(*ids)
    if not common:
        raise UserError("--also: the sweeps have no prompt in common; sweep the same prompts with each kind")
    if all(len(each) == len(common) for each in ids):
        return kinds, heads
    chosen = [[name in common for name in each.effects["prompt_id"].values] for each in kinds]
    return [
        dataclasses.replace(each, effects=each.effects.isel(prompt=np.flatnonzero(places)))
        for each, places in zip(kinds, chosen, strict=True)
    ], heads
