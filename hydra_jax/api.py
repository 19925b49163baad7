"""The Python interface: a sweep in memory, one ablation of one prompt, and programs of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr

from hydra_jax.config import HEADS, TOP, AblationConfig, sweep_config
from hydra_jax.core import programs
from hydra_jax.core.edits import SITES, WHOLE, Component, Kind
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.core.programs import Program, Word, checked, known
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer, left
from hydra_jax.errors import UserError, shown
from hydra_jax.parsing import one_of
from hydra_jax.store import effects as store
from hydra_jax.store import variables
from hydra_jax.sweep import interventions
from hydra_jax.sweep.ablations import ablate_each
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.chunks import fill, frame, variable_sizes
from hydra_jax.sweep.clean import CleanPass, choose
from hydra_jax.sweep.interventions import LAYERS, METRICS, Question
from hydra_jax.sweep.plan import Item, Plan, asked, facts_beside, itemise
from hydra_jax.sweep.protocol import protocol
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.padding import padded_length
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.model import Model


def sweep(
    model: Model,
    prompts: Iterable[str | Prompt] | None = None,
    *,
    kind: str = "resample",
    replacements: int = 15,
    sites: str = "attn,mlp",
    layers: str = "all",
    edges: bool = True,
    correct_only: bool = False,
    limit: int = 0,
    seed: int = 0,
    rows: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Ablate every chosen component in every prompt, in memory.

    Args:
      model: from `load`.
      prompts: texts or `Prompt`s; None for the built-in facts.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, drawn for each ablation where the kind is random.
      sites: "attn", "mlp", "attn,mlp", or "heads" for each attention head by itself.
      layers: "all", or e.g. "0,5,10-14".
      edges: also compute direct edges, at about the cost of the rest.
      correct_only: keep only prompts whose answer the model gives.
      limit: the most prompts to sweep; 0 for all.
      seed: of every draw.
      rows: rows of a block, moved at once; 0 for the device's default.
      progress: whether to show bars.

    Returns:
      The dataset that `python -m launch.sweep` stores: effects over (prompt, ablated, replacement).

    Raises:
      UserError: if an argument is out of range or a prompt cannot be swept.
    """
    config = sweep_config(
        {
            "model": model.name,
            "dtype": model.config.dtype,
            "precision": model.config.precision,
            "prompts": {"correct_only": correct_only, "limit": limit},
            "ablation": {
                "kind": kind,
                "replacements": replacements,
                "sites": sites,
                "layers": layers,
                "edges": edges,
            },
            "seed": seed,
            "rows": rows,
        }
    )
    chosen = prompt_sets.builtin() if prompts is None else prompt_sets.as_prompts(prompts)
    clean = _clean_pass(model, config.ablation, rows, progress)
    kept, _ = choose(clean, itemise(model, chosen), config.prompts, seed)
    plan = Plan.build(model, clean.bank, clean.sizer, config, kept)
    dataset = variables.in_memory(frame(plan), variable_sizes(plan, len(kept)), config.ablation.options)
    dataset.attrs = store.protocol_attributes(protocol(config, model, chosen))

    def write(chunk: slice, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            dataset[name][chunk] = array
        dataset["finished"][chunk] = True

    longest = padded_length(len(kept[-1].tokens), model.config.context)
    fill(plan, evenly(len(kept), clean.sizer.chunk(longest)), write, progress)
    return dataset


def ablate(
    model: Model,
    prompt: str,
    site: str,
    layer: int | None = None,
    head: int | None = None,
    *,
    kind: str = "resample",
    replacements: int = 15,
    sources: Iterable[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Ablate one component in one prompt.

    Args:
      model: from `load`.
      prompt: the text; its last token is where the ablation takes place.
      site: the component, as in "attn 23", "mlp 29" or, for one head, "attn 23.4"; or "attn" or "mlp" alone, with
        `layer` and `head` beside it.
      layer: its layer, where `site` does not say it.
      head: one head of attention, to ablate its share alone; None for all of the write.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, where the kind is random.
      sources: other prompts, for replacements, means and deviations; None draws 64 of the built-in ones.
      seed: of every draw.

    Returns:
      A dataset of (replacement, component): `compensation` and the contributions `delta_unembed`
      (clean) and `ablated_unembed`, labelled by `layer` and `site`, and the effects over (replacement).

    Raises:
      UserError: if an argument is out of range.
    """
    component = _component(model, site, layer, head)
    sites = SITES[component.site] if component.head == WHOLE else HEADS
    ablation = {"kind": kind, "replacements": replacements, "sites": sites, "edges": False}
    config = sweep_config({"ablation": ablation, "seed": seed})
    if not (config.ablation.kind.needs_sources or config.ablation.kind.needs_statistics):
        others: list[str] = []
    elif sources is None:
        others = [fact.text for fact in facts_beside(prompt, replacements, seed)]
    else:
        others = [text for text in dict.fromkeys(sources) if text != prompt]
    items = itemise(model, prompt_sets.as_prompts([prompt, *others]))
    clean = _clean_pass(model, config.ablation)
    with clean.bar(len(items)) as bar:
        clean.run(items, bar)
    plan = Plan.build(model, clean.bank, clean.sizer, config, items[:1], items)
    return ablate_each(plan, [(0, component)])[0]


def program(
    model: Model,
    clamp: Iterable[str] = (),
    freeze: Iterable[str] = (),
    probe: Iterable[str] = (),
    follow: Iterable[str] = (),
    rest: str = "follow",
) -> Program:
    """Return a program: what each component of the model does in an intervened run.

    To ablate a set is to clamp each of it; to hold a repairer still is to freeze it; `rest="probe"` gives direct
    edges, and `rest="freeze"` with `follow` the path through those that follow.

    Args:
      model: from `load`.
      clamp: components that are set to a value: "attn 23", "mlp 29", or for a head "attn 23.4".
      freeze: components that write what they write in the clean run; "norm" for the final norm's divisor.
      probe: attention or MLPs that write this, too, and of which is recorded what they would have changed.
      follow: attention or MLPs that go on computing, where `rest` is another word.
      rest: "follow", "freeze" or "probe", the word of every attention and MLP that is not named. The final norm follows
        unless it is frozen by name.

    Raises:
      UserError: if a name is not one of the model's components, or is named twice.
    """
    word = Word[one_of("rest", rest, ("follow", "freeze", "probe")).upper()]
    return programs.program(model.config, clamp, freeze, probe, follow, word)


def intervene(
    model: Model,
    prompts: str | Iterable[str | Prompt],
    programs: Mapping[str, Program],
    *,
    kind: str = "resample",
    replacements: int = 15,
    sources: Iterable[str | Prompt] | None = None,
    positions: str | Sequence[Sequence[int]] = "last",
    target: str | int | Mapping[int, float] = "top",
    foil: str | int | None = None,
    metrics: Sequence[str] = (),
    responders: str = "layers",
    seed: int = 0,
    rows: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Run programs in every prompt, in memory.

    Args:
      model: from `load`.
      prompts: texts or `Prompt`s, or one text.
      programs: each from `program`, by a name of one's own.
      kind: "resample", "mean", "zero" or "noise": the values that clamped components take.
      replacements: R, drawn for each program where the kind is random: the same in all of them.
      sources: other prompts that values are drawn from; None for the prompts themselves or, where they are too few,
        for built-in facts.
      positions: the tokens after which a text is read: "last", "all", or for each prompt a list of places, from 0.
      target: what is read: "top", the logit of the most likely next token of each reading's clean run; another token,
        by its text (" Paris") or id; or weights by id, of a linear combination of logits. Always centred, less the
        mean over the vocabulary.
      foil: a token, by its text or id, whose logit is subtracted.
      metrics: any of "log_probability" of the (first) target, "divergence", "rank", which is 0 where the target is the
        most likely token, and "top_changed": all of the intervened run.
      responders: "layers", or "heads" to record what each head of attention changes, too. Where a program clamps or
        freezes heads of a layer, that layer's heads are left at 0.
      seed: of every draw.
      rows: rows of a block, moved at once; 0 for the device's default.
      progress: whether to show bars.

    Returns:
      A dataset over (prompt, program, reading, replacement): the effects, and `change`, what each component that
      follows or is probed adds to what is read (0 for those that are clamped, whose part is `direct_effect`).

    Raises:
      UserError: if an argument is out of range or a prompt cannot be read.
    """
    asked_kind = Kind(one_of("kind", kind, tuple(known.value for known in Kind)))
    config = AblationConfig(asked_kind, replacements)
    chosen = [prompts] if isinstance(prompts, str) else list(prompts)
    items = itemise(model, prompt_sets.as_prompts(chosen))
    if not isinstance(programs, Mapping):
        raise UserError('programs: have no names; give them as in {"cut": hj.program(model, clamp=["attn 23"])}')
    if not items or not programs:
        raise UserError(f"{'programs' if items else 'prompts'}: there are none; give one or more")
    metrics = [metrics] if isinstance(metrics, str) else metrics
    for name in metrics:
        one_of("metrics", name, METRICS)
    if sources is not None:
        others = prompt_sets.as_prompts(dict.fromkeys(sources))
    elif len(items) > config.draws or asked_kind is Kind.ZERO:
        others = [item.prompt for item in items]
    else:
        others = facts_beside(items[0].prompt.text, config.draws, seed)
    question = Question(
        programs={name: checked(model.config, one) for name, one in programs.items()},
        kind=asked_kind,
        draws=config.draws,
        **_contrast(model, target, foil),
        metrics=tuple(metrics),
        responders=one_of("responders", responders, (LAYERS, HEADS)),
        seed=seed,
        rows=rows,
    )
    places = _places(items, positions)
    return interventions.intervene(model, question, items, itemise(model, others), places, progress)


def _contrast(model: Model, target: str | int | Mapping[int, float], foil: str | int | None) -> dict[str, np.ndarray]:
    """Return the tokens and weights of what is read."""
    if isinstance(target, Mapping):
        weights: dict[int, float] = dict(target)
    else:
        weights = {MOST_LIKELY if target == TOP else _token(model, "target", target): 1.0}
    if foil is not None:
        other = _token(model, "foil", foil)
        weights[other] = weights.get(other, 0.0) - 1.0
    wrong = [token for token in weights if token != MOST_LIKELY and not 0 <= token < model.config.vocab_size]
    if wrong or not weights:
        raise UserError(
            f"target: {wrong[0] if wrong else 'nothing'} is no token of {model.name}; give ids from 0 to"
            f" {model.config.vocab_size - 1}"
        )
    return {"tokens": np.array(list(weights)), "weights": np.array(list(weights.values()))}


def _token(model: Model, argument: str, token: str | int) -> int:
    """Return the id of a token that is given by its text or id."""
    if not isinstance(token, str):
        return int(token)
    ids = model.tokenizer.encode(token, add_special_tokens=False).ids
    if len(ids) != 1:
        raise UserError(
            f"{argument}: {shown(token)} is {len(ids)} tokens of {model.name}, not one; give one, as ' Paris', or an id"
        )
    return ids[0]


def _places(items: Sequence[Item], positions: str | Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens after which each prompt is read."""
    if isinstance(positions, str):
        everywhere = one_of("positions", positions, ("last", "all")) == "all"
        return [list(range(len(item.tokens)))[0 if everywhere else -1 :] for item in items]
    if not all(isinstance(places, Sequence) for places in positions):
        raise UserError("positions: are not lists; give a list of places for each prompt, as in [[0, 3], [2]]")
    if len(positions) != len(items):
        raise UserError(f"positions: are given for {len(positions)} prompts of {len(items)}; give a list for each")
    for item, places in zip(items, positions, strict=True):
        wrong = [place for place in places if not 0 <= place < len(item.tokens)]
        if wrong or not len(places):
            raise UserError(
                f"positions: prompt {item.prompt.name} has tokens 0-{len(item.tokens) - 1},"
                f" not {wrong[0] if wrong else 'none'}; give places among them"
            )
    return [[int(place) for place in places] for places in positions]


def _clean_pass(model: Model, ablation: AblationConfig, rows: int = 0, progress: bool = False) -> CleanPass:
    """Return a clean pass in memory, by this process alone, on the devices that the model is on."""
    mesh = meshes.mesh_of(model.params)
    wanted = asked(ablation, model.config, rows, model.layers.streamed)
    sizer = BatchSizer(model.config, mesh, wanted, left(model.memory, model.config, mesh, model.layers.streamed))
    return CleanPass(model, ablation, sizer, Bank(model.config.dtype), Cluster(0, 1), progress)


def _component(model: Model, site: str, layer: int | None, head: int | None) -> Component:
    """Return the component that `ablate` is asked for, one of the model's."""
    if layer is None:
        component = Component.parse(site)
        if component.head != WHOLE and head is not None:
            raise UserError(f"component {site!r}: names a head, and so does head={head}; give one of the two")
    elif site in SITES:
        component = Component(layer, SITES.index(site))
    else:
        raise UserError(
            f"site {shown(site)}: is not attn or mlp; give one of the two, or e.g. 'attn 23' without a layer"
        )
    if head is not None:
        component = dataclasses.replace(component, head=head)
    return known(model.config, component)
