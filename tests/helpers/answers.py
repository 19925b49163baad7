"""Answers of the public functions of `hydra_jax`, and the same by hooks on whole passes of `transformers`."""

import numpy as np

import hydra_jax as hj
from hydra_jax.core.edits import ATTN, MLP, WHOLE
from hydra_jax.core.programs import Program, Word
from hydra_jax.text.tokenizer import encode
from tests.helpers import hooks

SITES = {"attn": [ATTN], "mlp": [MLP], "layer": [ATTN, MLP]}
NORM = "norm"
EVERYTHING = dict(metrics=["log_probability", "kl", "rank", "top_changed"], responders="heads")


class Both:
    """A model of ours and that of `transformers`, whose clean runs are made once; texts are read by `tokenizer`."""

    def __init__(self, ours, theirs):
        self.ours, self.theirs = ours, theirs
        self._seen = {}

    def ids(self, text):
        return encode(self.ours.tokenizer, text)

    def token(self, text):
        [token] = self.ids(text)
        return token

    def seen(self, text, place=-1):
        """The clean run of a text, looked at after a token."""
        if (text, place) not in self._seen:
            [self._seen[text, place]] = hooks.watched(self.theirs, self.ids(text), place=place)
        return self._seen[text, place]

    def read(self, text, place=-1, target=None, foil=None):
        """The ids of the target and the foil, which are given by their texts; None is the most likely, and no foil."""
        top = self.seen(text, place).logits.argmax() if target is None else self.token(target)
        return top, None if foil is None else self.token(foil)

    def program(self, cut, freeze=(), rest=Word.FOLLOW):
        """The words of a row, whose names are read here and not by the package."""
        c = self.ours.config
        writes, heads = np.full((c.layers, 2), int(rest)), np.full((c.layers, c.heads), int(Word.FOLLOW))
        for word, every in ((Word.CLAMP, [cut] if isinstance(cut, str) else cut), (Word.FREEZE, freeze)):
            for site, _, where in (name.partition(" ") for name in every if name != NORM):
                layer, _, head = where.partition(".")
                writes[int(layer), SITES[site]] = Word.FOLLOW if head else word
                if head:
                    heads[int(layer), int(head)] = word
        return Program(writes, heads, np.array(int(Word.FREEZE if NORM in freeze else Word.FOLLOW)))

    def rows(self, text, asked, place=-1, target=None, foil=None):
        """The effects of rows of a text: of each its program, and the clean runs whose mean takes the clamps' place."""
        clean = self.seen(text, place)
        rows = [(program, replacement(clean, seen)) for program, seen in asked]
        tokens = self.read(text, place, target, foil)
        return hooks.expected(self.theirs, self.ids(text), clean, rows, *tokens, place)


def replacement(clean, seen):
    """A function that returns what a component's clamp takes: the mean over some runs, or zero if there are none."""

    def value(component):
        name, last = ("mixed", component.head) if component.head != WHOLE else ("written", component.site)
        of_each = [getattr(one, name)[component.layer, last] for one in seen or [clean]]
        return np.mean(of_each, axis=0) * bool(seen)

    return value


def assert_close(name, found, by_hooks, tolerance):
    np.testing.assert_allclose(found, by_hooks, atol=tolerance, rtol=1e-5, err_msg=name)


def assert_answer(found, rows, target, clean, tolerance):
    """Compare all that is said of one ablation, a dataset along `replacement`, with rows of hooks, one for each."""
    for name in ("total_effect", "direct_effect", "norm_compensation"):
        assert_close(name, found[name], [getattr(row, name) for row in rows], tolerance)
    changes = np.stack([row.compensation for row in rows])
    for site, name in enumerate(("attn_compensation", "mlp_compensation")):
        assert_close(name, found[name], changes[..., site].sum(axis=1), tolerance)
    whole = {"compensation": changes.reshape(len(rows), -1)}
    if "head_compensation" in found:
        whole["head_compensation"] = np.stack([row.head_changes for row in rows])
    for name, by_hooks in whole.items():
        each = "replacement" in found[name].dims
        assert_close(name, found[name], by_hooks if each else by_hooks.mean(axis=0), tolerance)
    for name in ("log_probability_drop", "kl"):
        if name in found:
            assert_close(name, found[name], [getattr(row, name) for row in rows], tolerance)
    if "target_rank" in found:
        assert_ranks(found["target_rank"].values, rows, target, tolerance)
    if "top_changed" in found:
        for changed, row in zip(found["top_changed"].values, rows, strict=True):
            ahead = row.logits.max() - row.logits[clean.logits.argmax()]
            assert changed == (ahead > 0), f"by {ahead}"


def assert_ranks(found, rows, target, tolerance):
    """Compare ranks, which tokens as likely as the target but for rounding leave open."""
    for rank, row in zip(found, rows, strict=True):
        least, most = ((row.logits > row.logits[target] + by).sum() for by in (tolerance, -tolerance))
        assert least <= rank < most, (least, rank, most)


def place_of(both, text, position):
    """The place of the token that a position means."""
    if isinstance(position, int):
        return position % len(both.ids(text))
    until = text[: text.index(position) + len(position)]
    assert both.ids(text)[: len(both.ids(until))] == both.ids(until)
    return len(both.ids(until)) - 1


class Asked:
    """A question that is swept: the answer, and the rows of hooks that are to equal it.

    Attributes:
      found: the dataset.
      places: of each prompt the token after which it is read.
    """

    def __init__(self, both, texts, cuts, words):
        self._both, self._texts, self._words = both, texts, words
        positions = words.get("positions", [-1])
        each = positions if isinstance(positions[0], list) else [positions] * len(texts)
        self.places = [place_of(both, text, place) for text, [place] in zip(texts, each, strict=True)]
        self.found = hj.sweep(both.ours, texts, components=cuts, **{"edges": False, **EVERYTHING, **words})
        assert self.found["text"].values.tolist() == list(texts)
        freeze = words.get("freeze", [])
        programs = {"": [both.program(cut, freeze) for cut in cuts]}
        if freeze:
            programs["free"] = [both.program(cut) for cut in cuts]
        if words.get("edges"):
            programs["edges"] = [both.program(cut, rest=Word.PROBE) for cut in cuts]
        self._read = {name: words.get(name) for name in ("target", "foil")}
        self._rows = []
        for number, (text, place) in enumerate(zip(texts, self.places, strict=True)):
            draws = self._draws(number)
            asked = [(one, draw) for every in programs.values() for one in every for draw in draws]
            rows = iter(both.rows(text, asked, place, **self._read))
            self._rows.append({name: [[next(rows) for _ in draws] for _ in every] for name, every in programs.items()})

    def _draws(self, number):
        """Of each replacement of a prompt, the clean runs whose mean it is."""
        words, both, text = self._words, self._both, self._texts[number]
        if words.get("kind") == "zero":
            return [[]]
        if words.get("kind") == "mean":
            return [[both.seen(source) for source in words["sources"] if source != text]]
        if "paired" in words:
            source = words["paired"][number]
            if len(both.ids(source)) == len(both.ids(text)):
                return [[both.seen(source, self.places[number])]]
            asked = words["positions"][number][0] if "positions" in words else -1
            return [[both.seen(source, place_of(both, source, asked))]]
        if "sources" in words:
            return [[both.seen(source)] for source in words["sources"]]
        drawn = self.found["source"].values[number]
        assert number not in drawn
        return [[both.seen(self._texts[source], self.places[source])] for source in drawn]

    def check(self, number, tolerance):
        """Compare all that is said of an ablation in every prompt; return the total effects of the rows."""
        for index, (text, place, rows) in enumerate(zip(self._texts, self.places, self._rows, strict=True)):
            one, clean = self.found.isel(prompt=index, ablated=number), self._both.seen(text, place)
            target, foil = self._both.read(text, place, **self._read)
            assert one["target_id"] == target
            assert_answer(one, rows[""][number], target, clean, tolerance)
            assert_close("clean_logit", one["clean_logit"], hooks.contrast(clean.logits, target, foil), tolerance)
            said = np.exp(hooks.log_probabilities(self._both.theirs, clean.logits)[target])
            assert_close("clean_probability", one["clean_probability"], said, tolerance)
            adds = hooks.adds(self._both.theirs, clean.written, clean, target, foil)
            assert_close("delta_unembed", one["delta_unembed"], adds.ravel(), tolerance)
            assert ("free_total_effect" in one, "direct_edge" in one) == ("free" in rows, "edges" in rows)
            if "free" in rows:
                free = [row.total_effect for row in rows["free"][number]]
                assert_close("free_total_effect", one["free_total_effect"], free, tolerance)
            if "edges" in rows:
                edges = np.mean([row.compensation for row in rows["edges"][number]], axis=0)
                assert_close("direct_edge", one["direct_edge"], edges.ravel(), tolerance)
        return [row.total_effect for rows in self._rows for row in rows[""][number]]
