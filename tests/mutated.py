"""Things done to valid files, drawn by hypothesis: to trees of plain values, and to bytes."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

WORDS = ["ct", "cd", "edm", "digits", "mixture", "teacher", "run", "kind", "from", "preset:ct",
         "", "a.b", ".", "..", "/", "images", "share", "null", "x" * 300, "{", "é", "0x1",
         "../../x", "\x1b[31m", "[/red]", "fid", "trained", "diverged"]  # fmt: skip
NUMBERS = [0, -1, 2**31, 2**63, 10**40, 1e-320, 1e308, -0.0]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.sampled_from(WORDS),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=8), st.sampled_from(NUMBERS),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), inner, max_size=3),
    ),
    max_leaves=6,
)
ENDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80", b"\0" * 8)


def places(value: Any, path: tuple = ()) -> list[tuple]:  # noqa: ANN401
    """Every path into a tree."""
    items = (value.items() if isinstance(value, dict)
             else enumerate(value) if isinstance(value, list) else ())  # fmt: skip
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def at(tree: Any, path: tuple) -> Any:  # noqa: ANN401
    """The value at a path."""
    for step in path:
        tree = tree[step]
    return tree


@st.composite
def trees(draw: st.DrawFn, tree: Any) -> Any:  # noqa: ANN401
    """The tree with one to four things done to it, or another value altogether."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        inner = places(tree)[1:]
        if not inner:
            return draw(VALUES)
        path = draw(st.sampled_from(inner))
        above, key = at(tree, path[:-1]), path[-1]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "graft", "add"]))
        if action == "replace":
            above[key] = draw(VALUES)
        elif action == "remove":
            del above[key]
        elif action == "graft":  # a part of the tree where it does not belong
            above[key] = copy.deepcopy(at(tree, draw(st.sampled_from(places(tree)))))
        elif isinstance(above, dict):
            name = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from(list(above))))
            above[name] = above.pop(key) if action == "rename" else draw(VALUES)
    return tree


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one to eight things done to them."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        i = draw(st.integers(0, max(0, len(result) - 1)))
        match draw(st.sampled_from(["set", "set", "set", "cut", "put", "end", "copy", "short"])):
            case "set":
                result[i : i + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del result[i : i + draw(st.sampled_from([1, 2, 4, 16, 100]))]
            case "put":
                result[i:i] = draw(st.binary(min_size=1, max_size=6))
            case "end":
                result[i : i + 4] = draw(st.sampled_from(ENDS))
            case "copy":
                j = draw(st.integers(0, max(0, len(result) - 1)))
                result[i:i] = result[j : j + draw(st.sampled_from([1, 8, 64]))]
            case "short":
                del result[i:]
    return bytes(result)
