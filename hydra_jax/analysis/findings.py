"""The paper's six findings, as tests of a sweep: each measured, with an interval, and given a verdict.

Every criterion is stated with its verdict, so that a reader who would draw the line elsewhere can.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import xarray as xr

from hydra_jax.analysis.bootstrap import Estimate, clearly_above_0, interval, ratio
from hydra_jax.analysis.names import ablated_names, is_set
from hydra_jax.analysis.stats import Resampled, erasure, finished, strongest_attention
from hydra_jax.core.edits import ATTN, MLP, SITES

HOLDS, WEAKLY, PARTLY, UNCLEAR, FAILS, UNTOLD = (
    *("holds", "holds weakly", "holds in part", "unclear", "does not hold", "cannot be told"),
)

FEWEST = 20
"""The fewest prompts from which a verdict is drawn."""

WORTH = 0.05
"""The share of a direct effect from which a repair is worth naming."""

LATE = 1 / 3
"""The share of the layers, counted from the last, that are late."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
      title: its name.
      claim: what the paper says about Chinchilla 7B.
      verdict: whether it holds in this sweep.
      measured: the numbers, in a sentence or two.
      criterion: the condition under which the verdict is that it holds.
    """

    title: str
    claim: str
    verdict: str
    measured: str
    criterion: str


def findings(effects: xr.Dataset, resampled: Resampled, dropout: float | None) -> list[Finding]:
    """Judge the six findings of the paper by a sweep.

    Args:
      effects: a sweep.
      resampled: its statistics.
      dropout: the rate that the model was trained with; None where it is not known.
    """
    sweep = _Sweep(finished(effects), resampled)
    judged = []
    for title, claim, criterion, judge in _CLAIMS:
        if effects.sizes["prompt"] < FEWEST:
            verdict, measured = UNTOLD, f"A verdict needs {FEWEST} prompts or more; here: {sweep.prompts}."
        elif not sweep.promoting.size:
            verdict, measured = UNTOLD, "No attention layer was ablated whose direct effect is clearly above zero."
        else:
            verdict, measured = judge(sweep)
        judged.append(Finding(title, claim, verdict, measured, criterion))
    return [*judged, _without_dropout([judged[0].verdict, judged[3].verdict], dropout)]


class _Sweep:
    """A sweep's statistics as the judges below ask for them."""

    def __init__(self, effects: xr.Dataset, resampled: Resampled):
        self.effects, self.resampled = effects, resampled
        self.prompts = effects.sizes["prompt"]
        self.layers = int(effects["layer"].max()) + 1
        self.first_late = self.layers - max(1, round(self.layers * LATE))
        self.ablated_layers = np.where(is_set(effects), -1, effects["ablated_layer"].values)  # sets are of no layer
        attention = np.flatnonzero(effects["ablated_site"].values == SITES[ATTN])
        above = clearly_above_0(resampled.samples["direct_effect"])
        self.promoting = attention[above[attention]]  # indices along `ablated`
        self.names = ablated_names(effects)
        self.noun = "heads" if (effects["ablated_head"].values >= 0).any() else "layers"

    def name(self, index: int) -> str:
        """The name of what was ablated, by its index along `ablated`."""
        return self.names[index]

    def statistic(self, name: str, index: int) -> Estimate:
        """One statistic of one ablated component."""
        return self.resampled.estimate(lambda statistics: statistics[name][..., index])

    def share(self, part: str, indices: np.ndarray) -> Estimate:
        """The share of several direct effects together that a part of the compensation restores."""
        return self.resampled.estimate(
            lambda s: ratio(s[f"{part}compensation"][..., indices].sum(-1), s["direct_effect"][..., indices].sum(-1))
        )


def _hydra(sweep: _Sweep) -> tuple[str, str]:
    indices = sweep.promoting
    parts = {name: sweep.share(part, indices) for part, name in _REPAIRERS.items()}
    by_attention = parts["downstream attention"]
    most = max(indices, key=lambda index: sweep.resampled.values["attn_compensation"][index])
    largest = sweep.statistic("attn_compensation", most)
    low, _ = interval(sweep.resampled.samples["attn_compensation"])
    values = sweep.resampled.values
    enough = values["attn_compensation"] >= WORTH * values["direct_effect"]
    repaired = [sweep.name(index) for index in indices if low[index] > 0 and enough[index]]
    verdict = _sign(by_attention, HOLDS if by_attention.value >= 0.1 else WEAKLY)
    if verdict != HOLDS and verdict != WEAKLY and repaired:
        verdict = PARTLY
    restored = ", ".join(f"{name} {share.text('{:.0%}')}" for name, share in parts.items())
    return verdict, (
        f"Of the {len(indices)} ablated attention {sweep.noun} whose direct effect is clearly above zero, this"
        f" share of it is restored: {restored}; together {sweep.share('', indices).text('{:.0%}')}. Below zero, it is"
        " made worse. Downstream attention clearly repairs"
        f" {', '.join(repaired) or 'none of them'}; it does most after {sweep.name(most)}:"
        f" {largest.text('{:+.2f}')} logits."
    )


_REPAIRERS = {"attn_": "downstream attention", "mlp_": "downstream MLPs", "norm_": "the final norm"}


def _erasure(sweep: _Sweep) -> tuple[str, str]:
    effects, resampled = sweep.effects, sweep.resampled
    late = np.flatnonzero((effects["site"].values == SITES[MLP]) & (effects["layer"].values >= sweep.first_late))
    clean = _sum(*resampled.mean(effects["delta_unembed"].values[:, late]))
    strongest = strongest_attention(resampled, effects, 3)
    change = _sum(*resampled.mean(effects["compensation"].values[:, strongest][:, :, late].mean(axis=1)))
    table = erasure(effects, resampled, 0)
    down = table[(table["layer"] >= sweep.first_late) & (table["delta_unembed_high"] < 0)]
    holds = [clean.high < 0, change.low > 0]
    verdict = HOLDS if all(holds) else PARTLY if any(holds) or len(down) else FAILS
    named = ", ".join(f"MLP {layer}" for layer in down["layer"]) or "none"
    ablated = ", ".join(sweep.name(index) for index in strongest)
    return verdict, (
        f"MLPs {sweep.first_late} to {sweep.layers - 1} together add {clean.text('{:+.2f}')} logits to the target"
        f" (clearly pushing it down: {named}). With {ablated} ablated, one at a time, that sum changes by"
        f" {change.text('{:+.2f}')} on average."
    )


def _disagreement(sweep: _Sweep) -> tuple[str, str]:
    # Without an interval's worth of ablated layers on both sides there is nothing to compare.
    layers, fits = sweep.ablated_layers, np.isfinite(sweep.resampled.values["total_r2"])
    last = layers >= sweep.layers - max(1, sweep.layers // 4)
    first = (layers >= 0) & ~last
    if not (last.any() and first.any()):
        return UNTOLD, "The sweep did not ablate both late and earlier layers."
    if not ((last & fits).any() and (first & fits).any()):
        return UNTOLD, "Contributions or total effects are the same in all prompts, so they have no R²."
    late = sweep.resampled.estimate(lambda s: _mean_of_known(s["total_r2"][..., last]))
    early = sweep.resampled.estimate(lambda s: _mean_of_known(s["total_r2"][..., first]))
    more = sweep.resampled.estimate(
        lambda s: _mean_of_known(s["total_r2"][..., last]) - _mean_of_known(s["total_r2"][..., first])
    )
    verdict = _sign(more, HOLDS if late.value >= 0.5 else WEAKLY)
    return verdict, (
        "R² over prompts between what a component contributes (delta_unembed) and what its ablation costs (total"
        f" effect), averaged over components: {late.text()} in the last quarter of the layers,"
        f" {early.text()} before; the difference is {more.text('{:+.2f}')}."
    )


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Return means over the last axis of what is no NaN; NaN where there is nothing."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def _linear(sweep: _Sweep) -> tuple[str, str]:
    values = sweep.resampled.values
    repaired = [index for index in sweep.promoting if values["slope"][index] > 0 and np.isfinite(values["r2"][index])]
    if not repaired:
        return FAILS, "In no ablated attention layer does compensation grow with the direct effect."
    best = max(repaired, key=lambda index: values["r2"][index])
    r2, slope = sweep.statistic("r2", best), sweep.statistic("slope", best)
    restored = sweep.statistic("restored_share", best)
    fits = r2.low >= 0.5
    verdict = HOLDS if fits and slope.high < 1 else PARTLY if fits or r2.value >= 0.5 else FAILS
    return verdict, (
        f"Compensation is closest to linear after {sweep.name(best)}: R² {r2.text()}, slope {slope.text()}, with"
        f" {restored.text('{:.0%}')} restored. It grows with the direct effect in {len(repaired)} of"
        f" {len(sweep.promoting)} {sweep.noun} whose direct effect is clearly above zero."
    )


def _loose(sweep: _Sweep) -> tuple[str, str]:
    downstream = (sweep.effects["compensation"].values != 0).any(axis=0).sum(axis=1)
    indices = sweep.promoting[downstream[sweep.promoting] > 3]
    if not indices.size:
        return UNTOLD, "Too few components are downstream of those that were ablated."
    share = sweep.resampled.estimate(lambda s: (s["responders"][..., indices] / downstream[indices]).mean(-1))
    sharing = sweep.resampled.estimate(lambda s: s["participation_ratio"][..., indices].mean(-1))
    verdict = HOLDS if share.high < 0.25 else FAILS if share.low > 0.25 else UNCLEAR
    return verdict, (
        f"After ablation of attention, {share.text('{:.0%}')} of the components downstream move by more than a tenth"
        f" of the direct effect in the median prompt, averaged over {len(indices)} {sweep.noun} with more than"
        f" three components downstream; the movement is shared by {sharing.text('{:.1f}')} (participation ratio)."
    )


def _without_dropout(repair: list[str], dropout: float | None) -> Finding:
    if dropout is None:
        verdict, measured = UNTOLD, "It is not known with what dropout this model was trained."
    elif dropout > 0:
        verdict, measured = UNTOLD, f"This model was trained with dropout ({dropout:g})."
    else:
        verdict = next((v for v in (HOLDS, WEAKLY, PARTLY) if v in repair), UNTOLD)
        measured = "This model was trained without dropout, so whatever it repairs it repairs without dropout."
    return Finding(
        "Without dropout",
        "None of this needs a model that was trained with dropout.",
        verdict,
        measured,
        "the first or fourth finding holds in a model known to be trained without dropout (matched models would say"
        " more)",
    )


def _sign(estimate: Estimate, above: str) -> str:
    """Judge by the side of zero that an interval lies on: `above`, below, or unclear."""
    return above if estimate.low > 0 else FAILS if estimate.high < 0 else UNCLEAR


def _sum(value: np.ndarray, samples: np.ndarray) -> Estimate:
    return Estimate.resampled(value.sum(), samples.sum(axis=1))


_CLAIMS = (
    (
        "The Hydra effect",
        "Attention layers downstream take over part of an ablated attention layer's work.",
        "the share restored by downstream attention is clearly above zero and a tenth or more (weakly: less than a"
        " tenth; in part: not for all together, but a twentieth or more for single layers)",
        _hydra,
    ),
    (
        "Erasure",
        "Late MLP layers push the most likely token down, and push less once it has been weakened.",
        "the late third of the MLPs together push the target down, and less so with attention ablated;"
        " in part: one of the two, or single MLPs that do",
        _erasure,
    ),
    (
        "Direct and total effect disagree",
        "What a layer contributes and what is lost when it is ablated agree only in the last layers.",
        "their R² over prompts is clearly larger in the last quarter of the layers, and 0.5 or more there"
        " (weakly: less than 0.5)",
        _disagreement,
    ),
    (
        "Compensation is close to linear",
        "Compensation grows linearly with the direct effect: R² up to 0.92, slope below one, about 70 % restored.",
        "in the attention layer with the best fit, R² is clearly 0.5 or more and the slope is between zero and one",
        _linear,
    ),
    (
        "Loose coupling",
        "An ablation moves few of the layers downstream.",
        "clearly fewer than a quarter of the components downstream respond",
        _loose,
    ),
)
