"""The rate of interventions in TransformerLens, and by PyTorch forward hooks on `transformers`' Llama.

A peer works as its users would have it work: for each prompt and component, a batch of copies of the prompt runs
whole, with a hook that replaces the component's write at the last token. Model, prompts and replacements are ours,
and both must measure the same: a peer whose total effects differ from ours is an error.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from hydra_jax.benchmarks.timing import apart, timed
from hydra_jax.benchmarks.walks import most_likely, others, random_tokens, walk
from hydra_jax.core.edits import ATTN, SITES, Component, all_components
from hydra_jax.core.prefill import LayerClean
from hydra_jax.errors import UserError, reason
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.weights import families

ROUNDS = 3
"""Times that each side is measured: the fastest counts, as other work disturbs it least, and programs are compiled."""

PAIRS = 3
"""The pairs of component and prompt that a peer is timed on in a round: its time depends on neither."""

TOLERANCE = 1e-3
"""The largest difference, in logits, of a peer's total effects from ours."""

Run = Callable[[np.ndarray, Component, np.ndarray], np.ndarray]
"""Tokens [R, T], a component, and new values [R, D] of its write at the last token -> that token's logits [R, V]."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation, with the weights of one of our models.

    Attributes:
      name: its name in PEERS.
      versions: its packages' versions.
      run: the function that makes whole forward passes with an edit.
    """

    name: str
    versions: str
    run: Run


@dataclasses.dataclass(frozen=True)
class Compared:
    """One peer at one prompt length; rates are per second.

    Attributes:
      length: tokens of a prompt.
      draws: replacements of a prompt, which a peer runs as one batch.
      peer: the peer's name.
      versions: its packages' versions.
      peer_interventions: the peer's rate in the fastest of all pairs; the time of clean runs does not count.
      peer_one_by_one: the same where each intervention is a forward pass of its own, as in the libraries' tutorials.
      interventions: our rate in the fastest walk; the time of clean runs counts, shared by all components.
      ratio: the ratio of our rate to the peer's in batches.
      ratio_one_by_one: the ratio of our rate to the peer's one by one.
      difference: the largest difference of total effects, in logits.
      total_effect: the largest total effect, in logits, for scale.
    """

    length: int
    draws: int
    peer: str
    versions: str
    peer_interventions: float
    peer_one_by_one: float
    interventions: float
    ratio: float
    ratio_one_by_one: float
    difference: float
    total_effect: float


def llama(params: Params, attention: str = "sdpa") -> Any:
    """Return the same model as a LlamaForCausalLM of `transformers`, in float32 on the CPU.

    Args:
      params: a model that `check_comparable` accepts.
      attention: the implementation of attention.
    """
    import torch
    import transformers

    c = params.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.mlp_width,
            max_position_embeddings=c.context,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            attn_implementation=attention,
        )
    ).eval()
    named = {}
    for path, stacked in traverse_util.flatten_dict(params.weights, sep="/").items():
        name = f"{families.LLAMA[path.rpartition('/')[0] or path][0]}.weight"
        flipped = path.endswith("/kernel") or path == "unembedding"
        for layer, weight in enumerate(stacked if path.startswith("layers/") else [stacked]):
            named[name.format(layer)] = torch.from_numpy(np.array(weight.T if flipped else weight))
    if c.tied:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    model.load_state_dict(named)
    return model


def check_comparable(config: ModelConfig) -> None:
    """Refuse a model or device that peers cannot work with.

    Raises:
      UserError: if the model is not a float32 Llama without rotary scaling, or JAX does not run on the CPU.
    """
    free = ("rope_base", "norm_eps", "tied", "precision")
    differing = [
        field.name
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
        and field.name not in free
        and getattr(config, field.name) != field.default
    ]
    if differing:
        raise UserError(
            f"--peers: takes a Llama without rotary scaling, in float32; this model has another {', '.join(differing)};"
            " give another config.model or config.dtype"
        )
    if jax.default_backend() != "cpu":
        raise UserError(f"--peers: compares on the CPU, JAX runs on the {jax.default_backend()}; set JAX_PLATFORMS=cpu")


def installed(params: Params, context: int) -> tuple[list[Peer], list[str]]:
    """Return the peers that are installed, with the model's weights, and a line on each that is not.

    Args:
      params: a model that `check_comparable` accepts.
      context: tokens of the longest prompt that the peers will run.

    Raises:
      UserError: if none is installed.
    """
    peers, missing = [], []
    for name, (make, packages) in PEERS.items():
        try:
            peers.append(Peer(name, *make(params, context)))
        except ImportError as error:
            missing.append(f"{name}: is left out ({reason(error)}); pip install {packages}")
    if not peers:
        raise UserError(f"--peers: none is installed; pip install {_HOOKED_PACKAGES} torch transformers")
    return peers, missing


def _forward_hooks(params: Params, context: int) -> tuple[str, Run]:
    del context
    import torch

    model = llama(params)

    def run(tokens: np.ndarray, component: Component, values: np.ndarray) -> np.ndarray:
        layer, new = model.model.layers[component.layer], torch.from_numpy(values)

        def replace(module: Any, arguments: Any, output: Any) -> None:
            del module, arguments
            write = output[0] if isinstance(output, tuple) else output
            write[:, -1] = new

        module = layer.self_attn if component.site == ATTN else layer.mlp
        with module.register_forward_hook(replace), torch.inference_mode():
            return model(torch.from_numpy(tokens), use_cache=False, logits_to_keep=1).logits[:, -1].numpy()

    return _versions("transformers", "torch"), run


def _hooked_transformer(params: Params, context: int) -> tuple[str, Run]:
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = params.config
    config = HookedTransformerConfig(
        n_layers=c.layers,
        d_model=c.width,
        d_head=c.head_dim,
        n_heads=c.heads,
        n_key_value_heads=c.kv_heads if c.kv_heads < c.heads else None,
        d_mlp=c.mlp_width,
        d_vocab=c.vocab_size,
        n_ctx=context,
        eps=c.norm_eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=c.rope_base,
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedTransformer(config)
    # Weights are processed as from_pretrained does by default; centring is for models with LayerNorms only.
    model.load_and_process_state_dict(convert_llama_weights(llama(params), config), center_writing_weights=False)
    return _versions("transformer_lens", "torch"), _with_hooks(model)


def _transformer_bridge(params: Params, context: int) -> tuple[str, Run]:
    del context
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # The bridge chooses eager attention itself: with others its hooks see no pattern.
    model = llama(params, attention="eager")
    bridge = build_bridge_from_module(
        model, "LlamaForCausalLM", hf_config=model.config, dtype=torch.float32, device="cpu"
    )
    return _versions("transformer_lens", "transformers", "torch"), _with_hooks(bridge, logits_to_keep=1)


def _with_hooks(model: Any, **options: Any) -> Run:
    """Return the function that runs either of TransformerLens's models, whose hooks have the same names."""
    import torch

    def run(tokens: np.ndarray, component: Component, values: np.ndarray) -> np.ndarray:
        new = torch.from_numpy(values)

        def replace(write: Any, hook: Any) -> Any:
            del hook
            write[:, -1] = new
            return write

        hooks = [(f"blocks.{component.layer}.hook_{SITES[component.site]}_out", replace)]
        with torch.inference_mode():
            logits = model.run_with_hooks(torch.from_numpy(tokens), return_type="logits", fwd_hooks=hooks, **options)
        return logits[:, -1].numpy()

    return run


def _versions(*packages: str) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


_HOOKED_PACKAGES = '"transformer_lens<4"'
PEERS: dict[str, tuple[Callable[[Params, int], tuple[str, Run]], str]] = {
    "HookedTransformer": (_hooked_transformer, _HOOKED_PACKAGES),
    "TransformerBridge": (_transformer_bridge, '"transformer_lens>=3"'),
    "forward hooks": (_forward_hooks, "torch transformers"),
}
"""Peers by name: a function that makes the peer of a model, and the packages to install.

TransformerLens has HookedTransformer up to its version 3, and TransformerBridge, which hooks `transformers`' modules,
from then on.
"""


def measure(
    params: Params, peers: Sequence[Peer], length: int, rows: int, draws: int, step: int, seed: int = 0
) -> list[Compared]:
    """Measure our walk and every peer in turns, at one prompt length.

    Args:
      params: the model.
      peers: peers that have its weights.
      length: tokens of a prompt.
      rows: in a block of our walk, about.
      draws: R, replacements of each prompt.
      step: our walk ablates one in so many components, spread over all.
      seed: the seed of the tokens.

    Raises:
      UserError: if a peer's total effects differ from ours.
    """
    prompts = max(1, rows // draws)
    tokens = random_tokens(params.config, prompts, length, seed)
    targets = most_likely(params, tokens)
    every = all_components(params.config.layers)
    components = _spread(every, -(-len(every) // step))
    shared = _spread(components, PAIRS)
    edits: dict[Component, tuple[np.ndarray, np.ndarray]] = {}  # clean writes [P, D] and replacements [P, R, D]

    def sources(component: Component, clean: LayerClean) -> jax.Array:
        new = others(component, clean, draws)
        if component in shared:
            edits[component] = np.asarray(clean.writes[:, 0, component.site]), np.asarray(new)
        return new

    times: dict[str, list[float]] = collections.defaultdict(list)
    differences, largest = dict.fromkeys((peer.name for peer in peers), 0.0), 0.0
    for turn in range(ROUNDS):
        with apart() as spent:
            effects = walk(params, tokens, targets, components, draws, rows, sources)
        times["clean"].append(spent.clean)
        times["kernel"].append(spent.kernel)
        for index, component in enumerate(shared):
            prompt = (turn * PAIRS + index) % prompts
            ids, target = np.array(tokens[prompt], np.int64), int(targets[prompt])
            old, new = (values[prompt] for values in edits[component])
            ours = np.asarray(effects.total_effect[prompt, components.index(component), 0])
            largest = max(largest, float(np.abs(ours).max()))
            for peer in peers:
                alone, in_batch, theirs = _total_effects(peer, ids, target, component, old, new)
                times[peer.name].append(in_batch)
                times[f"{peer.name}, alone"].append(alone)
                differences[peer.name] = max(differences[peer.name], _difference(peer, component, theirs, ours))
    component_seconds = min(times["kernel"]) / len(components) + min(times["clean"]) / len(every)
    interventions = prompts * draws / component_seconds
    return [
        Compared(
            length=length,
            draws=draws,
            peer=peer.name,
            versions=peer.versions,
            peer_interventions=draws / min(times[peer.name]),
            peer_one_by_one=1 / min(times[f"{peer.name}, alone"]),
            interventions=interventions,
            ratio=interventions * min(times[peer.name]) / draws,
            ratio_one_by_one=interventions * min(times[f"{peer.name}, alone"]),
            difference=differences[peer.name],
            total_effect=largest,
        )
        for peer in peers
    ]


def _total_effects(
    peer: Peer, ids: np.ndarray, target: int, component: Component, old: np.ndarray, new: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Time one edit, and R at once, of a prompt's ids [T]: the clean write old [D] replaced by new [R, D].

    Returns:
      The seconds of one edit and of R at once, and the total effects [R].
    """
    # An edit that puts the clean write in its own place gives the clean run.
    alone, clean = timed(functools.partial(peer.run, ids[None], component, old[None]))
    spent, ablated = timed(functools.partial(peer.run, np.repeat(ids[None], len(new), axis=0), component, new))
    return alone, spent, _centred(clean, target) - _centred(ablated, target)


def _difference(peer: Peer, component: Component, theirs: np.ndarray, ours: np.ndarray) -> float:
    worst = float(np.abs(theirs - ours).max())
    if not worst <= TOLERANCE:  # NaN is wrong too
        raise UserError(
            f"{peer.name}, {component}: total effects differ from ours by {worst:.2g} logits, more than {TOLERANCE:g},"
            f" so rates would be of different things; try other versions than {peer.versions}"
        )
    return worst


def table(rows: Sequence[Compared]) -> str:
    """Return the figures as a table, a line for each length and peer."""
    lines = [
        f"{'tokens':>6} {'peer':18} {'hydra_jax':>10} {'one by one':>11} {'ratio':>6} {'batched':>8} {'ratio':>6}"
        f" {'difference':>11}  versions"
    ]
    lines += [
        f"{m.length:6} {m.peer:18} {m.interventions:10,.0f} {m.peer_one_by_one:11,.1f} {m.ratio_one_by_one:5,.0f}x"
        f" {m.peer_interventions:8,.1f} {m.ratio:5,.0f}x {m.difference:11.1e}  {m.versions}"
        for m in rows
    ]
    return "\n".join(lines)


def _spread(components: Sequence[Component], count: int) -> list[Component]:
    """Return `count` components at most, evenly spread, with the first and the last among them."""
    indices = np.linspace(0, len(components) - 1, min(count, len(components))).round().astype(int)
    return [components[index] for index in indices]


def _centred(logits: np.ndarray, target: int) -> np.ndarray:
    return logits[:, target] - logits.mean(axis=1)
