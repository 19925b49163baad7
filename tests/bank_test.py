import numpy as np
import pytest

from hydra_jax.engine.cluster import Cluster
from hydra_jax.sweep.bank import Bank, Row

ALONE = Cluster(0, 1)
COLUMNS = {"top": np.array([3, 4, 5]), "answer": np.array([3, -1, 6])}
COLUMNS |= {f"{name}_probability": np.array([0.1, 0.2, 0.3], np.float32) for name in ("top", "answer")}
KEPT = np.array([True, False, True])
VALUES = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)


@pytest.fixture(params=[None, "bank"])
def bank(request, tmp_path):
    made = Bank("float32", tmp_path / request.param if request.param else None, "protocol")
    made.add(["a", "b", "c"], COLUMNS, KEPT, VALUES)
    made.add(["d"], {name: column[:1] for name, column in COLUMNS.items()}, KEPT[:1], 2 * VALUES[:1])
    made.refresh(ALONE)
    return made


def test_rows_and_values_come_back(bank):
    assert set(bank.rows) == {"a", "b", "c", "d"}
    assert bank.rows["b"].top == 4
    assert (bank.rows["b"].part, bank.rows["b"].index) == (Row.part, Row.index)
    np.testing.assert_array_equal(bank.values(["c", "a", "d"]), [VALUES[1], VALUES[0], 2 * VALUES[0]])
    np.testing.assert_array_equal(bank.take(*bank.where(["d", "a"]), slice(4, 8)), [2 * VALUES[0, 4:8], VALUES[0, 4:8]])
    bank.remove()
    assert not bank.rows


def test_values_are_kept_in_the_models_type(tmp_path):
    made = Bank("bfloat16", tmp_path / "bank", "protocol")
    made.add(["a", "b", "c"], COLUMNS, KEPT, VALUES)
    made.refresh(ALONE)
    values = made.values(["a", "c"])
    assert values.dtype == "bfloat16"
    np.testing.assert_allclose(values.astype(np.float32), VALUES, rtol=2**-8)
    assert sum(path.stat().st_size for path in (tmp_path / "bank").glob("*.npy")) < 128 + 2 * VALUES.size + 1


def damage(directory, how):
    values, described = sorted(directory.glob("*.npy"))[0], sorted(directory.glob("*.npz"))[0]
    match how:
        case "a bit":
            content = bytearray(values.read_bytes())
            content[-1] ^= 1
            values.write_bytes(content)
        case "cut":
            values.write_bytes(values.read_bytes()[:-8])
        case "gone":
            values.unlink()
        case "described in half":
            described.write_bytes(described.read_bytes()[:100])


@pytest.mark.parametrize("how", ["a bit", "cut", "gone", "described in half"])
def test_a_damaged_part_is_removed_and_the_others_stay(tmp_path, how):
    for ids, columns, kept, values in (
        (["a", "b", "c"], COLUMNS, KEPT, VALUES),
        (["d"], {name: column[:1] for name, column in COLUMNS.items()}, KEPT[:1], VALUES[:1]),
    ):
        Bank("float32", tmp_path / "bank", "protocol").add(ids, columns, kept, values)
    damage(tmp_path / "bank", how)
    again = Bank("float32", tmp_path / "bank", "protocol")
    again.refresh(ALONE)
    assert set(again.rows) in ({"d"}, {"a", "b", "c"})
    assert len(list((tmp_path / "bank").glob("*.npz"))) == 1


def test_parts_of_another_protocol_are_not_read(tmp_path):
    Bank("float32", tmp_path / "bank", "one").add(["a", "b", "c"], COLUMNS, KEPT, VALUES)
    other = Bank("float32", tmp_path / "bank", "another")
    other.refresh(ALONE)
    assert not other.rows
