"""Ablations of a plan's prompts: in batches on the device, chunk by chunk into labelled arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from hydra_jax import store
from hydra_jax.edits import SITES, WHOLE, Component, WriteStatistics, all_components, replacement
from hydra_jax.effects import Effects, effects
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params
from hydra_jax.plan import CleanRow, Plan, batch_of, prefill_batch
from hydra_jax.prefill import Clean
from hydra_jax.replay import direct_edges, replay


@functools.partial(jax.jit, static_argnames=("kind", "edges"))
def ablate_batch(
    params: Params,
    clean: Clean,
    component: tuple[jax.Array, jax.Array, jax.Array | None],
    kind: str,
    sources: jax.Array,
    statistics: WriteStatistics,
    keys: jax.Array,
    edges: bool = False,
) -> tuple[Effects, jax.Array | None]:
    """The effects of ablating one component in P prompts, R times each, and its direct edges [P, R, L, 2].

    Args:
      params: the model.
      clean: of P prompts.
      component: layer [], site [] and, where one head is ablated, head []; else None.
      kind: of ablation.
      sources: [P, R, E], the component's writes (or what the head mixed) in the replacements' prompts.
      statistics: of the component over the prompt set.
      keys: [P], each prompt's.
      edges: whether to compute the direct edges; else they are None.
    """
    layer, site, head = component

    def change(clean: Clean, source: jax.Array, key: jax.Array) -> jax.Array:
        new = replacement(kind, source, statistics, key)
        if head is None:
            return new - clean.writes[layer, site]
        return transformer.head_delta(params, layer, head, clean.mixed[layer], new)

    def prompt(clean: Clean, sources: jax.Array, key: jax.Array) -> tuple[Effects, jax.Array | None]:
        def edit(source: jax.Array, key: jax.Array) -> tuple[Effects, jax.Array | None]:
            delta = change(clean, source, key)
            found = effects(clean, delta, replay(params, clean, (layer, site), delta))
            return found, direct_edges(params, clean, (layer, site), delta) if edges else None

        own = jax.random.fold_in(key, 2 * layer + site)
        draws = jax.random.split(own if head is None else jax.random.fold_in(own, head), sources.shape[0])
        return jax.vmap(edit)(sources, draws)

    return jax.vmap(prompt)(clean, sources, keys)


def ablate_chunk(
    plan: Plan, chunk: slice, size: int, components: Iterable[Component]
) -> Iterator[tuple[Effects, np.ndarray | None]]:
    """The effects and direct edges of every ablation in one chunk's prompts: arrays [prompts, R, ...] a component.

    Args:
      plan: the sweep.
      chunk: which of its prompts.
      size: what the chunk is filled up to, so that all of a sweep's chunks share a compilation.
      components: which are ablated.

    Raises:
      UserError: if the identity of `effects` fails in a prompt.
    """
    rows = plan.rows[chunk]
    places = np.minimum(np.arange(chunk.start, chunk.start + size), chunk.stop - 1)
    tokens, lengths = batch_of([row.item for row in rows], size, plan.model.config.context)
    targets = jnp.asarray([plan.rows[place].target for place in places])
    clean = prefill_batch(plan.model.params, tokens, lengths, targets)
    nothing = np.zeros((size, plan.ablation.draws, plan.ablatable.shape[-1]), np.float32)
    for component in components:
        of = plan.unit(component)
        sources = plan.ablatable[plan.sources[places], of] if plan.ablation.kind == "resample" else nothing
        statistics = WriteStatistics(*(each[of] for each in plan.statistics))
        head = None if component.head == WHOLE else jnp.int32(component.head)
        where = jnp.int32(component.layer), jnp.int32(component.site), head
        keys = plan.keys[places]
        found = jax.device_get(
            ablate_batch(
                plan.model.params, clean, where, plan.ablation.kind, sources, statistics, keys, plan.ablation.edges
            )
        )
        found = jax.tree.map(lambda array: array[: len(rows)], found)
        _check_identity(plan, rows, component, found[0].residual)
        yield found


def _check_identity(plan: Plan, rows: Sequence[CleanRow], component: Component, residual: np.ndarray) -> None:
    worst = np.abs(residual).max(axis=1)
    wrong = np.flatnonzero(~(worst <= plan.tolerance))  # NaN is wrong too
    if wrong.size:
        raise UserError(
            f"prompt {rows[wrong[0]].item.prompt.name}, {component}: total effect is not direct effect less"
            f" compensation, by {worst[wrong[0]]:.2g} logits (more than {plan.tolerance:g}); the activations overflow"
            " or lose precision: use float32 and precision=highest, or raise identity_tolerance"
        )


def fill(
    plan: Plan, finished: np.ndarray, write: Callable[[slice, dict[str, np.ndarray]], None], progress: bool
) -> None:
    """Compute every chunk that is not finished [P], handing each one's effect variables to `write`."""
    draws = plan.ablation.draws
    each = len(plan.components) * draws
    # Early layers cost more than late ones: first and last in turn keep the bar's ETA true.
    turns = sorted(range(len(plan.components)), key=lambda i: (min(i, len(plan.components) - 1 - i), i))
    bar = tqdm(
        total=each * len(plan.rows),
        initial=each * int(finished.sum()),
        desc=f"{plan.ablation.kind} ablation",
        unit=" interventions",
        unit_scale=True,
        smoothing=0,
        disable=not progress,
    )
    with bar:
        for chunk in plan.chunks:
            if finished[chunk].all():
                continue
            shape = len(plan.rows[chunk]), len(plan.components)
            columns = {name: np.empty((*shape, draws), np.float32) for name in store.EFFECTS}
            for name in store.BY_COMPONENT if plan.ablation.edges else ("compensation",):
                columns[name] = np.empty((*shape, plan.model.config.components), np.float32)
            components = [plan.components[turn] for turn in turns]
            chunks = ablate_chunk(plan, chunk, plan.chunks[0].stop, components)
            for turn, (found, edges) in zip(turns, chunks, strict=True):
                for name in store.EFFECTS:
                    columns[name][:, turn] = getattr(found, name)
                columns["compensation"][:, turn] = found.compensation.mean(axis=1).reshape(shape[0], -1)
                if edges is not None:
                    columns["direct_edge"][:, turn] = edges.mean(axis=1).reshape(shape[0], -1)
                bar.update(shape[0] * draws)
            write(chunk, columns)


def frame(plan: Plan) -> xr.Dataset:
    """The result's coordinates and clean-run variables, effects still NaN."""
    items = [row.item for row in plan.rows]
    prompts: dict[str, list] = {
        "prompt_id": plan.ids,
        "text": [item.prompt.text for item in items],
        "relation": [item.prompt.relation for item in items],
        "answer_text": [item.prompt.answer for item in items],
        "target_id": [row.target for row in plan.rows],
        "target_text": [plan.model.tokenizer.decode([row.target]) for row in plan.rows],
        "length": [len(item.tokens) for item in items],
    }
    names = ("clean_logit", "clean_probability", "final_scale", "delta_unembed")
    clean = {name: np.array([getattr(row, name) for row in plan.rows], np.float32) for name in names}
    own = "head_unembed" if plan.ablation.by_head else "delta_unembed"
    units = [plan.unit(component) for component in plan.components]
    clean["ablated_delta_unembed"] = np.stack([getattr(row, own)[units] for row in plan.rows])
    # Places in the bank are places in the store only where the two are the same prompts.
    source = plan.sources if len(plan.bank) == len(plan.rows) else np.full_like(plan.sources, -1)
    return store.frame(prompts, plan.components, plan.model.config.layers, clean, source, plan.ablation.edges)


def ablate_one(plan: Plan, place: int, component: Component) -> xr.Dataset:
    """Everything about one ablation in one prompt: a dataset of (replacement, component)."""
    ((found, _),) = ablate_chunk(plan, slice(place, place + 1), 1, [component])
    found = jax.tree.map(lambda array: array[0], found)
    row = plan.rows[place]
    compensation = found.compensation.reshape(len(found.compensation), -1)
    # The ablated component's own change is its direct effect: it is not among the compensations.
    ablated = row.delta_unembed + compensation
    ablated[:, component.place] -= found.direct_effect
    return xr.Dataset(
        {
            "delta_unembed": ("component", row.delta_unembed, {"long_name": "contribution, clean run"}),
            "ablated_unembed": (("replacement", "component"), ablated, {"long_name": "contribution, ablated run"}),
            "compensation": (("replacement", "component"), compensation),
            **{name: ("replacement", getattr(found, name)) for name in store.EFFECTS},
        },
        store.labels("component", all_components(plan.model.config.layers)),
        {
            "prompt_id": row.item.prompt.id,
            "text": row.item.prompt.text,
            "target_text": plan.model.tokenizer.decode([row.target]),
            "clean_logit": row.clean_logit,
            "clean_probability": row.clean_probability,
            "ablated_layer": component.layer,
            "ablated_site": SITES[component.site],
            "ablated_head": component.head,
            "kind": plan.ablation.kind,
            "units": store.LOGITS,
        },
    )
