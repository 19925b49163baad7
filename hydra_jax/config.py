"""The settings of a sweep as frozen dataclasses, with every check that needs no model."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from hydra_jax.core.edits import ATTN, SITES, Ablation, Component, Kind, pairs
from hydra_jax.core.programs import NORM, ablation_of, components_of
from hydra_jax.errors import UserError, shown
from hydra_jax.limits import MOST, MOST_BOOTSTRAP, MOST_CUTS, MOST_REPLACEMENTS, MOST_SEED
from hydra_jax.models.config import AS_STORED, DTYPES, PRECISIONS, ModelConfig
from hydra_jax.parsing import one_of, parse
from hydra_jax.text import prompts as prompt_sets

SITES_DEFAULT = "attn,mlp"
"""All writes."""

LAST_STEP = -1
"""The step that stands for the last checkpoint that there is."""

HEADS, LAYERS = "heads", "layers"
METRICS = "log_probability", "kl", "rank", "top_changed"
EDGES, FREE, CASCADE = "edges", "free", "cascade"
"""Options of a result store beside HEADS and METRICS: more variables where they are asked for."""

RESPONDERS = LAYERS, HEADS
AUTO, TOP, ANSWER, FOIL = "auto", "top", "answer", "foil"
"""Words for tokens that are read: see `ReadoutConfig`."""
TARGETS = TOP, ANSWER
MATCHES = RELATION, LENGTH = "relation", "length"
LAST, ALL = "last", "all"
GIVEN = "given in Python"
"""The source of prompts that no file has."""


def _names(text: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """The prompts of a sweep.

    Attributes:
      kind: "records", one prompt a record; or "text", cut from ordinary text at random positions.
      path: a file that `prompts.read` knows, "" for the built-in facts; or any UTF-8 text.
      text: one prompt, swept by itself, whatever the rest says; replacements come from the built-in facts.
      correct_only: of records, keep those whose most likely next token begins the answer, as the paper does.
      limit: at most this many, picked by seed and id; 0 for all (of text, for 512).
      target: as `ReadoutConfig.target`, of which it is the older name: "top" or "answer".
      positions: the tokens after which prompts are read and ablated: "last", "all", places such as "3, -1" (negative
        ones from the end), or a substring of every text, whose last token is meant.
    """

    kind: str = "records"
    path: str = ""
    text: str = ""
    correct_only: bool = True
    limit: int = 0
    target: str = TOP
    positions: str = LAST

    @property
    def filtered(self) -> bool:
        """Whether prompts that are answered wrong are left out; text has nothing to be right about."""
        return self.correct_only and self.kind != "text" and not self.text and self.positions == LAST


@dataclasses.dataclass(frozen=True)
class ReadoutConfig:
    """The reading of a sweep.

    Attributes:
      target: the token whose logit is read: "top", the clean run's most likely next one; "answer", the prompt's own
        answer's first; the text of a token, such as " Paris"; or "auto", the answer of prompts that have a foil and
        an answer, else "top".
      foil: the token whose logit is subtracted: "foil", the prompt's own foil's first; the text of a token; "" for
        none; or "auto", the foil of prompts that have one.
      metrics: readings of the whole distribution besides: any of "log_probability, kl, rank, top_changed".
      responders: "layers", or "heads" to record what each attention head changes, too.
    """

    target: str = AUTO
    foil: str = AUTO
    metrics: str = ""
    responders: str = LAYERS

    def __post_init__(self) -> None:
        one_of("readout.responders", self.responders, RESPONDERS)
        for name in _names(self.metrics):
            one_of("readout.metrics", name, METRICS)

    @property
    def asked_metrics(self) -> tuple[str, ...]:
        """The metrics that are asked for, in the order of the store."""
        return tuple(name for name in METRICS if name in _names(self.metrics))


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """The ablations of a sweep.

    Attributes:
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, drawn for each ablation of a random kind (resample, noise).
      sites: "attn", "mlp", "attn,mlp", or "heads" for each attention head by itself.
      layers: "all", or numbers and ranges, as in "0,5,10-14".
      edges: also compute direct edges, at about the cost of the rest.
      components: names of what is ablated, in place of sites and layers, as in "attn 23, mlp 29, attn 23.4, layer 5";
        those joined by "+" are ablated together.
      freeze: names of components that write what they write in the clean run, in every ablation; "norm" for the final
        norm's divisor.
      paired: each prompt's replacement is its own counterfactual, its `source`.
      match: "relation" or "length" to draw replacements only from prompts alike; "" for all.
      interactions: also every pair of what is ablated, together.
      cascade: cuts, one after another: the strongest attention, then what repaired most, and so on; 0 for none.
    """

    kind: Kind = Kind.RESAMPLE
    replacements: int = 15
    sites: str = SITES_DEFAULT
    layers: str = ALL
    edges: bool = True
    components: str = ""
    freeze: str = ""
    paired: bool = False
    match: str = ""
    interactions: bool = False
    cascade: int = 0

    def __post_init__(self) -> None:
        # Python callers give kinds by name, as the commands do.
        object.__setattr__(self, "kind", Kind(one_of("ablation.kind", self.kind, tuple(kind.value for kind in Kind))))
        if self.match:
            one_of("ablation.match", self.match, MATCHES)
        if (self.paired or self.match) and not self.kind.needs_sources:
            raise UserError(
                f"config.ablation.{'paired' if self.paired else 'match'}: says whose writes are taken, a {self.kind}"
                f" ablation takes nobody's; set kind={Kind.RESAMPLE}"
            )
        if self.paired and self.match:
            raise UserError("config.ablation.match: nothing is drawn where prompts are paired; give one of the two")
        if self.components and (self.sites != SITES_DEFAULT or self.layers != ALL):
            raise UserError(
                "config.ablation.components: says what is ablated, and so do sites and layers; give one of the two"
            )

    @property
    def draws(self) -> int:
        """R, the replacements that are computed: one where all of them would be the same."""
        return self.replacements if self.kind.draws and not self.paired else 1

    @property
    def variants(self) -> tuple[str, ...]:
        """The programs of each ablation: "" for itself, and options of the store that have one of their own."""
        return ("", *([EDGES] if self.edges else []), *([FREE] if self.freeze else []))

    @property
    def by_head(self) -> bool:
        """Whether single heads are ablated, not whole writes."""
        return self.sites == HEADS

    def ablations(self, model: ModelConfig) -> list[Ablation]:
        """Return what is ablated in a model: in forward order, or as `components` names it.

        Raises:
          UserError: if a component is not one of the model's, or is named twice, or both ablated and frozen.
        """
        frozen = self.frozen(model)
        if self.components:
            try:
                found = [ablation_of(model, name) for name in self.components.split(",")]
            except UserError as error:
                raise UserError(f"config.ablation.components: {error}") from error
            for ablation in found:
                if clash := [one for one in ablation.components if any(map(one.overlaps, frozen))]:
                    raise UserError(
                        f"config.ablation.freeze: {clash[0]} is both ablated and frozen; leave it out of one of them"
                    )
        else:
            found = [Ablation.of(c) for c in self._everywhere(model) if not any(map(c.overlaps, frozen))]
        if self.interactions:
            if len(found) < 2:
                raise UserError("config.ablation.interactions: are of two components or more; name others")
            found += pairs(found)
        twice = [str(one) for one, count in collections.Counter(found).items() if count > 1]
        if twice:
            raise UserError(f"config.ablation.components: {twice[0]} is named twice; name it once")
        if not found:
            raise UserError("config.ablation.freeze: freezes all that would be ablated; leave something free")
        return found

    def frozen(self, model: ModelConfig) -> set[Component]:
        """Return the components of a model that are frozen, but for the final norm.

        Raises:
          UserError: if one is not the model's, or is named twice.
        """
        found: list[Component] = []
        try:
            for name in _names(self.freeze):
                found += [] if name == NORM else components_of(model, name)
        except UserError as error:
            raise UserError(f"config.ablation.freeze: {error}") from error
        twice = [str(other) for one, other in itertools.combinations(found, 2) if one.overlaps(other)]
        twice += [NORM] if _names(self.freeze).count(NORM) > 1 else []
        if twice:
            raise UserError(f"config.ablation.freeze: {twice[0]} is named twice; name it once")
        return set(found)

    @property
    def frozen_names(self) -> list[str]:
        """The names that `freeze` gives."""
        return _names(self.freeze)

    def _everywhere(self, model: ModelConfig) -> list[Component]:
        """Return the components of all `sites` of all `layers`."""
        for name in ("sites", "layers"):
            if not isinstance(getattr(self, name), str):
                raise UserError(
                    f"config.ablation.{name}: {shown(getattr(self, name))} is not a string, as in 'all'; give one"
                )
        chosen = _layers(self.layers, model.layers)
        if self.by_head:
            return [Component(layer, ATTN, head) for layer in sorted(chosen) for head in range(model.heads)]
        allowed = (*SITES, HEADS)
        sites = [one_of("ablation.sites", site.strip(), allowed) for site in self.sites.split(",")]
        if HEADS in sites:
            raise UserError(f"config.ablation.sites: {HEADS} cannot be mixed with others; sweep them by themselves")
        return sorted({Component(layer, SITES.index(site)) for layer in chosen for site in sites})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices that share the prompts, and those that share the model.

    Attributes:
      data: devices, of all processes, that each take other prompts; 0 for as many as there are.
      model: devices that share one copy of the model.
    """

    data: int = 0
    model: int = 1

    def __post_init__(self) -> None:
        for name, least in (("data", 0), ("model", 1)):
            if getattr(self, name) < least:
                raise UserError(f"config.mesh.{name}: is {getattr(self, name)}; give {least} or more")


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """The shape of a decoder that is trained here, of Llama's kind of block; see `models.config.ModelConfig`."""

    layers: int = 8
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    mlp_width: int = 384
    context: int = 64

    def decoder(self, vocab_size: int, precision: str = "highest") -> ModelConfig:
        """Return the config of a model of this shape, its parameters in float32.

        Raises:
          UserError: if there can be none.
        """
        try:
            return ModelConfig(
                vocab_size=vocab_size,
                head_dim=self.width // self.heads,
                tied=True,
                precision=precision,
                **dataclasses.asdict(self),
            )
        except ValueError as error:
            raise UserError(f"config.model: {error}") from error


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep: see `configs/sweep.py` for the defaults and how to change them.

    Attributes:
      model: what `hydra_jax.load` takes.
      model_step: the checkpoint of a model that was trained here.
      dtype: "float32" or "bfloat16", of weights, keys and values; "auto" for what the weights are stored in.
      precision: "highest", "high" or "default", of float32 matrix products.
      prompts: the prompts.
      ablation: the ablations.
      readout: what is read.
      seed: of every draw: prompts under a limit, replacement sources, noise, bootstrap.
      rows: rows of a block, moved at once on each device; 0 picks 512 on a CPU and 16,384 on an accelerator.
        Fewer where its memory does not take them.
      memory: GB of each device that may be used; 0 for all that is free.
      mesh: the devices that share the prompts, and those that share the model.
      non_finite: the share of interventions whose values may be no numbers; past it the run stops.
      identity_tolerance: how far total = direct - compensation may be from holding, in logits, before the run stops.
      bootstrap: resamples behind each interval.
      example: id of a prompt for the single-prompt figure; "" picks all of them.
    """

    model: str = "smollm2-135m"
    model_step: int = LAST_STEP
    dtype: str = "float32"
    precision: str = "highest"
    prompts: PromptsConfig = PromptsConfig()
    ablation: AblationConfig = AblationConfig()
    readout: ReadoutConfig = ReadoutConfig()
    seed: int = 0
    rows: int = 0
    memory: float = 0.0
    mesh: MeshConfig = MeshConfig()
    non_finite: float = 0.01
    identity_tolerance: float = 1e-4
    bootstrap: int = 1000
    example: str = ""

    def __post_init__(self) -> None:
        one_of("prompts.kind", self.prompts.kind, prompt_sets.KINDS)
        one_of("prompts.target", self.prompts.target, TARGETS)
        if self.prompts.target == ANSWER:
            if self.readout.target not in (AUTO, ANSWER):
                raise UserError("config.readout.target: prompts.target asks for another; give one of the two")
            object.__setattr__(self, "readout", dataclasses.replace(self.readout, target=ANSWER))
        if self.prompts.kind == "text" and not self.prompts.path:
            raise UserError("config.prompts.path: is empty; give a UTF-8 text file to cut prompts from")
        one_of("dtype", self.dtype, (*DTYPES, AS_STORED))
        one_of("precision", self.precision, PRECISIONS)
        ranges = {
            "ablation.replacements": (self.ablation.replacements, 1, MOST_REPLACEMENTS),
            "ablation.cascade": (self.ablation.cascade, 0, MOST_CUTS),
            "prompts.limit": (self.prompts.limit, 0, MOST),
            "seed": (self.seed, 0, MOST_SEED),
            "model_step": (self.model_step, LAST_STEP, MOST),
            "rows": (self.rows, 0, MOST),
            "bootstrap": (self.bootstrap, 1, MOST_BOOTSTRAP),
        }
        for name, (value, least, most) in ranges.items():
            if not least <= value <= most:
                remedy = f"{least} or more" if value < least else f"{most} or less"
                raise UserError(f"config.{name}: is {shown(value)}; give {remedy}")
        if not 0 <= self.memory < float("inf"):
            raise UserError(f"config.memory: is {self.memory}; give 0 or more GB")
        if not 0 <= self.non_finite <= 1:
            raise UserError(f"config.non_finite: is {self.non_finite}; give a share, from 0 to 1")
        if not 0 < self.identity_tolerance < 1:
            raise UserError(f"config.identity_tolerance: is {self.identity_tolerance}; give one between 0 and 1")

    @property
    def options(self) -> frozenset[str]:
        """The options of `store.variables.shapes` that are asked for."""
        heads = [HEADS] if self.readout.responders == HEADS else []
        cascade = [CASCADE] if self.ablation.cascade else []
        return frozenset({*self.ablation.variants[1:], *self.readout.asked_metrics, *heads, *cascade})


def sweep_config(config: Mapping[str, Any]) -> SweepConfig:
    """Return the SweepConfig of a ConfigDict or any mapping of the same shape.

    Raises:
      UserError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return parse(SweepConfig, config, "config")


def _layers(text: str, layers: int) -> set[int]:
    if text == "all":
        return set(range(layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"config.ablation.layers: {shown(part)} is not a layer; give 'all' or e.g. '0,5,10-14'")
        span = range(int(first), int(last or first) + 1)
        if not span or span[-1] >= layers:
            raise UserError(
                f"config.ablation.layers: {shown(part)} is not within 0-{layers - 1}; name layers the model has"
            )
        chosen |= set(span)
    return chosen
