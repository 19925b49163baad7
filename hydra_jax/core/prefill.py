"""The clean run of one text: what a layer's rows need of it, and what is read of it at one token."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from hydra_jax.core.edits import ATTN
from hydra_jax.models import transformer
from hydra_jax.models.layers import softcap
from hydra_jax.models.transformer import Contrast, Params, Trace

MOST_LIKELY = -1
"""The token of a contrast that stands for the clean run's most likely next one."""


class LayerClean(flax.struct.PyTreeNode):
    """A text's clean run in one layer: at one token, or at Q of them, along a first axis of all but keys and values.

    Attributes:
      resid_pre: [D], the stream before the layer.
      writes: [2, D], each component's write (attention, MLP).
      mixed: [H, head_dim], the values as each attention head mixed them.
      keys: [K, head_dim, T], every token's, laid out for one that attends to them.
      values: [K, T, head_dim].
    """

    resid_pre: jax.Array
    writes: jax.Array
    mixed: jax.Array
    keys: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, trace: Trace) -> LayerClean:
        """Return what a layer's trace has of it."""
        return cls(
            resid_pre=trace.resid_pre,
            writes=jnp.stack([trace.attn_out, trace.mlp_out], axis=-2),
            mixed=trace.mixed,
            keys=jnp.moveaxis(trace.keys, -3, -1),
            values=jnp.swapaxes(trace.values, -3, -2),
        )

    def at(self, token: Int[ArrayLike, ""]) -> LayerClean:
        """Return it at one of its Q tokens."""
        return self.replace(resid_pre=self.resid_pre[token], writes=self.writes[token], mixed=self.mixed[token])

    def read(self, site: int, parallel: bool) -> Float[Array, "*L D"]:
        """Return the stream that attention or MLP reads."""
        return self.resid_pre if site == ATTN or parallel else self.resid_pre + self.writes[..., ATTN, :]


class Reading(flax.struct.PyTreeNode):
    """The clean run, read after one token of a text.

    Attributes:
      position: [] int, the token's place.
      top: [] int, the most likely next token.
      target: [] int, the first token of the contrast.
      readout: [D], r of the contrast.
      constant: [], const: the part of the contrast that no write adds (a final LayerNorm's bias does).
      final: [D], the stream after the last layer.
      final_scale: [], sigma.
      centred_logit: [], the contrast: of one token its logit minus the mean over the vocabulary, before any soft-cap.
      probabilities: [K], those of the contrast's tokens.
    """

    position: jax.Array
    top: jax.Array
    target: jax.Array
    readout: jax.Array
    constant: jax.Array
    final: jax.Array
    final_scale: jax.Array
    centred_logit: jax.Array
    probabilities: jax.Array

    @property
    def probability(self) -> Float[Array | np.ndarray, "*Q"]:
        """The target's probability."""
        return self.probabilities[..., 0]

    def lens(self, vector: Float[Array, " D"]) -> Float[Array, ""]:
        """Return u(w) = <w, r> / sigma: the contrast's share that is due to `vector` in the final stream."""
        return vector @ self.readout / self.final_scale


class Clean(Reading):
    """A prompt's clean run, read at its last token: a `Reading`, and all layers.

    Attributes:
      layers: every layer's `LayerClean`, along a first axis L.
    """

    layers: LayerClean

    @property
    def writes(self) -> Float[Array, "L 2 D"]:
        """Each component's write."""
        return self.layers.writes

    @property
    def mixed(self) -> Float[Array, "L H head_dim"]:
        """The values as each attention head mixed them."""
        return self.layers.mixed


def read(params: Params, final: Float[Array, " D"], position: Int[Array, ""], contrast: Contrast) -> Reading:
    """Return what a text's final stream says at one token.

    Args:
      params: the model, of which its layers are not needed.
      final: the stream after the last layer.
      position: the token's place.
      contrast: what is read; MOST_LIKELY among its tokens stands for the most likely next one.
    """
    logits = transformer.unembed(params, final)
    top = jnp.argmax(logits)
    contrast = contrast.replace(tokens=jnp.where(contrast.tokens == MOST_LIKELY, top, contrast.tokens))
    readout, constant = transformer.readout(params, contrast)
    return Reading(
        position=position,
        top=top,
        target=contrast.tokens[0],
        readout=readout,
        constant=constant,
        final=final,
        final_scale=transformer.final_scale(params, final),
        centred_logit=contrast.of(logits),
        probabilities=jax.nn.softmax(softcap(logits, params.config.final_softcap))[contrast.tokens],
    )


def prefill(
    params: Params, tokens: Int[Array, " T"], length: Int[ArrayLike, ""], target: Int[ArrayLike, ""] = MOST_LIKELY
) -> Clean:
    """Return the clean run of one prompt.

    Args:
      params: the model.
      tokens: the prompt, padded on the right.
      length: the number of `tokens` that are the prompt.
      target: the token to read; MOST_LIKELY for the clean run's most likely next token.
    """
    position = jnp.asarray(length) - 1
    _, trace = transformer.forward(params, tokens, only=position)
    layers = LayerClean.of(trace)
    reading = read(params, trace.resid_post[-1], position, Contrast.target(target))
    return Clean(**{name: getattr(reading, name) for name in Reading.__dataclass_fields__}, layers=layers)
