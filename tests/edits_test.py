import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.core.edits import (
    ATTN,
    MLP,
    SITES,
    WHOLE,
    Component,
    Kind,
    WriteStatistics,
    all_components,
    replacement,
)
from hydra_jax.errors import UserError


def test_components_come_in_forward_order():
    components = all_components(3)
    assert [c.index for c in components] == list(range(6))
    assert sorted(components) == components
    assert [str(c) for c in components[:3]] == ["attn 0", "mlp 0", "attn 1"]
    assert Component(2, SITES.index("mlp")) == components[-1]


components = st.builds(Component, st.integers(0, 99), st.just(ATTN), st.integers(WHOLE, 64)) | st.builds(
    Component, st.integers(0, 99), st.just(MLP)
)


@given(components)
def test_a_component_is_what_its_name_says(component):
    assert Component.parse(str(component)) == component
    assert Component.named(component.layer, SITES[component.site], component.head) == component


def test_names_of_components():
    assert str(Component(23, ATTN)) == "attn 23"
    assert str(Component(23, ATTN, 4)) == "attn 23.4"
    assert Component.parse("  mlp   29 ") == Component(29, MLP)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attn",
        "attn 1.",
        "attn .1",
        "attn 1.2.3",
        "mlp 1.2",
        "resid 3",
        "attn x",
        "attn \u0661",
        "a" * 999,
    ],
)
def test_what_names_no_component_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"give e\.g\. 'attn 23'") as raised:
        Component.parse(text)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(("heads", "units"), [(4, 12), (8, 24)])
def test_units_count_all_things_alike(heads, units):
    assert [component.unit(heads) for component in all_components(3)] == list(range(6))
    every = [Component(layer, ATTN, head) for layer in range(3) for head in range(heads)]
    assert [component.unit(heads) for component in every] == list(range(units))


def test_what_each_kind_needs():
    assert {kind: (kind.draws, kind.needs_sources, kind.needs_statistics) for kind in Kind} == {
        Kind.RESAMPLE: (True, True, False),
        Kind.MEAN: (False, False, True),
        Kind.ZERO: (False, False, False),
        Kind.NOISE: (True, False, True),
    }


def test_replacements_are_what_their_kind_says():
    source, mean, deviation = jnp.arange(30_000.0), jnp.full(30_000, 2.0), jnp.full(30_000, 3.0)
    of = {
        kind: replacement(kind, source, WriteStatistics(mean, deviation), jax.random.key(0))
        for kind in ("resample", "mean", "zero", "noise")
    }
    np.testing.assert_array_equal(of["resample"], source)
    np.testing.assert_array_equal(of["mean"], mean)
    np.testing.assert_array_equal(of["zero"], 0)
    # Five standard errors of 30,000 draws.
    assert abs(of["noise"].mean() - 2) < 5 * 3 / 30_000**0.5
    assert abs(of["noise"].std() - 3) < 5 * 3 / 60_000**0.5


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="patch"):
        replacement("patch", jnp.zeros(2), WriteStatistics(jnp.zeros(2), jnp.zeros(2)), jax.random.key(0))
