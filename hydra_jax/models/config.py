"""The switches by which one decoder differs from another: a handful, and no class per family."""

from __future__ import annotations

import dataclasses
import typing

if typing.TYPE_CHECKING:
    import jax

DTYPES = ("float32", "bfloat16")
AS_STORED = "auto"
"""The dtype that stands for bfloat16 where a model's weights are stored in it, else for float32."""

PRECISIONS = ("highest", "high", "default")
NORMS = ("rms", "layer")
QK_NORMS = ("none", "head", "width")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and switches, hashable so that it can be static under `jax.jit`.

    The defaults of the switches are Llama's.

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
      rope_factors: the divisor of each rotary frequency; () for none.
      local_rope_base: base in layers with a window, undivided; 0 where they are like the others.
      rotary_dim: the leading dimensions of a head that turn with position; 0 for all of them.
      learned_positions: positions are rows of a table added to the embedding, and nothing is rotated.
      windows: for each layer, how many tokens its attention sees, the last itself; 0, or () for all
        layers, where it sees everything before it.
      query_scalar: queries are divided by its square root; 0 for head_dim.
      attn_softcap: scores s are squeezed to cap * tanh(s / cap); 0 where they are not.
      final_softcap: the same of logits, after everything that is measured here.
      embedding_scale: the factor of the embedding where tokens enter.
      norm: "rms" (RMSNorm), or "layer" (LayerNorm, with a bias).
      norm_eps: added to the mean square inside the norms.
      pre_norm: attention and MLP read the stream through a norm.
      post_norm: their writes pass through an RMSNorm on the way to the stream.
      qk_norm: queries and keys are normed by "head" or over their full "width" before they are
        rotated; "none" where they are not.
      parallel: the MLP reads the same stream as its layer's attention, which therefore is not
        upstream of it.
      gated: the MLP has a gate, down(act(gate(x)) * up(x)); else it is down(act(up(x))).
      activation: the MLP's nonlinearity, one of ACTIVATIONS.
      qkv_bias: queries, keys and values have biases.
      out_bias: attention's output projection has one.
      mlp_bias: the MLP's projections have them.
      tied: whether the unembedding is the embedding, transposed.
      dtype: the type of weights, keys, values and the inputs of products; products accumulate in
        float32, and the residual stream, norms and softmax are always float32.
      precision: the `jax.lax.Precision` of the matrix products of float32 weights. "highest" is
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
    rope_factors: tuple[float, ...] = ()
    local_rope_base: float = 0.0
    rotary_dim: int = 0
    learned_positions: bool = False
    windows: tuple[int, ...] = ()
    query_scalar: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    norm: str = "rms"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = "none"
    parallel: bool = False
    gated: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            many = field.type.startswith("tuple")
            kind = field.type.removeprefix("tuple[").removesuffix(", ...]")
            kinds = ("int", "float") if kind == "float" else (kind,)
            if many and not isinstance(value, tuple):
                raise TypeError(f"model config: {field.name} must be {field.type}, it is {value!r}")
            for item in value if many else (value,):
                if type(item).__name__ not in kinds:
                    raise TypeError(f"model config: {field.name} must be {field.type}, it is {value!r}")
                none = item == 0 and (field.default == 0 or field.name == "windows")
                if kind in ("int", "float") and not (none or 0 < item < float("inf")):
                    raise ValueError(f"model config: {field.name} must be positive, it is {value}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model config: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if not self.learned_positions and (self.rotated % 2 or self.rotated > self.head_dim):
            raise ValueError(
                "model config: rotary positions need an even head_dim and an even rotary_dim within it,"
                f" they are {self.head_dim} and {self.rotary_dim}"
            )
        for name, length, numbers in (
            ("windows", self.layers, self.windows),
            ("rope_factors", self.rotated // 2, self.rope_factors),
        ):
            if len(numbers) not in (0, length):
                raise ValueError(f"model config: {name} must have {length} numbers, it has {len(numbers)}")
        if self.post_norm and self.norm != "rms":
            raise ValueError(f"model config: a post_norm must be of norm 'rms', it is of {self.norm!r}")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("qk_norm", QK_NORMS),
            ("dtype", DTYPES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model config: {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def components(self) -> int:
        """C, the writes of one forward pass: attention and MLP of every layer."""
        return 2 * self.layers

    @property
    def rotated(self) -> int:
        """Number of a head's dimensions that turn with position, where positions are rotary."""
        return self.rotary_dim or self.head_dim

    @property
    def query_scale(self) -> float:
        """The factor of queries."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def lax_precision(self) -> jax.lax.Precision:
        """`precision` in JAX's spelling."""
        import jax  # late, as names, shapes and --help do not need it

        return jax.lax.Precision[self.precision.upper()]
