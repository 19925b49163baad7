"""A description of a model, and of the cost of a sweep of it, without reading its weights."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from hydra_jax.core.edits import SITES, all_components
from hydra_jax.engine.layers import AT_ONCE
from hydra_jax.engine.memory import ACCELERATOR_ROWS, Asked, needs
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import layout
from hydra_jax.store.variables import EFFECTS
from hydra_jax.sweep.roofline import intervention_flops
from hydra_jax.text.padding import padded_length

SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "context")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a sweep of every component of a model.

    Attributes:
      ablations: in all.
      clean_operations: of matrix products, of the clean runs: one for the bank, one before the ablations.
      ablation_operations: of the ablations, and their direct edges.
      weight_bytes: of the parameters, on each device.
      streamed_bytes: the same where layers are streamed: of what is not in a layer, and of the layers there at once.
      work_bytes: besides them, what a walk of `prompts_at_once` prompts takes, with the rows of all components.
      least_work_bytes: the same with those of one component, where each is walked by itself.
      prompts_at_once: prompts that fill a device.
      bank_bytes: of every prompt's writes, which replacements are taken from.
      store_bytes: of the results, before they are compressed.
    """

    ablations: int
    clean_operations: int
    ablation_operations: int
    weight_bytes: int
    streamed_bytes: int
    work_bytes: int
    least_work_bytes: int
    prompts_at_once: int
    bank_bytes: int
    store_bytes: int


def parameters(config: ModelConfig) -> int:
    """Return how many parameters a model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layout(config)))


def cost(
    config: ModelConfig, prompts: int, length: int, draws: int, model: int = 1, rows: int = 0, edges: bool = False
) -> Cost:
    """Return what a sweep computes and holds.

    Args:
      config: the model's.
      prompts: how many.
      length: tokens of each.
      draws: replacements of each ablation.
      model: devices that share the model.
      rows: in a block on a device; 0 for what this machine's are given.
      edges: whether direct edges are computed.
    """
    params = layout(config)
    kernels = [leaf for leaf in jax.tree.leaves(params.weights["layers"]) if len(leaf.shape) == 3]
    attention = 2 * config.layers * config.heads * config.head_dim * length
    unembedding = config.vocab_size * config.width
    clean = 2 * (length * (sum(math.prod(leaf.shape) for leaf in kernels) + attention) + unembedding)
    each = 2 if edges else 1  # programs of a component
    asked = Asked(each * config.components, draws, rows=rows, least=each)
    together = min(prompts, asked.texts)
    padded = padded_length(length, config.context)
    need = needs(config, padded, asked, model)
    streamed = needs(config, padded, dataclasses.replace(asked, streamed=True), model)
    rest, row = need.fixed + together * need.text, together * draws * need.row
    item = jnp.dtype(config.dtype).itemsize
    effects = len(EFFECTS) * draws + config.components
    once = sum(intervention_flops(config, component, length) for component in all_components(config.layers))
    return Cost(
        ablations=prompts * draws * config.components,
        clean_operations=2 * prompts * clean,
        ablation_operations=prompts * draws * once * (2 if edges else 1),
        weight_bytes=need.parameters,
        streamed_bytes=streamed.parameters,
        work_bytes=rest + asked.programs * row,
        least_work_bytes=rest + asked.least * row,
        prompts_at_once=together,
        bank_bytes=prompts * config.components * config.width * item,
        store_bytes=4 * prompts * config.components * effects,
    )


def describe(
    architecture: str,
    config: ModelConfig,
    prompts: int,
    length: int,
    draws: int,
    model: int = 1,
    devices: int = 1,
    tflops: float = 0.0,
    edges: bool = False,
) -> str:
    """Describe a model and a sweep of it in a few lines.

    Args:
      architecture: as its file calls it.
      config: the model's.
      prompts: of the sweep.
      length: tokens of each.
      draws: replacements of each ablation.
      model: devices that share the model.
      devices: in all.
      tflops: of matrix products that each does a second, in 10^12; 0 where that is not known.
      edges: whether direct edges are computed.
    """
    c, costs = config, cost(config, prompts, length, draws, model, ACCELERATOR_ROWS if tflops else 0, edges)
    operations = costs.clean_operations + costs.ablation_operations
    sizes = ", ".join(f"{name} {getattr(c, name):,}" for name in SIZES)
    plain = ModelConfig(**{name: getattr(c, name) for name in SIZES})
    switches = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in SIZES}
    changed = [_short(name, value) for name, value in switches.items() if value != getattr(plain, name)]
    return "\n".join(
        [
            f"family      {architecture}",
            f"sizes       {sizes}",
            f"switches    {', '.join(changed) or 'none'}",
            f"parameters  {parameters(c):,}",
            f"sites       {', '.join(SITES)} of {c.layers} layers: {c.components} components;"
            f" {c.layers * c.heads:,} attention heads",
            f"order       {_order(c)}",
            f"a sweep     of {prompts:,} prompts of {length:,} tokens, {draws} replacements each:"
            f" {costs.ablations:,} ablations" + (", with direct edges" if edges else ""),
            f"arithmetic  {_amount(operations / 1e12)} TFLOP of matrix products:"
            f" clean runs {_amount(costs.clean_operations / 1e12)}, ablations"
            f" {_amount(costs.ablation_operations / 1e12)}",
            f"memory      of each device: weights {costs.weight_bytes / 1e9:,.3g} GB in {c.dtype}"
            + (f", shared by {model}" if model > 1 else "")
            + f"; ablations of {costs.prompts_at_once:,} prompts at once about {costs.work_bytes / 1e9:,.3g} GB, or"
            f" {costs.least_work_bytes / 1e9:,.3g} GB walking once for each component",
            f"streamed    {costs.streamed_bytes / 1e9:,.3g} GB of weights (what is not in a layer, and {AT_ONCE}"
            " layers at a time)",
            f"disk        {costs.bank_bytes / 1e9:,.3g} GB while it runs; results at most"
            f" {costs.store_bytes / 1e9:,.3g} GB",
            *([_time(operations, devices, tflops, c.dtype)] if tflops else []),
        ]
    )


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _time(operations: float, devices: int, tflops: float, dtype: str) -> str:
    seconds = operations / (devices * tflops * 1e12)
    shown = f"{seconds:,.3g} s" if seconds < 600 else f"{seconds / 3600:,.3g} h"
    return f"time        {shown} on {devices:,} devices of {tflops:,g} TFLOP/s each in {dtype}, besides start-up"


def _order(config: ModelConfig) -> str:
    if config.parallel:
        return "parallel: a layer's attention and MLP read the same stream, neither is downstream of the other"
    return "sequential: a layer's MLP is downstream of its attention"


def _short(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return f"{name} ({', '.join(f'{each:g}' for each in value[:6])}{', ...' if len(value) > 6 else ''})"
    return name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
