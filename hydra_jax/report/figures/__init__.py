"""A sweep as pictures, PNG and PDF. Effects are in logits of the target token, centred over the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hydra_jax.analysis.results import Results
from hydra_jax.report.figures import components, layers, motifs, prompts
from hydra_jax.report.figures.style import STYLE
from hydra_jax.store import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf")
FIT = 3
"""The fewest prompts from which there is something to regress."""


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
    if results.by_head:
        heads = heads or results
    else:
        drawn["effects_by_layer"] = lambda: layers.effects_by_layer(results)
    drawn["direct_against_total"] = lambda: prompts.direct_against_total(results)
    if examples is not None:
        drawn["single_prompts"] = lambda: prompts.single_prompts(examples)
    several = results.effects.sizes["prompt"] >= FIT
    if several:
        drawn["compensation_by_layer"] = lambda: prompts.compensation_by_layer(results)
    if several and not results.by_head:
        drawn["regression"] = lambda: layers.regression(results)
    drawn["compensation"] = lambda: components.compensation_matrix(results)
    if several:
        drawn["erasure"] = lambda: layers.erasure(results)
    if len(kinds) > 1:
        drawn["kinds"] = lambda: layers.kinds(kinds)
    if heads is not None:
        head_sweep = heads
        drawn["heads"] = lambda: components.heads(head_sweep)
    drawn["causal_motifs"] = motifs.causal_motifs
    return drawn


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
