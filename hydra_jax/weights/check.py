"""What is checked of every model that is loaded, on two short inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hydra_jax.core.prefill import Clean, prefill
from hydra_jax.engine import mesh
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params

LONG, SHORT = 8, 5
TOLERANCES = {("float32", "highest"): 1e-4}
ROUNDED_TOLERANCE = 3e-2
"""Where products round their inputs."""


OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""Of the compiler: a CPU, which computes in float32, would convert all layers' bfloat16 weights at once."""


def _runs(params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Clean]:
    """What enters the first layer at the last token [P, D], and the clean runs of P prompts."""
    entering = jax.vmap(lambda tokens, length: transformer.embed(params, tokens)[length - 1])(tokens, lengths)
    return entering, jax.vmap(prefill, (None, 0, 0))(params, tokens, lengths)


def check(params: Params, where: str) -> None:
    """Run a long and a short input, the short one padded and as it is.

    Differences are relative to the stream's norm, or to the logit that it has room for.

    Args:
      params: the model.
      where: what a fault is reported of.

    Raises:
      UserError: that says which check failed: that the writes sum to the stream, that what the lens says
        they contribute sums to the logit, or that padding changes nothing.
    """
    c = params.config
    long, short = min(LONG, c.context), min(SHORT, c.context)
    tokens = jnp.asarray((np.arange(2 * long) * 7919 + 11).reshape(2, long) % c.vocab_size, jnp.int32)
    # On every device, as those of other processes cannot be read.
    whole = NamedSharding(mesh.of(params), PartitionSpec())
    runs = jax.jit(_runs, compiler_options=OPTIONS, out_shardings=whole)
    entering, clean = jax.device_get(runs(params, tokens, jnp.array([long, short])))
    _, alone = jax.device_get(runs(params, tokens[1:, :short], jnp.array([short])))
    final = clean.resid_post[:, -1]
    room = np.linalg.norm(final, axis=1)
    room_of_logit = room * np.linalg.norm(clean.readout, axis=1) / clean.final_scale

    def lens(vectors: np.ndarray) -> np.ndarray:
        return (vectors * clean.readout).sum(axis=1) / clean.final_scale

    parts = clean.writes.reshape(2, c.components, c.width)
    contributions = sum(lens(parts[:, i]) for i in range(c.components)) + lens(entering) + clean.constant
    differences = {
        "the writes do not sum to the stream": np.linalg.norm(entering + parts.sum(axis=1) - final, axis=1) / room,
        "the contributions do not sum to the logit": np.abs(contributions - clean.centred_logit) / room_of_logit,
        "padding changes the stream": np.linalg.norm(alone.resid_post[0, -1] - final[1]) / room[1],
    }
    allowed = TOLERANCES.get((c.dtype, c.precision), ROUNDED_TOLERANCE)
    for what, difference in differences.items():
        worst = np.max(difference)
        if not worst <= allowed:  # NaN is wrong too
            raise UserError(
                f"{where}: {what}, by {worst:.2g} of its size (more than {allowed:g}); the weights are damaged, or"
                " this model is not what its settings say"
            )
