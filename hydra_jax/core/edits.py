"""What is ablated, and by what it is replaced: components, ablation kinds, and their randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydra_jax.errors import UserError

SITES = ("attn", "mlp")
ATTN, MLP = range(2)

KINDS = ("resample", "mean", "zero", "noise")
RANDOM_KINDS = ("resample", "noise")
"""The kinds of which several replacements are drawn; the others have just one."""


WHOLE = -1
"""In place of a head: all of the layer's write."""


class Component(NamedTuple):
    """One write: of attention (site 0) or MLP (site 1) of a layer, or one head's share of an attention write."""

    layer: int
    site: int
    head: int = WHOLE

    @classmethod
    def named(cls, layer: Any, site: Any, head: Any = WHOLE) -> Component:
        """The component that results label so, in scalars of whatever library."""
        return cls(int(layer), SITES.index(str(site)), int(head))

    @property
    def place(self) -> int:
        """Its place in forward order: attn 0, mlp 0, attn 1, mlp 1, ..."""
        return 2 * self.layer + self.site

    def __str__(self) -> str:
        return f"{SITES[self.site]} {self.layer}" + ("" if self.head == WHOLE else f" head {self.head}")


def all_components(layers: int) -> list[Component]:
    """Every component of a model of `layers` layers, in forward order."""
    return [Component(layer, site) for layer in range(layers) for site in range(len(SITES))]


class WriteStatistics(NamedTuple):
    """Of one component's last-token writes over the prompt set: per-dimension mean and deviation, [E] arrays."""

    mean: Any
    deviation: Any


def replacement(kind: str, source: jax.Array, statistics: WriteStatistics, key: jax.Array) -> jax.Array:
    """What takes the place of a write, or of what a head mixed: [E].

    Args:
      kind: "resample" (the same one of another prompt), "mean" (over the prompt set), "zero", or
        "noise" (Gaussian with its own mean and deviation over the prompt set).
      source: [E], the other prompt's; read by "resample" only.
      statistics: read by "mean" and "noise".
      key: read by "noise".
    """
    match kind:
        case "resample":
            return source
        case "mean":
            return jnp.asarray(statistics.mean)
        case "zero":
            return jnp.zeros_like(source)
        case "noise":
            return statistics.mean + statistics.deviation * jax.random.normal(key, source.shape, source.dtype)
    raise ValueError(f"ablation kind {kind!r} is not one of {', '.join(KINDS)}")


def prompt_keys(seed: int, prompt_ids: Sequence[str]) -> jax.Array:
    """[P] keys made of the seed and each prompt's id alone, so that order and sharding change nothing."""
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


def draw_sources(keys: jax.Array, prompt_ids: Sequence[str], replacements: int) -> np.ndarray:
    """[P, R], for each prompt the indices of `replacements` different other prompts.

    The draw is over prompts in order of id, so that the order they come in changes nothing.

    Args:
      keys: [P], from `prompt_keys`.
      prompt_ids: P different ids.
      replacements: R.

    Raises:
      UserError: if there are not more than R prompts.
    """
    prompts = len(prompt_ids)
    check_enough(prompts, replacements)
    by_id = np.argsort(np.asarray(prompt_ids))
    rank = np.argsort(by_id)

    def one(key: jax.Array, rank: jax.Array) -> jax.Array:
        others = jax.random.choice(key, prompts - 1, (replacements,), replace=False)
        return jnp.where(others >= rank, others + 1, others)

    ranks = jax.lax.map(lambda each: one(*each), (keys, jnp.asarray(rank)), batch_size=256)
    return by_id[np.asarray(ranks)]
