"""Public functions against PyTorch: sweeps, single ablations, pairs, cascades and contributions by forward hooks."""

import itertools

import numpy as np
import pytest

import hydra_jax as hj
from hydra_jax.core.edits import MLP
from hydra_jax.core.programs import Word

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

from tests.helpers import answers, families, hooks
from tests.helpers.answers import EVERYTHING, Asked, assert_close, place_of

TOLERANCE = 5e-4
"""In logits and nats; differences were at most 7e-5."""

PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "Water freezes at zero and boils at one hundred degrees",
    "He tuned the old guitar, sat down and began to",
)
SOURCES = (
    "The opposite of hot is",
    "My aunt bakes bread on Sundays, and on Mondays she bakes",
    "The first month of the year is called",
)
PAIRED = (
    "The Brandenburg Gate is located in the city of",
    "Iron melts at one thousand five hundred degrees",
    "He tuned the old piano, sat down and began to",
)
PLACES = [["Tower"], [3], [-2]]

CUTS = (
    "attn 23",
    ["attn 23", "mlp 28"],
    ["attn 5", "mlp 11", "attn 27"],
    "layer 20",
    ["attn 14.4", "attn 20.3", "attn 23.8"],
    ["attn 23.1", "mlp 26"],
)
REPAIRERS = ["attn 24", "attn 29", "mlp 29"]
QUESTIONS = {
    "zero": dict(kind="zero", edges=True),
    "zero, heads and the norm frozen": dict(
        kind="zero", freeze=["attn 24.3", "attn 24.6", "attn 29.0", "mlp 27", "norm"]
    ),
    "zero, a foil": dict(kind="zero", target=" a", foil=" the", freeze=REPAIRERS),
    "zero, at places": dict(kind="zero", positions=PLACES, freeze=["layer 24", "attn 28.2"]),
    "another text": dict(sources=SOURCES[:1], freeze=REPAIRERS),
    "another text, at places": dict(sources=SOURCES[1:2], positions=PLACES),
    "each other": dict(replacements=2),
    "each other, at places": dict(replacements=2, positions=PLACES, foil=" the"),
    "mean": dict(kind="mean", sources=[PROMPTS[0], *SOURCES], freeze=["mlp 21", "norm"]),
    "paired": dict(paired=PAIRED, freeze=["layer 24", "mlp 29"]),
    "paired, at places": dict(paired=PAIRED, positions=PLACES),
}
ABLATIONS = {
    "a head beside a frozen one": (0, "attn 23.1", dict(kind="zero", freeze=["attn 23.5", "attn 24.3"])),
    "five": (1, ["mlp 0", "attn 12", "mlp 20", "attn 23", "mlp 28"], dict(kind="zero")),
    "layers": (2, ["layer 10", "layer 20"], dict(kind="mean", sources=SOURCES)),
    "paired": (0, ["attn 20", "mlp 20"], dict(paired=PAIRED[0], foil=" London", target=" Paris", freeze="mlp 29")),
    "a word": (1, "mlp 0", dict(kind="zero", positions="zero", freeze=["norm"])),
    "a place": (2, ["attn 1.2", "mlp 2"], dict(sources=SOURCES[:1], positions=[4])),
}
STEPS = 5
CASCADES = {
    "zero": dict(kind="zero"),
    "from attention 23": dict(kind="zero", start="attn 23", freeze=["mlp 29", "norm"]),
    "another text": dict(sources=SOURCES[:1], foil=" the", freeze=["attn 24.3"]),
}
CONTRIBUTIONS = (
    (0, dict()),
    (1, dict(target=" a", foil=" the", heads=True)),
    (0, dict(positions=["Tower"], heads=True)),
    (2, dict(positions=[3], foil=" the")),
)
EIGHT = (
    "Snow is white and coal is",
    "The capital of Japan is called",
    "One, two, three, four,",
    "She opened the door and",
    "Cats chase mice, and dogs chase",
    "In winter it is cold, in summer it is",
    "The sun rises in the",
    "Romeo and",
)
TWELVE = (
    *("attn 0", "mlp 0", "attn 5", "mlp 12", "attn 20.3", "attn 23", "attn 24", "attn 26.2", "mlp 26", "attn 29"),
    *(["attn 27", "mlp 28"], "mlp 29"),
)
TINY_EIGHT = ("the 1", "of the 2", "in x", "the x of the", "it in the 3", "of 7 in", "on the", "xx of 12")
TINY_TWELVE = (
    *("attn 0", "mlp 0", "attn 1", "mlp 1", "attn 2.0", "attn 2.1", "attn 2.3", "mlp 2"),
    *("attn 3.0", ["attn 3.1", "attn 3.2"], "attn 3.3", "mlp 3"),
)
TINY_TEXTS = ("the 3 of xx in", "in the of the 12", "of it, 7")
TINY_CUTS = ("attn 1", ["attn 0", "mlp 2"], ["attn 1.3", "attn 2.1", "mlp 3"])
TINY_QUESTIONS = {
    "each other": dict(replacements=2, freeze=["attn 3.1", "mlp 1"], edges=True, foil="o"),
    "mean": dict(kind="mean", sources=["of the", *TINY_TEXTS[:2]], positions=[2], freeze=["norm"]),
}


@pytest.fixture(scope="module")
def real(smollm2):
    from hydra_jax.benchmarks.peers import llama

    return answers.Both(smollm2, llama(smollm2.params))


@pytest.fixture(scope="module", params=["gpt2", "pythia", "gemma2"])
def tiny(request, tmp_path_factory):
    theirs = families.made(request.param)
    return answers.Both(hj.load(str(families.saved(theirs, tmp_path_factory.mktemp("saved")))), theirs)


@pytest.fixture(scope="module")
def questions(real):
    """The questions that were asked, by name: each is swept once."""
    return {}


@pytest.mark.parametrize("cut", range(len(CUTS)), ids=[str(cut) for cut in CUTS])
@pytest.mark.parametrize("name", QUESTIONS)
def test_sweeps_of_the_real_model_equal_hooks(real, questions, name, cut):
    if name not in questions:
        questions[name] = Asked(real, PROMPTS, CUTS, QUESTIONS[name])
    totals = questions[name].check(cut, TOLERANCE)
    assert np.abs(totals).max() > 0.01


@pytest.mark.parametrize("name", TINY_QUESTIONS)
def test_sweeps_of_other_families_equal_hooks(tiny, name):
    asked = Asked(tiny, TINY_TEXTS, TINY_CUTS, TINY_QUESTIONS[name])
    for number in range(len(TINY_CUTS)):
        totals = asked.check(number, 1e-4)
        assert np.abs(totals).max() > 0.01


@pytest.mark.parametrize("name", ABLATIONS)
def test_one_ablation_of_the_real_model_equals_hooks(real, name):
    number, cut, words = ABLATIONS[name]
    text = PROMPTS[number]
    found = hj.ablate(real.ours, text, cut, replacements=1, **EVERYTHING, **words)
    position = words.get("positions", -1)
    place = place_of(real, text, position[0] if isinstance(position, list) else position)
    sources = [words["paired"]] if "paired" in words else words.get("sources", ())
    freeze = [words["freeze"]] if isinstance(words.get("freeze"), str) else words.get("freeze", ())
    programs = [real.program(cut, freeze), real.program(cut)]
    at = -1 if "paired" not in words else place
    read = {name: words.get(name) for name in ("target", "foil")}
    asked = [(one, [real.seen(source, at) for source in sources]) for one in programs]
    row, free = real.rows(text, asked, place, **read)
    target, foil = real.read(text, place, **read)
    clean = real.seen(text, place)
    answers.assert_answer(found, [row], target, clean, TOLERANCE)
    if freeze:
        assert_close("free_total_effect", found["free_total_effect"], [free.total_effect], TOLERANCE)
    adds = hooks.adds(real.theirs, clean.written, clean, target, foil).ravel()
    assert_close("delta_unembed", found["delta_unembed"], adds, TOLERANCE)
    after, cuts = adds + row.compensation.ravel(), programs[0].clamps.ravel()
    after[cuts] = after[cuts] - row.direct_effect if cuts.sum() == 1 else np.nan
    assert_close("ablated_unembed", found["ablated_unembed"], [after], TOLERANCE)
    assert abs(row.total_effect) > 0.1


def test_what_attention_23_costs_where_its_repairers_are_frozen(real):
    drops = {}
    for freeze in ([], REPAIRERS):
        found = hj.ablate(real.ours, PROMPTS[0], "attn 23", kind="zero", freeze=freeze)
        drops[len(freeze)] = round(found["total_effect"].item(), 2)
    assert drops == {0: -0.36, 3: 9.88}
    assert round(found["free_total_effect"].item(), 2) == -0.36


def test_sources_that_are_few_are_each_drawn_once(real):
    found = hj.ablate(real.ours, PROMPTS[1], "layer 20", sources=[PROMPTS[1], *SOURCES], freeze=["mlp 29"])
    program = real.program("layer 20", ["mlp 29"])
    rows = real.rows(PROMPTS[1], [(program, [real.seen(source)]) for source in SOURCES])
    by_hooks = sorted(row.total_effect for row in rows)
    assert_close("total_effect", np.sort(found["total_effect"]), by_hooks, TOLERANCE)


@pytest.mark.parametrize("name", CASCADES)
def test_every_step_of_a_cascade_is_a_joint_ablation(real, name):
    words = CASCADES[name]
    found = hj.cascade(real.ours, PROMPTS, steps=STEPS, **words)
    cuts = [[one for one in row if one] for row in found["cut_name"].values.tolist()]
    sets = {(number, step): tuple(row[: step + 1]) for number, row in enumerate(cuts) for step in range(len(row))}
    different = sorted({tuple(sorted(each)) for each in sets.values()})
    asked = {key: value for key, value in words.items() if key != "start"}
    metrics = dict(metrics=["log_probability", "rank"], edges=False)
    swept = hj.sweep(real.ours, PROMPTS, components=list(map(list, different)), **metrics, **asked)
    for number, step in np.ndindex(len(PROMPTS), STEPS):
        one = found.isel(prompt=number, cut=step)
        if (number, step) not in sets:
            assert np.isnan(one[["cut_logit", "cut_probability", "cut_rank", "cut_compensation"]].to_array()).all()
            rose = found["cut_compensation"][number, step - 1].values.copy()
            rose[[2 * int(one.split()[1].split(".")[0]) for one in words.get("freeze", ()) if "." in one]] = 0
            assert not (rose > 0).any()  # nothing repaired any more, but attention some of whose heads are frozen
            continue
        joint = swept.isel(prompt=number, ablated=different.index(tuple(sorted(sets[number, step]))))
        assert_close("cut_logit", one["cut_logit"], joint["clean_logit"] - joint["total_effect"], TOLERANCE)
        left = joint["clean_probability"] * np.exp(-joint["log_probability_drop"])
        assert_close("cut_probability", one["cut_probability"], left, TOLERANCE)
        np.testing.assert_array_equal(one["cut_rank"], joint["target_rank"])
        assert_close("cut_compensation", one["cut_compensation"], joint["compensation"], TOLERANCE)
    leads = (found["cut_rank"].values[..., 0] == 0).cumprod(axis=1).sum(axis=1)
    np.testing.assert_array_equal(found["survived"], leads)
    assert max(map(len, cuts)) > 2
    assert len(set(map(tuple, cuts))) > 1
    assert_cuts_equal_hooks(real, found.isel(prompt=0), cuts[0], words)


def assert_cuts_equal_hooks(both, found, cuts, words):
    """Compare the cascade of the first prompt with hooks: what is cut, and what is left."""
    freeze, seen = words.get("freeze", []), [both.seen(source) for source in words.get("sources", ())]
    programs = [both.program(cuts[: step + 1], freeze) for step in range(len(cuts))]
    target, foil = both.read(PROMPTS[0], foil=words.get("foil"))
    clean = both.seen(PROMPTS[0])
    rising = hooks.adds(both.theirs, clean.written, clean, target, foil)
    rising[both.program([], freeze).writes == Word.FREEZE] = 0
    rising[:, MLP] = -np.inf  # an MLP is not the first
    rows = both.rows(PROMPTS[0], [(program, seen) for program in programs], foil=words.get("foil"))
    for step, (name, row) in enumerate(zip(cuts, rows, strict=True)):
        layer, site = np.unravel_index(rising.argmax(), rising.shape)
        assert name == (words["start"] if not step and "start" in words else f"{('attn', 'mlp')[site]} {layer}")
        one, rising = found.isel(cut=step), row.compensation
        assert_close("cut_logit", one["cut_logit"], [hooks.contrast(row.logits, target, foil)], TOLERANCE)
        said = np.exp(hooks.log_probabilities(both.theirs, row.logits)[target])
        assert_close("cut_probability", one["cut_probability"], [said], TOLERANCE)
        answers.assert_ranks(one["cut_rank"].values, [row], target, TOLERANCE)
        assert_close("cut_compensation", one["cut_compensation"], rising.ravel(), TOLERANCE)


def together(*cuts):
    """The names of what is ablated together of some components, or sets of them."""
    return [name for cut in cuts for name in ([cut] if isinstance(cut, str) else cut)]


def assert_sums(model, texts, cuts, at_once, **words):
    """Compare interactions with sums of sweeps of single components, and of pairs, so many in each; return them."""
    words |= dict(responders="heads")
    found = hj.interactions(model, texts, cuts, **words)
    assert found["first"].values.tolist() == [" + ".join(together(cut)) for cut in cuts]
    single = hj.sweep(model, texts, components=list(cuts), edges=False, **words)
    alone = single["total_effect"].values
    assert_close("single_effect", found["single_effect"], alone, TOLERANCE)
    pairs = list(itertools.combinations(range(len(cuts)), 2))
    assert len(pairs) == 66
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        asked = [together(cuts[one], cuts[other]) for one, other in some]
        joint = hj.sweep(model, texts, components=asked, edges=False, **words)
        np.testing.assert_array_equal(joint["source"], single["source"])
        for number, pair in enumerate(some):
            both = joint["total_effect"].values[:, number]
            for first, second in (pair, pair[::-1]):
                entry = found.isel(first=first, second=second)
                sums = dict(joint_effect=both, interaction=both - alone[:, first] - alone[:, second])
                for name, value in (sums | dict(effect_after=both - alone[:, first])).items():
                    assert_close(name, entry[name], value, TOLERANCE)
                one = single.isel(ablated=first)
                assert_close(
                    "woken", entry["woken"], sum(change(one, name) for name in together(cuts[second])), TOLERANCE
                )
    return found


def change(one, name):
    """The change of a component's contribution in every prompt, by its name."""
    site, _, where = name.partition(" ")
    layer, _, head = where.partition(".")
    if head:
        return one["head_compensation"].values[:, int(layer), int(head)]
    return one["compensation"].values[:, 2 * int(layer) + (site == "mlp")]


def test_every_pair_of_the_real_model_is_a_sum_of_sweeps_and_of_hooks(real):
    found = assert_sums(real.ours, EIGHT, TWELVE, 11, kind="zero")
    assert (np.abs(found["interaction"]) > 1).any()
    pairs = list(itertools.combinations(range(len(TWELVE)), 2))
    programs = [
        real.program(together(*(TWELVE[index] for index in pair))) for pair in [*pairs, *((n,) for n in range(12))]
    ]
    rows = real.rows(EIGHT[0], [(program, []) for program in programs])
    totals = [row.total_effect for row in rows]
    for (first, second), joint in zip(pairs, totals[:66], strict=True):
        interaction = joint - totals[66 + first] - totals[66 + second]
        assert_close("interaction", found["interaction"][0, first, second], [interaction], TOLERANCE)


def test_every_pair_of_a_tiny_model_is_a_sum_of_sweeps(tmp_path):
    model = hj.load(str(families.saved(families.made("gpt2"), tmp_path)))
    found = assert_sums(model, TINY_EIGHT, TINY_TWELVE, 1, replacements=2)
    assert found.sizes["replacement"] == 2
    assert (np.abs(found["interaction"]) > 0.01).any()


def assert_parts(both, text, place, found, foil_and_target, tolerance):
    """Compare contributions with hooks."""
    target, foil = both.read(text, place, **foil_and_target)
    clean = both.seen(text, place)
    assert (found.attrs["target_id"], found.attrs["position"]) == (target, place)

    def adds(vector):
        return hooks.adds(both.theirs, vector, clean, target, foil)

    writes, heads, of_parts = adds(clean.written), adds(clean.shares), {"embedding": adds(clean.embedded)}
    for layer, site in np.ndindex(writes.shape):
        of_parts[f"{('attn', 'mlp')[site]} {layer}"] = writes[layer, site]
    for layer, head in np.ndindex(heads.shape):
        of_parts[f"attn {layer}.{head}"] = heads[layer, head]
        of_parts[f"attn {layer} bias"] = writes[layer, 0] - heads[layer].sum()
    for name in set(found["part"].values) - {"constant"}:
        assert_close("contribution", found["contribution"].sel(part=name), of_parts[name], tolerance)
    says = hooks.contrast(clean.logits, target, foil)
    for total in (found["contribution"].sum(), found["accumulated"][-1], found["lens_logit"][-1]):
        assert_close("sum of contributions", total, says, tolerance)
    assert_close("clean_logit", found.attrs["clean_logit"], says, tolerance)


@pytest.mark.parametrize("number", range(len(CONTRIBUTIONS)), ids=[str(words) for _, words in CONTRIBUTIONS])
def test_contributions_of_the_real_model_add_up_and_equal_hooks(real, number):
    index, words = CONTRIBUTIONS[number]
    text = PROMPTS[index]
    place = place_of(real, text, words.get("positions", [-1])[0])
    found = hj.contributions(real.ours, text, **words)
    read = {name: words[name] for name in ("target", "foil") if name in words}
    assert_parts(real, text, place, found, read, TOLERANCE)
    assert found.sizes["part"] == 2 + 30 * (1 + (9 if words.get("heads") else 1))


@pytest.mark.parametrize("heads", [False, True])
def test_contributions_of_other_families_add_up_and_equal_hooks(tiny, heads):
    found = hj.contributions(tiny.ours, TINY_TEXTS[0], foil="o", heads=heads, positions=[3])
    assert_parts(tiny, TINY_TEXTS[0], 3, found, dict(foil="o"), 1e-4)
