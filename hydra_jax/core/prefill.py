"""One clean pass over one prompt, which keeps the needs of every ablation of its last token."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from hydra_jax.models import transformer
from hydra_jax.models.layers import softcap
from hydra_jax.models.transformer import Params

MOST_LIKELY = -1


class Clean(flax.struct.PyTreeNode):
    """A prompt's clean run, read at its last token.

    Attributes:
      writes: [L, 2, D], each component's write (second axis: attention, MLP).
      mixed: [L, H, head_dim], the values as each attention head mixed them.
      resid_mid: [L, D], the stream between a layer's writes.
      resid_post: [L, D], the stream after a layer.
      keys: [L, K, head_dim, T], every position's, laid out for `replay`.
      values: [L, K, T, head_dim].
      position: [] int, the last token's place.
      top: [] int, the most likely next token.
      target: [] int, the token whose logit is read.
      readout: [D], r of that token.
      constant: [], const: the part of its centred logit that no write adds (a final LayerNorm's bias does).
      final_scale: [], sigma.
      centred_logit: [], the target's logit minus the mean over the vocabulary, before any final soft-cap.
      probability: [], the target's.
    """

    writes: jax.Array
    mixed: jax.Array
    resid_mid: jax.Array
    resid_post: jax.Array
    keys: jax.Array
    values: jax.Array
    position: jax.Array
    top: jax.Array
    target: jax.Array
    readout: jax.Array
    constant: jax.Array
    final_scale: jax.Array
    centred_logit: jax.Array
    probability: jax.Array

    def lens(self, vector: Float[Array, " D"]) -> Float[Array, ""]:
        """Return u(w) = <w, r> / sigma: the centred logit's share that is due to `vector` in the final stream."""
        return vector @ self.readout / self.final_scale


def prefill(
    params: Params, tokens: Int[Array, " T"], length: Int[Array, ""], target: Int[ArrayLike, ""] = MOST_LIKELY
) -> Clean:
    """Return the clean run of one prompt.

    Args:
      params: the model.
      tokens: the prompt, padded on the right.
      length: the number of `tokens` that are the prompt.
      target: the token to read; MOST_LIKELY for the clean run's most likely next token.
    """
    position = length - 1
    _, trace = transformer.forward(params, tokens, only=position)
    writes = jnp.stack([trace.attn_out, trace.mlp_out], axis=1)
    resid_mid = trace.resid_pre + writes[:, 0]
    resid_post = resid_mid + writes[:, 1]
    logits = transformer.unembed(params, resid_post[-1])
    top = jnp.argmax(logits)
    target = jnp.where(target == MOST_LIKELY, top, target)
    readout, constant = transformer.readout(params, target)
    return Clean(
        writes=writes,
        mixed=trace.mixed,
        resid_mid=resid_mid,
        resid_post=resid_post,
        keys=jnp.transpose(trace.keys, (0, 2, 3, 1)),
        values=jnp.swapaxes(trace.values, 1, 2),
        position=position,
        top=top,
        target=target,
        readout=readout,
        constant=constant,
        final_scale=transformer.final_scale(params, resid_post[-1]),
        centred_logit=logits[target] - logits.mean(),
        probability=jax.nn.softmax(softcap(logits, params.config.final_softcap))[target],
    )
