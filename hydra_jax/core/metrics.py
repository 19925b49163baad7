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


def log_probabilities(params: Params, resid: Float[Array, " D"], scale: Float[Array, ""]) -> Float[Array, " V"]:
    """Return the next token's distribution, in nats, of a final stream that is divided by `scale`."""
    return jax.nn.log_softmax(softcap(transformer.unembed(params, resid, scale), params.config.final_softcap))


def metrics(
    params: Params, clean: Reading, said: Float[Array, " V"], shift: Float[Array, " D"], frozen_norm: Bool[Array, ""]
) -> Metrics:
    """Return a row's metrics: 2 D V operations.

    Args:
      params: the model, of which its layers are not needed.
      clean: what the clean run says at the row's token.
      said: the `log_probabilities` of the clean run there.
      shift: s after the last layer.
      frozen_norm: whether the final norm divides by the clean run's sigma.
    """
    resid = clean.final + shift
    scale = jnp.where(frozen_norm, clean.final_scale, transformer.final_scale(params, resid))
    says = log_probabilities(params, resid, scale)
    return Metrics(
        log_probability_drop=said[clean.target] - says[clean.target],
        kl=(jnp.exp(said) * (said - says)).sum(),
        target_rank=(says > says[clean.target]).sum(),
        top_changed=says.argmax() != said.argmax(),
    )
