"""The next token's whole distribution in an intervened run, beside that of the clean run, in four numbers."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hydra_jax.core.prefill import Reading
from hydra_jax.models import transformer
from hydra_jax.models.layers import softcap
from hydra_jax.models.transformer import Params


class Metrics(flax.struct.PyTreeNode):
    """A row's next-token distribution in four numbers.

    Attributes:
      log_probability_drop: [], the fall of the target's log-probability from the clean run's, in nats.
      kl: [], KL(clean || row), in nats.
      target_rank: [] int, the number of tokens that are more likely than the target.
      top_changed: [] bool, whether the most likely token is another than in the clean run.
    """

    log_probability_drop: jax.Array
    kl: jax.Array
    target_rank: jax.Array
    top_changed: jax.Array


def logits_of(params: Params, resid: Float[Array, " D"], scale: Float[Array, ""]) -> Float[Array, " V"]:
    """Return the next token's logits, soft-capped where the model does so, of a final stream divided by `scale`."""
    return softcap(transformer.unembed(params, resid, scale), params.config.final_softcap)


class Said(flax.struct.PyTreeNode):
    """The clean run's next-token distribution at one token.

    Attributes:
      probabilities: [V], p.
      logs: [V], log p, in nats.
    """

    probabilities: jax.Array
    logs: jax.Array

    @classmethod
    def of(cls, params: Params, clean: Reading) -> Said:
        """Return that of a reading."""
        logs = jax.nn.log_softmax(logits_of(params, clean.final, clean.final_scale))
        return cls(jnp.exp(logs), logs)


def metrics(
    params: Params, clean: Reading, said: Said, shift: Float[Array, " D"], frozen_norm: Bool[Array, ""]
) -> Metrics:
    """Return a row's metrics: 2 D V operations, and few passes over V numbers.

    With logits l of the row, KL(clean || row) = <p, log p - l + logsumexp(l)>, summed as differences: p adds up to 1
    only within rounding, of which l is large.

    Args:
      params: the model, of which its layers are not needed.
      clean: what the clean run says at the row's token.
      said: its distribution there.
      shift: s after the last layer.
      frozen_norm: whether the final norm divides by the clean run's sigma.
    """
    resid = clean.final + shift
    scale = jnp.where(frozen_norm, clean.final_scale, transformer.final_scale(params, resid))
    logits = logits_of(params, resid, scale)
    whole, target = jax.nn.logsumexp(logits), logits[clean.target]
    return Metrics(
        log_probability_drop=said.logs[clean.target] - (target - whole),
        kl=(said.probabilities * (said.logs - logits + whole)).sum(),
        target_rank=(logits > target).sum(),
        top_changed=logits.argmax() != clean.top,
    )
