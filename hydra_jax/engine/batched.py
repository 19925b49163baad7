"""The kernels over batches of prompts, one program each, on whatever mesh the parameters lie on.

Inside, all is written for the prompts of one device; `mesh.spread` runs that on every device of the data axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from hydra_jax.core.edits import Kind, WriteStatistics, replacement
from hydra_jax.core.effects import Effects, delta_unembed, effects, head_unembed
from hydra_jax.core.prefill import Clean, prefill
from hydra_jax.core.replay import direct_edges, replay
from hydra_jax.engine import mesh as meshes
from hydra_jax.models import transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params, layout

PREFILL_TOKENS = 4096
"""Tokens of clean runs at once: a layer's intermediate values for all of them are in memory together."""


class CleanSummary(flax.struct.PyTreeNode):
    """P clean runs as the host reads them.

    Attributes:
      top: [P] int, the most likely next token.
      target: [P] int, the token that is read.
      delta_unembed: [P, 2L], what each component contributes to its logit.
      head_unembed: [P, L * H], what each head contributes.
      clean_logit: [P], centred.
      clean_probability: [P], of the target.
      final_scale: [P], sigma.
    """

    top: jax.Array
    target: jax.Array
    delta_unembed: jax.Array
    head_unembed: jax.Array
    clean_logit: jax.Array
    clean_probability: jax.Array
    final_scale: jax.Array


class AblationSummary(flax.struct.PyTreeNode):
    """One component's ablations in P prompts, as a result store has them: values that are not finite are NaN.

    Attributes:
      total_effect: [P, R].
      direct_effect: [P, R].
      attn_compensation: [P, R].
      mlp_compensation: [P, R].
      norm_compensation: [P, R].
      compensation: [P, 2L], mean over the replacements whose values are finite.
      direct_edge: [P, 2L], the same; None where it is not asked for.
      non_finite: [P] int, the number of replacements whose values are not finite.
      residual: [P], the largest difference between the identity's two sides among the finite ones.
    """

    total_effect: jax.Array
    direct_effect: jax.Array
    attn_compensation: jax.Array
    mlp_compensation: jax.Array
    norm_compensation: jax.Array
    compensation: jax.Array
    direct_edge: jax.Array | None
    non_finite: jax.Array
    residual: jax.Array


def prefill_program(params: Params) -> jax.stages.Wrapped:
    """Return the jitted `prefill` of P prompts: (params, tokens [P, T], lengths [P], targets [P]) -> Clean."""
    return _prefill_program(meshes.mesh_of(params), params.config)


def clean_summary_program(params: Params) -> jax.stages.Wrapped:
    """Return the jitted (params, Clean) -> CleanSummary of P clean runs."""
    return _program(meshes.mesh_of(params), _summarise_clean, (0,))


def values_program(params: Params, by_head: bool) -> jax.stages.Wrapped:
    """Return the jitted (params, Clean) -> [P, U, E], the values that ablations replace, in the model's dtype.

    They are every write (U = 2L, E = D) or, `by_head`, what every head mixed (U = L * H, E = head_dim).
    """
    return _program(meshes.mesh_of(params), _values, (0,), by_head=by_head)


def ablate_program(params: Params, kind: Kind | str, edges: bool) -> jax.stages.Wrapped:
    """Return the jitted ablation of one component in P prompts, R times each.

    Args:
      params: the model, of which the mesh is read.
      kind: of the ablation.
      edges: whether direct edges are computed, too.

    Returns:
      A function of
        params: the model;
        clean: of P prompts;
        component: `Component.arrays`, layer [], site [] and head [] or None;
        sources: [P, R, E], the component's writes (or what the head mixed) in the replacements' prompts;
        statistics: of the component over the prompt set;
        keys: [P], each prompt's;
      that returns the effects [P, R, ...], and the direct edges [P, R, L, 2] or None.
    """
    return _program(meshes.mesh_of(params), _ablate, (0, 2, 4), kind=kind, edges=edges)


def ablation_summary_program(params: Params) -> jax.stages.Wrapped:
    """Return the jitted (Effects, direct edges or None) -> AblationSummary of one component's ablations."""
    return _program(meshes.mesh_of(params), _summarise_ablations, ())


@functools.cache
def _prefill_program(mesh: Mesh, config: ModelConfig) -> jax.stages.Wrapped:
    tokens, number = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    like = jax.eval_shape(_prefill, layout(config), tokens, number, number)
    return meshes.spread(mesh, _prefill, (0,), meshes.clean_runs(mesh, like))


@functools.cache
def _program(mesh: Mesh, run: Callable[..., Any], replicated: tuple[int, ...], **switches: Any) -> jax.stages.Wrapped:
    return meshes.spread(mesh, functools.partial(run, **switches), replicated)


def _prefill(params: Params, tokens: Int[Array, "P T"], lengths: Int[Array, " P"], targets: Int[Array, " P"]) -> Clean:
    together = max(1, PREFILL_TOKENS // tokens.shape[1])
    run = functools.partial(prefill, params)
    return jax.lax.map(lambda prompt: run(*prompt), (tokens, lengths, targets), batch_size=together)


def _summarise_clean(params: Params, clean: Clean) -> CleanSummary:
    count = len(clean.target)
    return CleanSummary(
        top=clean.top,
        target=clean.target,
        delta_unembed=jax.vmap(delta_unembed)(clean).reshape(count, -1),
        head_unembed=jax.vmap(head_unembed, (None, 0))(params, clean).reshape(count, -1),
        clean_logit=clean.centred_logit,
        clean_probability=clean.probability,
        final_scale=clean.final_scale,
    )


def _values(params: Params, clean: Clean, by_head: bool) -> Float[Array, "P U E"]:
    values = clean.mixed if by_head else clean.writes
    return values.reshape(len(values), -1, values.shape[-1]).astype(params.config.dtype)


def _ablate(
    params: Params,
    clean: Clean,
    component: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""] | None],
    sources: Float[Array, "P R E"],
    statistics: WriteStatistics,
    keys: Key[Array, " P"],
    kind: Kind | str,
    edges: bool,
) -> tuple[Effects, Float[Array, "P R L 2"] | None]:
    layer, site, head = component

    def change(clean: Clean, source: Float[Array, " E"], key: Key[Array, ""]) -> Float[Array, " D"]:
        new = replacement(kind, source.astype(jnp.float32), statistics, key)
        if head is None:
            return new - clean.writes[layer, site]
        return transformer.head_delta(params, layer, head, clean.mixed[layer], new)

    def prompt(
        clean: Clean, sources: Float[Array, "R E"], key: Key[Array, ""]
    ) -> tuple[Effects, Float[Array, "R L 2"] | None]:
        def edit(source: Float[Array, " E"], key: Key[Array, ""]) -> tuple[Effects, Float[Array, "L 2"] | None]:
            delta = change(clean, source, key)
            caused = effects(clean, delta, replay(params, clean, (layer, site), delta))
            return caused, direct_edges(params, clean, (layer, site), delta) if edges else None

        own = jax.random.fold_in(key, 2 * layer + site)
        draws = jax.random.split(own if head is None else jax.random.fold_in(own, head), sources.shape[0])
        return jax.vmap(edit)(sources, draws)

    return jax.vmap(prompt)(clean, sources, keys)


def _summarise_ablations(caused: Effects, edges: Float[Array, "P R L 2"] | None) -> AblationSummary:
    changes = [change for change in (caused.compensation, edges) if change is not None]
    parts = [caused.total_effect, caused.direct_effect, caused.norm_compensation, caused.residual]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, parts))
    for change in changes:
        finite &= jnp.isfinite(change).all(axis=(2, 3))

    def known(values: Float[Array, "P R"]) -> Float[Array, "P R"]:
        return jnp.where(finite, values, jnp.nan)

    def mean(values: Float[Array, "P R L 2"]) -> Float[Array, "P C"]:
        kept = jnp.where(finite[..., None, None], values, 0).sum(axis=1).reshape(len(values), -1)
        return kept / finite.sum(axis=1).astype(kept.dtype)[:, None]

    return AblationSummary(
        total_effect=known(caused.total_effect),
        direct_effect=known(caused.direct_effect),
        attn_compensation=known(caused.attn_compensation),
        mlp_compensation=known(caused.mlp_compensation),
        norm_compensation=known(caused.norm_compensation),
        compensation=mean(caused.compensation),
        direct_edge=None if edges is None else mean(edges),
        non_finite=(~finite).sum(axis=1),
        residual=jnp.where(finite, jnp.abs(caused.residual), 0).max(axis=1),
    )
