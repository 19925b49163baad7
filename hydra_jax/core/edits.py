"""The things that are ablated and what replaces them: components, ablation kinds, and their randomness."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hydra_jax.errors import UserError, shown

SITES = ("attn", "mlp")
ATTN, MLP = range(2)

WHOLE = -1
"""The head that stands for all of the layer's write."""

LAYER = "layer"
"""The word for both writes of a layer, as in "layer 5"."""

SET = "set"
"""The site, as results say it, of components that are ablated together."""

NAME = re.compile(r"\s*(?P<site>attn|mlp|layer)\s+(?P<layer>-?[0-9]{1,9})(\.(?P<head>[0-9]{1,9}))?\s*")
"""Components as text: "attn 23", "mlp 29", for a head "attn 23.4", and "layer 5" for both writes; negative layers count
from the end."""


class Kind(enum.StrEnum):
    """An ablation's choice of what takes a write's place."""

    RESAMPLE = "resample"  # the same write of another prompt
    MEAN = "mean"  # its mean over the prompt set
    ZERO = "zero"
    NOISE = "noise"  # Gaussian, with its mean and deviation over the prompt set

    @property
    def draws(self) -> bool:
        """Whether one replacement differs from the next, so that drawing several is worth the while."""
        return self in (Kind.RESAMPLE, Kind.NOISE)

    @property
    def needs_sources(self) -> bool:
        """Whether it takes values of single other prompts."""
        return self is Kind.RESAMPLE

    @property
    def needs_statistics(self) -> bool:
        """Whether it takes means and deviations over the prompt set."""
        return self in (Kind.MEAN, Kind.NOISE)


@dataclasses.dataclass(frozen=True, order=True)
class Component:
    """One write: of attention (site 0) or MLP (site 1) of a layer, or one head's share of an attention write."""

    layer: int
    site: int
    head: int = WHOLE

    @classmethod
    def parse(cls, text: str) -> Component:
        """Return the component of a name such as "attn 23", "mlp 29" or, for a head, "attn 23.4", as `str` writes it.

        Raises:
          UserError: if it is not a component's name.
        """
        components = parse(text)
        if len(components) != 1:
            raise UserError(f"component {shown(text)}: is both writes of a layer; name one, as in 'attn 23'")
        return components[0]

    @classmethod
    def named(cls, layer: Any, site: Any, head: Any = WHOLE) -> Component:
        """Return the component with these labels, as results have them: scalars of any library."""
        return cls(int(layer), SITES.index(str(site)), int(head))

    @property
    def index(self) -> int:
        """Its index among the writes in forward order: attn 0, mlp 0, attn 1, mlp 1, ..."""
        return 2 * self.layer + self.site

    def unit(self, heads: int) -> int:
        """Return its index among the 2L writes or, for a head, among all L * `heads` heads."""
        return self.index if self.head == WHOLE else self.layer * heads + self.head

    def arrays(self) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""] | None]:
        """Return it as the kernels take it: layer, site and head, None where it is a whole write."""
        return jnp.int32(self.layer), jnp.int32(self.site), None if self.head == WHOLE else jnp.int32(self.head)

    def overlaps(self, other: Component) -> bool:
        """Return whether it is the same, or one of the two is a head of the other."""
        same = self.head == other.head or WHOLE in (self.head, other.head)
        return (self.layer, self.site) == (other.layer, other.site) and same

    def __str__(self) -> str:
        return f"{SITES[self.site]} {self.layer}" + ("" if self.head == WHOLE else f".{self.head}")


def parse(text: str) -> list[Component]:
    """Return the components of a name such as "attn 23", "mlp 29", "attn 23.4" or, for two, "layer 5".

    Raises:
      UserError: if it is not a name of components.
    """
    match = NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match["head"] and match["site"] != SITES[ATTN]):
        raise UserError(
            f"component {shown(text)}: is not a component; give e.g. 'attn 23', 'mlp 29', 'attn 23.4' (a head) or"
            " 'layer 5' (both writes)"
        )
    layer, head = int(match["layer"]), WHOLE if match["head"] is None else int(match["head"])
    sites = range(len(SITES)) if match["site"] == LAYER else [SITES.index(match["site"])]
    return [Component(layer, site, head) for site in sites]


@dataclasses.dataclass(frozen=True, order=True)
class Ablation:
    """Components that are ablated together: most often one.

    Attributes:
      components: in forward order, each once.
    """

    components: tuple[Component, ...]

    @classmethod
    def of(cls, *components: Component) -> Ablation:
        """Return the ablation of some components, in whatever order they are given."""
        return cls(tuple(sorted(components)))

    @property
    def single(self) -> Component | None:
        """Its component where it is one."""
        return self.components[0] if len(self.components) == 1 else None

    def __str__(self) -> str:
        """Return its name, as in "attn 23", "layer 5" or "attn 23 + mlp 29"."""
        names, left = [], list(self.components)
        while left:
            first, *left = left
            twin = Component(first.layer, MLP)
            if first == Component(first.layer, ATTN) and twin in left:
                left.remove(twin)
                names.append(f"{LAYER} {first.layer}")
            else:
                names.append(str(first))
        return " + ".join(names)


def pairs(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Return all pairs of ablations, each made together.

    Raises:
      UserError: if two have a component in common.
    """
    found = []
    for first, second in itertools.combinations(ablations, 2):
        if any(one.overlaps(other) for one, other in itertools.product(first.components, second.components)):
            raise UserError(
                f"config.ablation.interactions: {first} and {second} have a component in common; name others"
            )
        found.append(Ablation.of(*first.components, *second.components))
    return found


def all_components(layers: int) -> list[Component]:
    """Return every component of a model of `layers` layers, in forward order."""
    return [Component(layer, site) for layer in range(layers) for site in range(len(SITES))]


class WriteStatistics(NamedTuple):
    """Mean and deviation of one component's last-token writes over the prompt set, per dimension: [E] arrays."""

    mean: Any
    deviation: Any


def replacement(
    kind: Kind | str, source: Float[Array, " E"], statistics: WriteStatistics, key: Key[Array, ""]
) -> Float[Array, " E"]:
    """Return the vector that takes the place of a write (E = D), or of a head's mixed values (E = head_dim).

    Args:
      kind: of the ablation.
      source: the same thing in another prompt; read by RESAMPLE alone.
      statistics: read by MEAN and NOISE.
      key: read by NOISE.

    Raises:
      ValueError: if `kind` is a string that names no kind.
    """
    match Kind(kind):
        case Kind.RESAMPLE:
            return source
        case Kind.MEAN:
            return jnp.asarray(statistics.mean)
        case Kind.ZERO:
            return jnp.zeros_like(source)
        case Kind.NOISE:
            return statistics.mean + statistics.deviation * jax.random.normal(key, source.shape, source.dtype)


def prompt_keys(seed: int, prompt_ids: Sequence[str]) -> Key[Array, " P"]:
    """Return keys made of the seed and each prompt's id alone, so that order and sharding change nothing."""
    words = np.stack([np.frombuffer(hashlib.sha256(i.encode()).digest()[:8], "<u4") for i in prompt_ids])
    fold = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1]))
    return fold(jnp.asarray(words))


def check_enough(prompts: int, replacements: int) -> None:
    """Refuse to resample from too few prompts.

    Raises:
      UserError: if there are not more prompts than replacements.
    """
    if prompts <= replacements:
        raise UserError(
            f"prompts: {prompts} in the sweep, but {replacements} replacements need {replacements + 1};"
            " give more prompts or lower ablation.replacements"
        )


def draw_ranks(
    keys: Key[Array, " P"], counts: Int[np.ndarray, " P"], replacements: int
) -> Int[np.ndarray, "P {replacements}"]:
    """Draw, for each prompt, `replacements` different ranks below its count.

    Args:
      keys: from `prompt_keys`.
      counts: of the prompts that each may draw from, R or more.
      replacements: R.
    """
    ranks = np.empty((len(counts), replacements), np.int64)
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        one = functools.partial(jax.random.choice, a=int(count), shape=(replacements,), replace=False)
        ranks[rows] = jax.lax.map(one, keys[rows], batch_size=256)
    return ranks
