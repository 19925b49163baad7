"""One step of training: the loss, AdamW, and the update, sharded over devices by the batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hydra_jax.models import transformer
from hydra_jax.models.transformer import Dropout, Params
from hydra_jax.training.config import OptimizerConfig, TrainConfig

INITIAL, DROPOUT = range(2)
"""What a seed's keys are for."""


class State(flax.struct.PyTreeNode):
    """What training changes.

    Attributes:
      weights: of the model, in float32.
      optimizer: Adam's moments.
      step: [] int32, updates made.
      key: [] that dropout's keys are made of.
    """

    weights: dict[str, Any]
    optimizer: Any
    step: jax.Array
    key: jax.Array


class Metrics(flax.struct.PyTreeNode):
    """Of one step, each [].

    Attributes:
      loss: nats a token, mean over the tokens that are foretold.
      gradient_norm: before clipping.
      update_norm: of the change of the weights; not finite where anything is not.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: up in a line, down in half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup, steps - 1),
        decay_steps=steps,
        end_value=config.final_share * config.learning_rate,
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's norm; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(weights: Any) -> Any:
    """Which weights decay: kernels and embeddings, not gains and biases (which are stacked by layer, too)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), weights)


def initial(config: TrainConfig, vocab_size: int) -> State:
    """The state before the first step: of a seed, the same whatever the dropout."""
    keys = jax.random.split(jax.random.key(config.seed), 2)
    weights = transformer.init_params(config.decoder(vocab_size), keys[INITIAL]).weights
    moments = optimizer(config.optimizer, config.steps).init(weights)
    return State(weights, moments, jnp.int32(0), keys[DROPOUT])


def computing(config: TrainConfig, weights: dict[str, Any], vocab_size: int) -> Params:
    """The model with float32 weights that are rounded to the config's dtype as they enter products."""
    return Params(weights=weights, config=dataclasses.replace(config.decoder(vocab_size), dtype=config.dtype))


def sequence_loss(
    params: Params, row: jax.Array, boundary: jax.Array, dropout: Dropout | None
) -> tuple[jax.Array, jax.Array]:
    """The sum of a row's losses in nats, and of how many tokens.

    Args:
      params: the model.
      row: [T + 1] int32; all but the last are read, all but the first foretold.
      boundary: [] the token that begins a document: what comes before it says nothing of it.
      dropout: None to evaluate.
    """
    logits, _ = transformer.forward(params, row[:-1], dropout=dropout)
    counted = (row[1:] != boundary).astype(jnp.float32)
    # Picked by a mask, whose gradient is a product; that of an index would be a scatter into an array of logits.
    targets = row[1:, None] == jnp.arange(logits.shape[1])[None]
    losses = jax.nn.logsumexp(logits, axis=1) - jnp.where(targets, logits, 0).sum(axis=1)
    return (losses * counted).sum(), counted.sum()


def batch_loss(
    params: Params, rows: jax.Array, boundary: jax.Array, keys: jax.Array | None, config: TrainConfig
) -> tuple[jax.Array, jax.Array]:
    """`sequence_loss` of rows [B, T + 1], summed; keys [B] of dropout, or None to evaluate."""

    def one(row: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return sequence_loss(params, row, boundary, None if key is None else Dropout(key, config.dropout))

    return jax.tree.map(jnp.sum, jax.vmap(one)(rows, keys))


def update(state: State, rows: jax.Array, boundary: jax.Array, config: TrainConfig) -> tuple[State, Metrics]:
    """One step.

    Args:
      state: before it.
      rows: [accumulate, B, T + 1], worked through one after the other.
      boundary: [] int, see `sequence_loss`.
      config: of the run.
    """
    vocab_size = state.weights["embedding"].shape[0]
    own = jax.random.fold_in(state.key, state.step)
    keys = jax.random.split(own, rows.shape[:2])

    def loss(weights: dict[str, Any], rows: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return batch_loss(computing(config, weights, vocab_size), rows, boundary, keys, config)

    def part(so_far: Any, each: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights, *each)
        return jax.tree.map(jnp.add, so_far, (total, count, gradient)), None

    nothing = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
    if config.accumulate == 1:
        (total, count, gradient), _ = part(nothing, (rows[0], keys[0]))
    else:
        (total, count, gradient), _ = jax.lax.scan(part, nothing, (rows, keys))
    gradient = jax.tree.map(lambda each: each / count, gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, moments = optimizer(config.optimizer, config.steps).update(gradient, state.optimizer, state.weights)
    metrics = Metrics(total / count, optax.tree.norm(gradient), optax.tree.norm(updates))
    return State(optax.apply_updates(state.weights, updates), moments, state.step + 1, state.key), metrics
