"""Ways to spoil a file or a tree of settings, each a function of a seeded generator."""

import copy
import json
import math
import re

import numpy as np


def pick(random, among):
    """One of a sequence, as it is (numpy's own choice would make it an array's element)."""
    return among[int(random.integers(len(among)))]


def _span(random, data):
    start, end = sorted(int(place) for place in random.integers(len(data) + 1, size=2))
    return start, min(end, start + 64)


def _flipped(random, data):
    spoiled = bytearray(data)
    for place in random.integers(len(data), size=int(random.integers(1, 4))) if data else ():
        spoiled[place] ^= 1 << int(random.integers(8))
    return bytes(spoiled)


def _overwritten(random, data):
    start, end = _span(random, data)
    return data[:start] + random.bytes(end - start) + data[end:]


def _cut(random, data):
    return data[: int(random.integers(len(data) + 1))]


def _hollowed(random, data):
    start, end = sorted(int(place) for place in random.integers(len(data) + 1, size=2))
    return data[:start] + data[end:]


def _repeated(random, data):
    start, end = sorted(int(place) for place in random.integers(len(data) + 1, size=2))
    return data[:end] + data[start:]


def _inserted(random, data):
    start, _ = _span(random, data)
    return data[:start] + pick(random, STRAY) + data[start:]


def _renumbered(random, data):
    """Another number where the text has one; elsewhere, where a length or an offset may be, a large one."""
    found = list(re.finditer(rb"\d+", data))
    if found and random.integers(2):
        start, end = pick(random, found).span()
        return data[:start] + pick(random, (b"0", b"-1", b"7", b"9" * 30, b"1e999")) + data[end:]
    start = int(random.integers(max(1, len(data) - 8)))
    large = pick(random, (0, 1, 2**31, 2**33, 2**62, 2**64 - 1))
    return data[:start] + large.to_bytes(8, "little") + data[start + 8 :]


STRAY = (
    b"\0",
    b"\0" * 100,
    b"\xff\xfe",
    b"\xc3",
    b"\xed\xa0\x80",
    "\u2028é".encode(),
    b"\n",
    b'"',
    b"[" * 50_000,
    b"{}",
)
BYTES = (_flipped, _flipped, _flipped, _overwritten, _cut, _hollowed, _repeated, _inserted, _renumbered)


def content(random, data, times=1):
    """Bytes, spoiled so many times."""
    for _ in range(times):
        data = pick(random, BYTES)(random, data)
    return data


def _nested(depth):
    tree = []
    for _ in range(depth):
        tree = [tree]
    return tree


NUMBERS = (0, 1, 2, 3, 5, 8, 64, 5000, -1, -2, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30))
FLOATS = (0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
WORDS = ("", " ", "é", "\0", "\ud800", "x" * 10_000, "a\nb", "0", "-1", "1e9", "0-1", "0-99999999999", "9" * 5000)
NAMES = (
    "zero",
    "mean",
    "noise",
    "heads",
    "attn",
    "mlp",
    "text",
    "answer",
    "all",
    "bfloat16",
    "auto",
    "float64",
    "int32",
)
TREES = ([], {}, [0], [None], {"a": 1}, {"": {}}, _nested(100), ["x"] * 50)
VALUES = (None, True, False, *NUMBERS, *FLOATS, *WORDS, *NAMES, *TREES)


def places(tree):
    """Where a tree has values: (container, key)."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places(tree[key])


def settings(random, tree, times=1):
    """A copy of a tree of settings with some of its values replaced, left out, moved, or others among them."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        found = list(places(tree))
        if not found:
            break
        where, key = pick(random, found)
        alike = [value for value in VALUES if type(value) is type(where[key])]
        value = copy.deepcopy(pick(random, alike if alike and random.integers(2) else VALUES))
        match int(random.integers(8)):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[pick(random, ("", "unknown", "é", "x" * 1000, *map(str, where)))] = value
            case 2:
                other, its = pick(random, found)
                where[key] = copy.deepcopy(other[its])
            case _:
                where[key] = value
    return tree


def text(tree):
    """A tree as JSON, NaN and lone surrogates included."""
    return json.dumps(tree).encode()


def file(random, path, gone=False):
    """Spoil a file in place; JSON now and then as the tree that it is. `gone` allows its removal."""
    if gone and random.random() < 0.15:
        path.unlink()
        return
    data = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.7:
        path.write_bytes(text(settings(random, json.loads(data), int(random.integers(1, 3)))))
    else:
        path.write_bytes(b"" if random.random() < 0.05 else content(random, data, int(random.integers(1, 3))))


def generator(kind, number):
    """What input `number` of a kind is drawn from."""
    return np.random.default_rng([number, *kind.encode()])
