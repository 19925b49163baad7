"""Whole passes of `transformers` models whose hooks set a token's writes and heads, and the effects that they have."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from hydra_jax.core.edits import ATTN, WHOLE
from hydra_jax.core.programs import Word
from tests.helpers import families, programs

# The threads of JAX keep the cores busy, and those of PyTorch spin while they wait for each other: one is many times
# as fast.
torch.set_num_threads(1)


class Edit(NamedTuple):
    """What hooks set in a row: writes by (layer, site), and what heads mix by (layer, head)."""

    writes: dict
    mixed: dict


CLEAN = Edit({}, {})


class Seen(NamedTuple):
    """One token of one pass.

    Attributes:
      computed: [L, 2, D], the writes that modules computed.
      written: [L, 2, D], those that took their place.
      mixed: [L, H, head_dim], what the heads' projection read.
      shares: [L, H, D], each head's part of what attention computed.
      embedded: [D], the stream before the first layer.
      final: [D], the stream that the final norm reads.
      logits: [V], before any soft-cap.
    """

    computed: np.ndarray
    written: np.ndarray
    mixed: np.ndarray
    shares: np.ndarray
    embedded: np.ndarray
    final: np.ndarray
    logits: np.ndarray


def watched(model, ids, edits=(CLEAN,), place=-1):
    """One pass over as many copies of a text as there are edits; returns what is seen of the token in each."""
    kind, heads = model.config.model_type, model.config.num_attention_heads
    seen, handles = {}, []

    def token(tensors):
        tensor = tensors[0] if isinstance(tensors, tuple) else tensors
        return tensor.reshape(len(edits), len(ids), -1)[:, place]  # a view

    def enter(module, arguments):
        seen["embedded"] = token(arguments).clone()

    def set_heads(layer, module, arguments):
        of_heads = token(arguments).unflatten(-1, (heads, -1))
        for row, edit in enumerate(edits):
            for (number, head), value in edit.mixed.items():
                if number == layer:
                    of_heads[row, head] = torch.tensor(value)
        seen["mixed", layer] = of_heads.clone()

    def project(layer, module, arguments, output):
        alone = torch.eye(heads)[:, :, None] * seen["mixed", layer][:, None]
        of_each = torch.nn.functional.linear if hasattr(module, "in_features") else torch.matmul  # GPT-2's is [in, out]
        seen["shares", layer] = of_each(alone.flatten(-2), module.weight)
        seen["projected", layer] = token(output).clone()

    def write(place, module, arguments, output):
        seen["computed", place] = token(output).clone()
        for row, edit in enumerate(edits):
            if place in edit.writes:
                token(output)[row] = torch.tensor(edit.writes[place])
        seen["written", place] = token(output).clone()

    def finish(module, arguments, output):
        seen["final"], seen["normed"] = token(arguments).clone(), token(output).clone()

    for number, layer in enumerate(families.layers(model)):
        if not number:
            handles.append(layer.register_forward_pre_hook(enter))
        projection = layer.get_submodule(families.PROJECTIONS.get(kind, "self_attn.o_proj"))
        handles.append(projection.register_forward_pre_hook(functools.partial(set_heads, number)))
        handles.append(projection.register_forward_hook(functools.partial(project, number)))
        for site, name in enumerate(families.WRITES.get(kind, ("self_attn", "mlp"))):
            hook = functools.partial(write, (number, site))
            handles.append(layer.get_submodule(name).register_forward_hook(hook))
    handles.append(families.final_norm(model).register_forward_hook(finish))
    with torch.no_grad():
        families.decoder(model)(torch.tensor([ids] * len(edits)), use_cache=False)
        for handle in handles:
            handle.remove()
        layers = range(len(families.layers(model)))
        logits = model.get_output_embeddings()(seen["normed"])
        # A post-norm multiplies each number of the heads' sum, and so of each share.
        shares = [seen["shares", n] * (seen["computed", (n, ATTN)] / seen["projected", n])[:, None] for n in layers]
        of_sites = (
            torch.stack([torch.stack([seen[what, (n, site)] for site in range(2)], 1) for n in layers], 1)
            for what in ("computed", "written")
        )
        of_layers = torch.stack([seen["mixed", n] for n in layers], 1), torch.stack(shares, 1)
    every = [part.numpy() for part in (*of_sites, *of_layers, seen["embedded"], seen["final"], logits)]
    return [Seen(*(part[row] for part in every)) for row in range(len(edits))]


def with_divisor(model, seen, divisor):
    """The logits of a pass whose final norm had divided by `divisor`, before any soft-cap."""
    norm = families.final_norm(model)
    bias = norm.bias if getattr(norm, "bias", None) is not None else torch.zeros(())
    with torch.no_grad():
        normed = norm(torch.from_numpy(seen.final)) - bias
        normed = normed * float(families.divisor(model, seen.final) / divisor) + bias
        return model.get_output_embeddings()(normed).numpy()


def contrast(logits, target, foil):
    """What is read of logits [V]: the target's, less the foil's or, where that is None, the mean."""
    return logits[target] - (logits.mean() if foil is None else logits[foil])


def adds(model, vector, clean, target, foil):
    """What a part [..., D] of the stream adds to what is read, the clean run's divisor held."""
    of_target = families.contribution(model, vector, clean.final, target)
    return of_target - (0 if foil is None else families.contribution(model, vector, clean.final, foil))


def log_probabilities(model, logits):
    """The next token's distribution, in nats, of logits [V] before any soft-cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.log_softmax(torch.from_numpy(cap * np.tanh(logits / cap) if cap else logits), 0).numpy()


class Expected(NamedTuple):
    """The effects of a row, as `Effects` and `Metrics` name them; changes of components and heads, [L, 2], [L, H]."""

    total_effect: float
    direct_effect: float
    norm_compensation: float
    compensation: np.ndarray
    head_changes: np.ndarray
    log_probability_drop: float
    kl: float
    logits: np.ndarray


def expected(model, ids, clean, rows, target, foil, place=-1):
    """Run rows by hooks, beside their clean run.

    Args:
      model: that of `transformers`.
      ids: the text's tokens.
      clean: its clean run, by `watched`.
      rows: of each its program, and a function that returns what a component's clamp takes.
      target: the token that is read.
      foil: the token whose logit is subtracted; None for the mean.
      place: the token after which the text is read and edited.
    """
    edits = [_edit(clean, *row) for row in rows]
    # Heads that are clamped in one layer, and nothing else: what of the write's change is theirs.
    alone = [
        (row, layer, Edit({}, {where: edit.mixed[where] for where in edit.mixed if where[0] == layer and heads[where]}))
        for row, (edit, heads) in enumerate(zip(edits, [asked.heads == Word.CLAMP for asked, _ in rows], strict=True))
        for layer in np.flatnonzero(heads.any(axis=1))
    ]
    seen = watched(model, ids, [*edits, *(edit for _, _, edit in alone)], place)
    parts = [{} for _ in rows]
    for (row, layer, _), ran in zip(alone, seen[len(rows) :], strict=True):
        changes = ran.written[layer, ATTN] - clean.written[layer, ATTN], ran.shares[layer] - clean.shares[layer]
        parts[row][layer] = [adds(model, change, clean, target, foil) for change in changes]
    return [
        _effects(model, clean, ran, asked, of_heads, target, foil)
        for ran, (asked, _), of_heads in zip(seen, rows, parts, strict=False)
    ]


def _edit(clean, asked, values):
    """What hooks set in a program's row."""
    writes = {where: clean.written[where] for where in map(tuple, np.argwhere(asked.writes != Word.FOLLOW))}
    heads = {where: clean.mixed[where] for where in map(tuple, np.argwhere(asked.heads == Word.FREEZE))}
    for component in programs.clamped(asked):
        if component.head == WHOLE:
            writes[component.layer, component.site] = values(component)
        else:
            heads[component.layer, component.head] = values(component)
    return Edit(writes, heads)


def _effects(model, clean, row, asked, of_heads, target, foil):
    """The effects of a row; `of_heads` is by layer what the heads clamped there change by themselves.

    That is of the whole write, and of each head's share: a post-norm rescales those of the others, too.
    """
    read = functools.partial(adds, model, clean=clean, target=target, foil=foil)
    changes = read(row.computed - clean.computed)
    clamps = asked.writes == Word.CLAMP
    direct = -read(row.written - clean.written)[clamps].sum() - sum(part for part, _ in of_heads.values())
    changes[np.isin(asked.writes, (Word.CLAMP, Word.FREEZE))] = 0
    head_changes = read(row.shares - clean.shares)
    for layer, (part, shares) in of_heads.items():
        changes[layer, ATTN] -= part
        head_changes[layer] -= shares
    head_changes[np.isin(asked.writes[:, ATTN], (Word.CLAMP, Word.FREEZE))] = 0
    head_changes[asked.heads != Word.FOLLOW] = 0

    frozen = with_divisor(model, row, families.divisor(model, clean.final))
    logits = frozen if asked.norm == Word.FREEZE else row.logits
    before, after = log_probabilities(model, clean.logits), log_probabilities(model, logits)
    return Expected(
        total_effect=contrast(clean.logits, target, foil) - contrast(logits, target, foil),
        direct_effect=direct,
        norm_compensation=contrast(logits, target, foil) - contrast(frozen, target, foil),
        compensation=changes,
        head_changes=head_changes,
        log_probability_drop=before[target] - after[target],
        kl=(np.exp(before) * (before - after)).sum(),
        logits=logits,
    )
