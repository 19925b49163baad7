"""One step of training: the loss, AdamW, and the update, with the batch sharded over devices."""

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
"""The indices of a seed's keys: one for initial weights, one for dropout."""


class State(flax.struct.PyTreeNode):
    """The state that a step of training changes.

    Attributes:
      weights: the model's weights, in float32.
      optimizer: Adam's moments.
      step: [] int32, updates made so far.
      key: [], the key that dropout's keys are derived from.
    """

    weights: dict[str, Any]
    optimizer: Any
    step: jax.Array
    key: jax.Array


class Metrics(flax.struct.PyTreeNode):
    """The metrics of one step, each [].

    Attributes:
      loss: nats a token, mean over the tokens that are predicted.
      gradient_norm: the gradient's norm before clipping.
      update_norm: the norm of the change of the weights; not finite if any of it is not.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: up in a line, down in half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup, steps - 1),
        decay_steps=steps,
        end_value=config.final_share * config.learning_rate,
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW behind a clip of the gradient's norm; only matrices decay."""
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
    """Return for each weight whether it decays: kernels and embeddings do, gains and biases do not.

    Names tell them apart, as gains and biases stacked by layer have as many axes as matrices.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), weights)


def initial(config: TrainConfig, vocab_size: int) -> State:
    """Return the state before the first step, which depends on the seed and not on dropout."""
    keys = jax.random.split(jax.random.key(config.seed), 2)
    weights = transformer.init_params(config.decoder(vocab_size), keys[INITIAL]).weights
    moments = optimizer(config.optimizer, config.steps).init(weights)
    return State(weights, moments, jnp.int32(0), keys[DROPOUT])


def computing(config: TrainConfig, weights: dict[str, Any], vocab_size: int) -> Params:
    """Return a model whose float32 weights are rounded to the config's dtype as they enter products."""
    return Params(weights=weights, config=dataclasses.replace(config.decoder(vocab_size), dtype=config.dtype))


def sequence_loss(
    params: Params, row: jax.Array, boundary: jax.Array, dropout: Dropout | None
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of a row's losses in nats, and the number of tokens in the sum.

    Args:
      params: the model.
      row: [T + 1] int32; all but the last token are read, all but the first predicted.
      boundary: [], the token that begins a document. It is not counted, as the text before it does not tell it.
      dropout: the rates and key of dropout; None to evaluate.
    """
    logits, _ = transformer.forward(params, row[:-1], dropout=dropout)
    counted = (row[1:] != boundary).astype(jnp.float32)
    # A mask picks the targets because its gradient is a product; an index's would be a scatter into an array of logits.
    targets = row[1:, None] == jnp.arange(logits.shape[1])[None]
    losses = jax.nn.logsumexp(logits, axis=1) - jnp.where(targets, logits, 0).sum(axis=1)
    return (losses * counted).sum(), counted.sum()


def batch_loss(
    params: Params, rows: jax.Array, boundary: jax.Array, keys: jax.Array | None, config: TrainConfig
) -> tuple[jax.Array, jax.Array]:
    """Sum `sequence_loss` over rows [B, T + 1], with dropout's keys [B], or None to evaluate."""

    def row_loss(row: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return sequence_loss(params, row, boundary, None if key is None else Dropout(key, config.dropout))

    return jax.tree.map(jnp.sum, jax.vmap(row_loss)(rows, keys))


def update(state: State, rows: jax.Array, boundary: jax.Array, config: TrainConfig) -> tuple[State, Metrics]:
    """Make one step, and return the state after it and its metrics.

    Args:
      state: the state before the step.
      rows: [accumulate, B, T + 1], worked through one part after the other.
      boundary: [] int, see `sequence_loss`.
      config: the run's settings.
    """
    vocab_size = state.weights["embedding"].shape[0]
    step_key = jax.random.fold_in(state.key, state.step)
    keys = jax.random.split(step_key, rows.shape[:2])

    def loss(weights: dict[str, Any], rows: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return batch_loss(computing(config, weights, vocab_size), rows, boundary, keys, config)

    def add_part(sums: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights, *part)
        return jax.tree.map(jnp.add, sums, (total, count, gradient)), None

    zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
    if config.accumulate == 1:
        (total, count, gradient), _ = add_part(zeros, (rows[0], keys[0]))
    else:
        (total, count, gradient), _ = jax.lax.scan(add_part, zeros, (rows, keys))
    gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, moments = optimizer(config.optimizer, config.steps).update(gradient, state.optimizer, state.weights)
    metrics = Metrics(total / count, optax.tree.norm(gradient), optax.tree.norm(updates))
    return State(optax.apply_updates(state.weights, updates), moments, state.step + 1, state.key), metrics
