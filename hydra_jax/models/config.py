"""What distinguishes one decoder from another: a handful of switches, no class per family."""

from __future__ import annotations

import dataclasses

import jax

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("highest", "high", "default")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and switches, hashable so that it can be static under `jax.jit`.

    Attributes:
      vocab_size: V, rows of the embedding.
      width: D, the residual stream's dimensions.
      layers: L.
      heads: H, query heads of a layer.
      kv_heads: K, key/value heads of a layer; each serves H / K query heads.
      head_dim: dimensions of one head.
      mlp_width: hidden units of one MLP.
      context: the longest sequence, in tokens, that the model was made for.
      rope_base: base of the rotary frequencies.
      norm_eps: added to the mean square inside the norms.
      tied: whether the unembedding is the embedding, transposed.
      activation: the gate's nonlinearity, a key of `layers.ACTIVATIONS`.
      dtype: what weights, keys and values are kept in, and products take their inputs in; products
        accumulate in float32, and the residual stream, norms and softmax are always float32.
      precision: what `jax.lax.Precision` the matrix products of float32 weights use. "highest" is
        true float32 everywhere (a GPU would otherwise round its inputs to TF32, a TPU to bfloat16).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    activation: str = "silu"
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), ("int", "float") if field.type == "float" else (field.type,)
            if type(value).__name__ not in kinds:
                raise TypeError(f"model config: {field.name} must be {field.type}, it is {value!r}")
            if field.type in ("int", "float") and not 0 < value < float("inf"):
                raise ValueError(f"model config: {field.name} must be positive, it is {value}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model config: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: rotary positions need an even head_dim, it is {self.head_dim}")
        for name, allowed in (("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model config: {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def components(self) -> int:
        """C, the writes of one forward pass: attention and MLP of every layer."""
        return 2 * self.layers

    @property
    def lax_precision(self) -> jax.lax.Precision:
        """`precision` as JAX spells it."""
        return jax.lax.Precision[self.precision.upper()]
