"""The result store: one zarr group that `xarray.open_zarr` reads, written chunk by chunk.

A chunk is a run of prompts. Its effects are written first and its `finished` flags last, so whatever
stops a run, the prompts that are flagged are whole and the others are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from hydra_jax.edits import SITES, Component, all_components
from hydra_jax.errors import UserError

NAME = "effects.zarr"
EXAMPLES = "examples.zarr"

LOGITS = "logits"
EFFECTS = {
    "total_effect": "drop of the target's centred logit under the ablation",
    "direct_effect": "drop if only the direct path were cut",
    "attn_compensation": "repair by downstream attention",
    "mlp_compensation": "repair by downstream MLPs",
    "norm_compensation": "repair by the final norm's rescaling",
}
"""The variables of (prompt, ablated, replacement), and what they mean."""

BY_COMPONENT = {
    "compensation": "change of a component's contribution, mean over replacements",
    "direct_edge": "the same where it alone sees the edit, all between frozen",
}
"""The variables of (prompt, ablated, component), and what they mean; `direct_edge` where it was asked for."""

CLEAN = ("clean_logit", "clean_probability", "final_scale", "delta_unembed", "ablated_delta_unembed")
"""The variables of the clean run."""

DIMS = dict.fromkeys(EFFECTS, ("prompt", "ablated", "replacement"))
DIMS |= dict.fromkeys(BY_COMPONENT, ("prompt", "ablated", "component"))
"""Dimensions of what a chunk writes."""

FORMAT = 2
"""Of the store; it changes whenever an older store could not be read as if it were new."""


def labels(dim: str, components: Sequence[Component], prefix: str = "") -> dict[str, Any]:
    """Coordinates `layer` and `site` along `dim`, their names prefixed."""
    # Fixed-width strings have no place in zarr's specification; objects become variable-length ones.
    sites = np.array([SITES[c.site] for c in components], dtype=object)
    return {f"{prefix}layer": (dim, np.array([c.layer for c in components])), f"{prefix}site": (dim, sites)}


def frame(
    prompts: Mapping[str, Sequence[Any]],
    ablated: Sequence[Component],
    layers: int,
    clean: Mapping[str, np.ndarray],
    source: np.ndarray,
    edges: bool,
) -> xr.Dataset:
    """A dataset with every coordinate and clean-run variable, its effects still NaN.

    Args:
      prompts: columns of P values: `prompt_id`, `text`, `relation`, `answer_text`, `target_id`,
        `target_text`, `length`.
      ablated: the components to be ablated.
      layers: L; the components that respond are all 2L.
      clean: `clean_logit`, `clean_probability`, `final_scale` [P], `delta_unembed` [P, 2L] and, of what is
        ablated, `ablated_delta_unembed` [P, A].
      source: [P, R], the position in this dataset of each replacement's prompt; -1 where there is none.
      edges: whether there are direct edges.
    """
    rows, replacements = source.shape
    every = all_components(layers)
    text = {"prompt_id", "text", "relation", "answer_text", "target_text"}
    coordinates = {
        name: ("prompt", np.asarray(values, dtype=object if name in text else np.int64))
        for name, values in prompts.items()
    }
    coordinates |= {
        **labels("ablated", ablated, "ablated_"),
        "ablated_head": ("ablated", np.array([c.head for c in ablated])),
        **labels("component", every),
    }
    units = {"units": LOGITS}
    sizes = {"prompt": rows, "ablated": len(ablated), "replacement": replacements, "component": len(every)}
    variables: dict[str, Any] = {
        "clean_logit": ("prompt", clean["clean_logit"], units | {"long_name": "centred logit of the target"}),
        "clean_probability": ("prompt", clean["clean_probability"], {"long_name": "probability of the target"}),
        "final_scale": ("prompt", clean["final_scale"], {"long_name": "the final norm's divisor"}),
        "delta_unembed": (
            ("prompt", "component"),
            clean["delta_unembed"],
            units | {"long_name": "direct contribution to the target's centred logit"},
        ),
        "ablated_delta_unembed": (
            ("prompt", "ablated"),
            clean["ablated_delta_unembed"],
            units | {"long_name": "the same of what is ablated, a single head where heads are"},
        ),
        "source": (("prompt", "replacement"), source, {"long_name": "position of the replacement's prompt; -1: none"}),
        "finished": ("prompt", np.zeros(rows, bool), {"long_name": "whether the prompt's effects are computed"}),
    }
    for name, meaning in (EFFECTS | BY_COMPONENT).items():
        if name == "direct_edge" and not edges:
            continue
        unknown = np.broadcast_to(np.float32(np.nan), [sizes[d] for d in DIMS[name]])
        variables[name] = (DIMS[name], unknown, units | {"long_name": meaning})
    return xr.Dataset(variables, coordinates)


@contextlib.contextmanager
def directory(workdir: Path) -> Iterator[None]:
    """A directory to write results into, made if need be, and unmade if nothing came to be in it.

    Raises:
      UserError: for whatever the file system refuses, then or later.
    """
    missing: list[Path] = []
    try:
        missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir}: is a file; give another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):  # before hours of work, not after
            pass
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or workdir}: {error.strerror or error}; free the disk or give another --workdir"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # there are results in it
                path.rmdir()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until this is done: zarr works in threads of its own, which would go on writing behind it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def exists(workdir: Path) -> bool:
    """Whether there is a store in `workdir`."""
    return (workdir / NAME).is_dir()


def create(
    workdir: Path, dataset: xr.Dataset, chunk: int, beside: Mapping[str, Callable[[Path], object]] | None = None
) -> None:
    """Write a dataset as a new store, or nothing at all.

    Args:
      workdir: the directory that holds the store.
      dataset: from `frame`, its attributes set.
      chunk: prompts a chunk, the unit in which effects will be written.
      beside: files of `workdir` by name, and what writes them; where the store is, they are.
    """
    encoding = {
        name: {"chunks": tuple(chunk if d == "prompt" else n for d, n in variable.sizes.items())}
        for name, variable in dataset.variables.items()
    }
    with _undisturbed(), _whole(workdir / NAME) as part:
        dataset.to_zarr(part, mode="w-", encoding=encoding, zarr_format=3, consolidated=False)
        for name, each in (beside or {}).items():
            write_whole(workdir / name, each)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` only once all is written."""
    part = path.with_name(f"{path.name}.part")
    _remove(part)
    try:
        yield part
        _remove(path)
        part.rename(path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file or directory, which becomes `path` only once all of it is there."""
    with _whole(path) as part:
        write(part)


def has_examples(workdir: Path, prompt_id: str) -> bool:
    """Whether examples are there, among them the prompt that is asked for ("" asks for none in particular)."""
    path = workdir / EXAMPLES
    return path.is_dir() and (not prompt_id or prompt_id in open_examples(workdir)["prompt_id"].values)


def open_examples(workdir: str | Path) -> xr.Dataset:
    """Single prompts' ablations, every replacement of each: (example, replacement, component).

    Raises:
      UserError: if they are not there or cannot be read.
    """
    return _open(Path(workdir) / EXAMPLES)


def write_examples(workdir: Path, dataset: xr.Dataset) -> None:
    """Write the examples, or nothing at all."""
    with _undisturbed(), _whole(workdir / EXAMPLES) as part:
        dataset.to_zarr(part, mode="w-", zarr_format=3, consolidated=False)


def write(workdir: Path, chunk: slice, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the effects of one run of prompts (see `DIMS`), then its flags."""
    effects = xr.Dataset({name: (DIMS[name], array) for name, array in arrays.items()})
    flags = xr.Dataset({"finished": ("prompt", np.ones(effects.sizes["prompt"], bool))})
    with _undisturbed():
        for part in (effects, flags):
            part.to_zarr(workdir / NAME, region={"prompt": chunk}, consolidated=False)


def seal(workdir: Path) -> None:
    """Gather the metadata of a finished store in one place, so that opening it reads one file."""
    with _undisturbed(), warnings.catch_warnings():
        # That it is not in zarr's specification yet is no matter: without it, readers take the long way.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(str(workdir / NAME))


def open_effects(workdir: str | Path) -> xr.Dataset:
    """The effects of a sweep, finished or not (see `finished`).

    Raises:
      UserError: if there is no store, or it cannot be read.
    """
    path = Path(workdir) / NAME
    dataset = _open(path)
    if "protocol" not in dataset.attrs or "format" not in dataset.attrs:
        raise UserError(f"{path}: is not a result store of this version of hydra_jax; sweep into another --workdir")
    if dataset.attrs["format"] != FORMAT:
        raise UserError(
            f"{path}: is of format {dataset.attrs['format']}, this version reads {FORMAT}; sweep into another --workdir"
        )
    return dataset


def load_effects(workdir: str | Path) -> xr.Dataset:
    """A sweep's finished prompts, in memory, checked to be whole.

    Raises:
      UserError: if there is no store, it cannot be read, none of it is finished, or parts of it are missing.
    """
    path = Path(workdir) / NAME
    effects = open_effects(workdir)
    try:
        finished = np.flatnonzero(effects["finished"].values)
        if finished.size:
            effects = effects.isel(prompt=finished).load()
        holes = [name for name in (*DIMS, *CLEAN) if name in effects and np.isnan(effects[name].values).any()]
    except Exception as error:
        raise _unreadable(path, error) from error
    if not finished.size:
        raise UserError(f"{path}: none of its prompts is finished; go on with the sweep first")
    missing = [name for name in (*EFFECTS, *CLEAN, "compensation") if name not in effects]
    if missing or holes:
        raise UserError(f"{path}: {(missing + holes)[0]} is missing or has holes; delete the store and sweep again")
    return effects


def _open(path: Path) -> xr.Dataset:
    if not path.is_dir():
        raise UserError(f"{path}: is not there; run `python -m launch.sweep --workdir={path.parent}` first")
    try:
        with _undisturbed():
            return xr.open_zarr(path, consolidated=False, chunks=None)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    """Whatever zarr and its codecs raise of a damaged store, in one line."""
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); delete it and sweep again")


def protocol_attributes(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol as a store's attributes: JSON, its SHA-256, and the store's format."""
    text = json.dumps(protocol, sort_keys=True)
    return {"protocol": text, "protocol_sha256": hashlib.sha256(text.encode()).hexdigest(), "format": FORMAT}


def check_protocol(dataset: xr.Dataset, protocol: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with results of another protocol.

    Raises:
      UserError: if the store's protocol differs, with every setting that does.
    """
    differing = differences(json.loads(dataset.attrs.get("protocol", "{}")), protocol)
    if differing:
        raise UserError(
            f"{where}: holds results of another protocol ({differing}); give another --workdir, or delete this one"
        )


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In words, where two trees of settings differ; "" where they do not."""
    was, now = _flat(stored), _flat(asked)
    return "; ".join(
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
