"""A sweep as a person reads it: tables, figures and the page; computes no statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr


def report(
    dataset: xr.Dataset, directory: str | Path, bootstrap: int = 1000, seed: int = 0, select: float | None = None
) -> Path:
    """Write the tables, figures and page of a sweep in memory, and its store where none is there.

    Args:
      dataset: a sweep, or a selection of one; only its finished prompts are used.
      directory: the directory that they go into; made if it is not there.
      bootstrap: resamples behind each interval.
      seed: of the resamples.
      select: a share of the prompts, for the table `selected`.

    Returns:
      The path of the page.

    Raises:
      UserError: if the directory has the store of another sweep, the dataset is not a sweep's, or the file system
        refuses anything.
    """
    # Imported here: whoever imports a module of this folder has this file run first.
    from hydra_jax.analysis import results, stats
    from hydra_jax.report import page
    from hydra_jax.store import datasets, effects, files

    directory = Path(directory)
    whole = datasets.checked(dataset, "dataset")
    if effects.exists(directory):
        datasets.check_same(whole, directory)
    examples = results.examples_in(directory) if effects.exists(directory) else None
    shown = results.Results(stats.finished(whole), examples, bootstrap, seed, select)
    with files.directory(directory):
        paths = page.write(directory, shown)
        if not effects.exists(directory):
            datasets.save(whole, directory)
    return paths[-1]
