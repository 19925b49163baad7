import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.errors import UserError
from hydra_jax.sweep.draws import Pool
from hydra_jax.sweep.items import Item
from hydra_jax.text.prompts import Prompt

ids = st.lists(st.text(min_size=1, max_size=6), min_size=4, max_size=12, unique=True)


def items(names, **fields):
    """Prompts of these ids; of each field one value a prompt."""
    each = [{key: values[number] for key, values in fields.items()} for number in range(len(names))]
    lengths = [one.pop("length", 3) for one in each]
    made = [Prompt(name, f"text of {name}", **one) for name, one in zip(names, each, strict=True)]
    return [Item(prompt, (0,) * length, text_id=prompt.id) for prompt, length in zip(made, lengths, strict=True)]


def drawn(names, draws, seed=0, match="", **fields):
    made = items(names, **fields)
    return Pool(made, match).draw(made, draws, seed)


@pytest.mark.slow
@given(ids, st.randoms(), st.integers(0, 3))
def test_sources_follow_the_id_and_not_the_order(ids, random, seed):
    other = ids.copy()
    random.shuffle(other)

    def by_id(ids):
        return {i: [ids[s] for s in row] for i, row in zip(ids, drawn(ids, 3, seed), strict=True)}

    first = by_id(ids)
    assert first == by_id(other)
    for i, sources in first.items():
        assert i not in sources
        assert len(set(sources)) == 3


def test_sources_are_drawn_evenly():
    counts = np.bincount(drawn([f"p{number}" for number in range(300)], 15).ravel(), minlength=300)
    # Each is binomial: mean 15, variance about 15.
    assert abs(counts.mean() - 15) < 1e-9
    assert 10 < counts.var() < 20


def test_another_seed_draws_others():
    names = [f"p{number}" for number in range(30)]
    first, second = (drawn(names, 5, seed) for seed in (0, 1))
    assert (first != second).mean() > 0.5


def test_too_few_prompts_for_the_replacements_are_refused():
    with pytest.raises(UserError, match="3 in the sweep, but 3 replacements need 4"):
        drawn(["a", "b", "c"], 3)


@given(st.lists(st.sampled_from("xyz"), min_size=6, max_size=20), st.integers(0, 3))
def test_matched_prompts_draw_from_those_alike(kinds, seed):
    names = [f"p{number:02}" for number in range(len(kinds))]
    for match, fields in {"relation": {"relation": kinds}, "length": {"length": [ord(kind) for kind in kinds]}}.items():
        made = items(names, **fields)
        pool = Pool(made, match)
        able = [item for item in made if pool.others(item) >= 2]
        assert [pool.others(item) for item in made] == [kinds.count(kind) - 1 for kind in kinds]
        for item, row in zip(able, pool.draw(able, 2, seed), strict=True):
            kind = kinds[made.index(item)]
            assert {kinds[index] for index in row} == {kind}
            assert made.index(item) not in row
            assert len(set(row.tolist())) == 2


def test_a_text_is_not_drawn_for_itself_at_another_token_or_under_another_id():
    made = [Item(Prompt(f"a@{place}", "one text"), (0,) * (place + 1), text_id="a") for place in range(5)]
    made += [Item(Prompt("again", "one text"), (0,) * 5, text_id="again")]
    made += items(["b", "c"])
    pool = Pool(made)
    for row in pool.draw(made[:6], 2, 0):
        assert sorted(row.tolist()) == [6, 7]
    assert pool.own(made[0]) == [0, 1, 2, 3, 4, 5]
    assert pool.others(made[6]) == 7


def test_a_pool_of_other_prompts_draws_what_it_would_with_the_prompt_among_them():
    """A prompt by itself, with sources of its own, has the draws of a sweep over all of them."""
    made = items([f"p{number}" for number in range(9)])
    swept = Pool(made).draw(made, 4, 7)
    for index, item in enumerate(made):
        others = [other for other in made if other is not item]
        alone = Pool(others).draw([item], 4, 7)[0]
        assert [others[place] for place in alone] == [made[place] for place in swept[index]]
