"""Datasets in memory become stores, and several become one."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hydra_jax.analysis import results
from hydra_jax.analysis.stats import summary
from hydra_jax.errors import UserError
from hydra_jax.report import report
from hydra_jax.store import datasets, digests, variables
from hydra_jax.store import effects as store
from tests.helpers import effects as toy_effects

ROOT = Path(__file__).parent.parent


def plain(prompts=12, seed=0, replacements=3, first=0, **more):
    """A sweep of two layers; the ids of its prompts are numbers from `first`, and its sources other prompts."""
    random = np.random.default_rng([seed, first])
    direct = random.normal(1, 1, (prompts, 4, replacements)).astype(np.float32)
    effects = toy_effects.effects(direct, 0.5 * direct, protocol={"seed": seed}, **more)
    effects["compensation"][:, 0, 1:] = random.normal(0, 1, (prompts, 3))
    effects["source"][:] = (np.arange(prompts)[:, None] + 1 + np.arange(replacements)) % prompts
    ids = np.array([str(first + number) for number in range(prompts)], dtype=object)
    return effects.assign_coords(prompt_id=("prompt", ids))


def same(read, expected):
    for name in expected.variables:
        np.testing.assert_array_equal(read[name].values, expected[name].values, err_msg=str(name))
    assert read.attrs["protocol"] == expected.attrs["protocol"]


@pytest.mark.parametrize("made", [plain, toy_effects.rich])
def test_what_is_saved_is_read_again(tmp_path, made):
    effects = made(prompts=12)
    if "free_total_effect" in effects:
        effects["source"][:] = -1
    path = datasets.save(effects, tmp_path / "new" / "dir")
    assert path == tmp_path / "new" / "dir" / store.NAME
    assert [entry.name for entry in path.parent.iterdir()] == [store.NAME]
    same(store.open_effects(path.parent), effects)
    loaded = store.load_effects(path.parent)
    same(loaded, effects)
    datasets.save(loaded, tmp_path / "again")  # attributes of the first store's files are of that store alone
    same(store.load_effects(tmp_path / "again"), effects)
    assert digests.DIGESTS in store.open_effects(tmp_path / "again").attrs


SELECTIONS = {
    "prompts": lambda effects: effects.isel(prompt=[7, 2, 3]),
    "a slice of prompts": lambda effects: effects.isel(prompt=slice(2, 9)),
    "ablated": lambda effects: effects.isel(ablated=[2, 0]),
    "by a condition": lambda effects: effects.isel(ablated=effects["ablated_site"].values == "attn"),
    "transposed": lambda effects: effects.transpose(*reversed(list(effects.dims))),
    "of other types": lambda effects: effects.assign(
        total_effect=effects["total_effect"].astype("float64")
    ).assign_coords(text=("prompt", effects["text"].values.astype("U20")), length=effects["length"].astype("int32")),
}


@pytest.mark.parametrize("which", SELECTIONS)
def test_selections_are_saved(tmp_path, which):
    selected = SELECTIONS[which](plain())
    datasets.save(selected, tmp_path)
    loaded = store.load_effects(tmp_path)
    assert loaded["total_effect"].dtype == np.float32
    for name in ("prompt_id", "ablated_name", "direct_effect", "compensation"):
        expected = selected[name].transpose(*loaded[name].dims)
        np.testing.assert_array_equal(loaded[name].values, expected.values)
    assert len(summary(loaded, samples=5)) == selected.sizes["ablated"]


def test_sources_are_kept_only_where_they_are_still_right(tmp_path):
    effects = plain()
    for number, (selected, kept) in enumerate(
        [(effects, True), (effects.isel(prompt=[7, 2, 3]), False), (effects.isel(prompt=slice(None, None, -1)), False)]
    ):
        datasets.save(selected, tmp_path / str(number))
        source = store.load_effects(tmp_path / str(number))["source"].values
        assert np.array_equal(source, effects["source"]) if kept else (source == -1).all()


def test_only_finished_prompts_are_saved(tmp_path):
    effects = plain()
    effects["finished"][4:] = False
    effects["direct_effect"][4:] = np.nan
    datasets.save(effects, tmp_path)
    assert store.open_effects(tmp_path)["prompt_id"].values.tolist() == ["0", "1", "2", "3"]
    effects["finished"][:] = False
    with pytest.raises(UserError, match="no finished prompt"):
        datasets.save(effects, tmp_path / "none")
    assert not (tmp_path / "none").exists()


REFUSED = {
    "attributes lost": (lambda effects: effects.drop_attrs(), "attribute protocol.*assign_attrs"),
    "a variable of one's own": (
        lambda effects: effects.assign(mine=effects["clean_logit"]),
        r"mine is not .*drop_vars",
    ),
    "two of them": (lambda e: e.assign(b=e["clean_logit"], a=e["clean_logit"]), "a, b are not"),
    "a coordinate of one's own": (lambda e: e.assign_coords(mark=("prompt", np.zeros(12))), "mark is not of a sweep"),
    "a dimension lost": (lambda effects: effects.isel(ablated=0), "select with lists"),
    "means": (lambda effects: effects.mean("replacement", keep_attrs=True), "source|finished|select with"),
    "a variable gone": (lambda effects: effects.drop_vars("total_effect"), "no total_effect"),
    "another format": (lambda effects: effects.assign_attrs(format=1), "format 1"),
    "nothing ablated": (lambda effects: effects.isel(ablated=[]), "no ablations"),
    "holes": (lambda effects: effects.assign(kl=effects["total_effect"].where(effects["source"] > 3)), "kl has values"),
    "a prompt twice": (lambda effects: effects.isel(prompt=[0, 1, 0]), "'0' is there twice"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_sweep_is_refused_in_one_line_and_nothing_is_left(tmp_path, what):
    spoil, message = REFUSED[what]
    with pytest.raises(UserError, match=message) as raised:
        datasets.save(spoil(plain()), tmp_path / "dir")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "dir").exists()


def test_a_store_is_never_overwritten(tmp_path):
    datasets.save(plain(), tmp_path)
    with pytest.raises(UserError, match="is there already, and is not overwritten"):
        datasets.save(plain(seed=1), tmp_path)
    same(store.load_effects(tmp_path), plain())
    assert [entry.name for entry in tmp_path.iterdir()] == [store.NAME]


def test_prompts_one_after_another(tmp_path):
    parts = [plain(12), plain(5, first=100), plain(8, first=200)]
    parts[1]["source"][2, 1] = -1
    whole = datasets.concat(parts)
    assert whole["prompt_id"].values.tolist() == [name for part in parts for name in part["prompt_id"].values]
    for name in ("total_effect", "compensation", "clean_logit", "non_finite"):
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    ids = whole["prompt_id"].values
    first = 0
    for part in parts:
        theirs = part["prompt_id"].values
        source = whole["source"].values[first : first + len(theirs)]
        known = part["source"].values >= 0
        assert ((source >= 0) == known).all()
        np.testing.assert_array_equal(ids[source[known]], theirs[part["source"].values[known]])
        first += len(theirs)
    hashes = hashlib.sha256(b"0\n0\n0\n").hexdigest()
    assert toy_effects.protocol(whole)["prompts"]["sha256"] == hashes
    assert whole.attrs["protocol_sha256"] == hashlib.sha256(whole.attrs["protocol"].encode()).hexdigest()
    datasets.save(whole, tmp_path)
    same(store.load_effects(tmp_path), whole)
    assert summary(whole, samples=5)["prompts"].tolist() == [25] * 4
    assert datasets.concat([plain(prompts=4)]).identical(datasets.checked(plain(prompts=4), ""))


def test_replacements_side_by_side(tmp_path):
    parts = [plain(seed=0, replacements=3), plain(seed=1, replacements=5)]
    order = np.random.default_rng(0).permutation(12)
    moved = parts[1].isel(prompt=order)
    moved["source"][:] = np.argsort(order)[moved["source"].values]
    parts[0]["non_finite"][2, 0] = 1
    for name in variables.EFFECTS:
        parts[0][name][2, 0, 1] = np.nan
    parts[1]["non_finite"][3, 0] = 5
    for name in variables.EFFECTS:
        parts[1][name][3, 0] = np.nan
        moved[name][list(order).index(3), 0] = np.nan
    moved["non_finite"][list(order).index(3), 0] = 5
    for dataset, place in ((parts[1], 3), (moved, list(order).index(3))):
        dataset["compensation"][place, 0] = np.nan
        dataset["direct_edge"][place, 0] = np.nan
    whole = datasets.concat([parts[0], moved], "replacement")
    assert whole.sizes["replacement"] == 8
    for name in ("total_effect", "source"):
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts], axis=-1))
    weights = np.full((12, 4, 2), [3.0, 5.0])
    weights[2, 0, 0], weights[3, 0, 1] = 2, 0
    first, second = (np.nan_to_num(part["compensation"].values) for part in parts)
    expected = (first * weights[..., :1] + second * weights[..., 1:]) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(whole["compensation"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(whole["compensation"][3, 0], parts[0]["compensation"][3, 0], rtol=1e-6)
    assert (whole["non_finite"].values[[2, 3, 4], 0] == [1, 5, 0]).all()
    np.testing.assert_array_equal(whole["clean_logit"], parts[0]["clean_logit"])
    protocol = toy_effects.protocol(whole)
    assert (protocol["seed"], protocol["ablation"]["replacements"]) == ([0, 1], [3, 5])
    datasets.save(whole, tmp_path)
    assert store.load_effects(tmp_path).attrs["left_out"] == 2
    third = datasets.concat([datasets.concat(parts, "replacement"), plain(seed=7)], "replacement")
    assert toy_effects.protocol(third)["seed"] == [0, 1, 7]


def test_means_over_cascades_and_heads_are_weighted_too():
    parts = [
        toy_effects.rich(prompts=6, positions=1, replacements=2),
        toy_effects.rich(prompts=6, positions=1, replacements=6),
    ]
    for name in ("cut_component", "cut_logit", "cut_probability", "cut_rank", "cut_compensation"):
        if name in ("cut_component", "cut_compensation"):
            parts[1][name][:] = parts[0][name].values + (name == "cut_compensation")
        else:
            parts[1][name][:] = parts[0][name].values[:, :, :1]
    for seed, part in enumerate(parts):
        protocol = toy_effects.protocol(part) | {"seed": seed}
        parts[seed] = part.assign_attrs(store.protocol_attributes(protocol))
    whole = datasets.concat(parts, "replacement")
    for name in ("head_compensation", "direct_edge"):
        expected = (2 * parts[0][name].values + 6 * parts[1][name].values) / 8
        np.testing.assert_allclose(whole[name], expected, atol=1e-6)
    np.testing.assert_allclose(whole["cut_compensation"], parts[0]["cut_compensation"].values + 6 / 8, rtol=1e-5)
    assert whole["kl"].sizes["replacement"] == whole["cut_rank"].sizes["replacement"] == 8
    parts[1]["cut_component"][0, 0] = 1 - parts[1]["cut_component"][0, 0]
    with pytest.raises(UserError, match=r"cascades cut other components.*drop_vars"):
        datasets.concat(parts, "replacement")


APART = {
    "prompts twice": (lambda: [plain(), plain()], "prompt", "'0' is there twice"),
    "other ablations": (lambda: [plain(), plain(first=50).isel(ablated=[0, 1])], "prompt", "ablated_"),
    "other variables": (lambda: [plain(), plain(first=50, options={"kl"})], "prompt", "kl is in it"),
    "another model": (lambda: [plain(), plain(first=50, model="other")], "prompt", "model"),
    "another seed": (lambda: [plain(), plain(first=50, seed=1)], "prompt", "seed"),
    "the same seed": (lambda: [plain(), plain()], "replacement", "the same replacements again"),
    "other prompts": (lambda: [plain(), plain(seed=1, first=50)], "replacement", "other prompts"),
    "another kind": (lambda: [plain(), plain(seed=1, kind="noise")], "replacement", "kind"),
    "no dimension": (lambda: [plain()], "ablated", "give 'prompt' or 'replacement'"),
    "no datasets": (lambda: [], "prompt", "there are none"),
    "not a sweep": (lambda: [plain(), xr.Dataset()], "prompt", r"datasets\[1\]: has no attribute protocol"),
}


@pytest.mark.parametrize("what", APART)
def test_sweeps_that_do_not_go_together_are_refused_in_one_line(what):
    make, dim, message = APART[what]
    with pytest.raises(UserError, match=message) as raised:
        datasets.concat(make(), dim)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("combined", ["prompt", "replacement", "selection"])
def test_the_command_reports_on_what_was_saved(tmp_path, combined):
    if combined == "prompt":
        made = datasets.concat([plain(), plain(first=50)])
    elif combined == "replacement":
        made = datasets.concat([plain(), plain(seed=3)], "replacement")
    else:
        made = plain().isel(prompt=[3, 4, 5, 9], ablated=[1, 2])
    datasets.save(made, tmp_path)
    command = [sys.executable, "-m", "launch.report", f"--workdir={tmp_path}", "--bootstrap=10", "--select=0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    assert (tmp_path / "selected.csv").is_file()
    assert text.count("python -m launch.sweep") == (2 if combined == "replacement" else 1)


@pytest.mark.slow
def test_a_dataset_in_memory_is_reported_on(tmp_path):
    effects = toy_effects.rich()
    page = report(effects, tmp_path / "dir", bootstrap=20)
    assert page == tmp_path / "dir" / "report.html"
    text = page.read_text()
    assert "24 positions of 6 texts" in text
    assert len(store.load_effects(tmp_path / "dir")["prompt_id"]) == 24
    assert results.load(tmp_path / "dir").tables.keys() == {
        *("summary", "erasure", "findings", "interactions", "cascade", "cascade_steps", "positions")
    }
    report(effects, tmp_path / "dir", bootstrap=20)  # the store is that of this sweep
    with pytest.raises(UserError, match="another sweep, or another selection"):
        report(effects.isel(ablated=[0]), tmp_path / "dir", bootstrap=20)
    assert json.loads(store.open_effects(tmp_path / "dir").attrs["protocol"])["model"]["name"] == "tiny"
