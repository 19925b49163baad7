"""A sweep as pictures, PNG and PDF. Effects are in logits of the target token, centred over the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hydra_jax.analysis import cascades, interactions
from hydra_jax.analysis.names import is_whole
from hydra_jax.analysis.positions import has_positions
from hydra_jax.analysis.results import Results
from hydra_jax.analysis.stats import FIT, FREE_TOTAL
from hydra_jax.report.figures import cascade, components, layers, motifs, pairs, positions, prompts, sets
from hydra_jax.report.figures.style import STYLE
from hydra_jax.store import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf")


def figures_of(
    results: Results, kinds: Sequence[Results] = (), heads: Results | None = None
) -> dict[str, Callable[[], Figure]]:
    """Return every figure that there is to draw, by name, as a function that draws it.

    Args:
      results: a sweep.
      kinds: it and sweeps of other kinds on the same prompts.
      heads: a sweep of heads of the same model, if `results` is not one.
    """
    examples = results.examples
    drawn: dict[str, Callable[[], Figure]] = {}
    singles = bool(results.sites)
    by_layer = singles and not results.by_head
    if results.by_head:
        heads = heads or results
    if by_layer:
        drawn["effects_by_layer"] = lambda: layers.effects_by_layer(results)
    drawn["direct_against_total"] = lambda: prompts.direct_against_total(results)
    if examples is not None and examples.sizes["example"]:
        drawn["single_prompts"] = lambda: prompts.single_prompts(examples)
    several = results.effects.sizes["prompt"] >= FIT
    if several and singles:
        drawn["compensation_by_layer"] = lambda: prompts.compensation_by_layer(results)
    if several and by_layer:
        drawn["regression"] = lambda: layers.regression(results)
    drawn["compensation"] = lambda: components.compensation_matrix(results)
    if several:
        drawn["erasure"] = lambda: layers.erasure(results)
    drawn |= _where_there(results)
    if len(kinds) > 1 and singles:
        drawn["kinds"] = lambda: layers.kinds(kinds)
    if heads is not None:
        head_sweep = heads
        drawn["heads"] = lambda: components.heads(head_sweep)
    drawn["causal_motifs"] = motifs.causal_motifs
    return drawn


def _where_there(results: Results) -> dict[str, Callable[[], Figure]]:
    """The figures of what only some sweeps ask for."""
    drawn: dict[str, Callable[[], Figure]] = {}
    if results.has_sets or (results.by_head and is_whole(results.effects).any()):
        drawn["sets"] = lambda: sets.sets(results)
    if interactions.pairs(results.effects):
        drawn["interactions"] = lambda: pairs.interactions(results)
    if cascades.has_cascades(results.effects):
        drawn["cascade"] = lambda: cascade.cascade(results)
    if FREE_TOTAL in results.effects:
        drawn["frozen_against_free"] = lambda: sets.frozen_against_free(results)
    if "head_compensation" in results.effects:
        drawn["head_responders"] = lambda: components.head_responders(results)
    if has_positions(results.effects):
        drawn["positions"] = lambda: positions.positions(results)
    return drawn


OPTIONAL = ("sets", "interactions", "cascade", "frozen_against_free", "head_responders", "positions")
"""Names of the figures of what only some sweeps ask for."""


def draw(
    workdir: Path, results: Results, kinds: Sequence[Results] = (), heads: Results | None = None, progress: bool = False
) -> list[Path]:
    """Draw every figure of a sweep as PNG and PDF into `workdir`, and return the paths; arguments as `figures_of`."""
    paths: list[Path] = []
    for name, figure in tqdm(figures_of(results, kinds, heads).items(), desc="figures", disable=not progress):
        paths += save(workdir, name, figure)
    return paths


def save(workdir: Path, name: str, figure: Callable[[], Figure]) -> list[Path]:
    """Draw one figure as `name`.png and `name`.pdf into `workdir`, and return the paths."""
    import matplotlib as mpl

    paths = [workdir / f"{name}.{form}" for form in FORMATS]
    with mpl.rc_context(STYLE):
        drawn = figure()
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")  # laid out once, for both formats
        for form, path in zip(FORMATS, paths, strict=True):
            files.write_whole(path, functools.partial(drawn.savefig, format=form))
    return paths
