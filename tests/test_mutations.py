"""Whatever is done to a study file, the answer is a plan or one StudyError, soon.

STUDY_MUTATIONS=2000 tries as many; the suite tries fewer.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from study.errors import StudyError
from study.layers import read_yaml
from study.resolve import load

SWEEPS = Path(__file__).parents[1] / "sweeps"
NAMES = ("grid", "smoke", "exact_map")
STUDIES = [read_yaml((SWEEPS / f"{name}.yaml").read_text(), name) for name in NAMES]
TRIES = int(os.environ.get("STUDY_MUTATIONS", "300"))
WORDS = ["ct", "cd", "edm", "digits", "mixture", "teacher", "run", "kind", "from", "preset:ct",
         "", "a.b", ".", "..", "/", "images", "share", "null", "x" * 300, "{", "é", "0x1"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.sampled_from(WORDS),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), inner, max_size=3),
    ),
    max_leaves=6,
)


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
def mutated(draw: st.DrawFn) -> str:
    """A study file with one to four things done to it."""
    tree = copy.deepcopy(draw(st.sampled_from(STUDIES)))
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(tree)[1:] or [()]))
        if not path:
            return draw(st.text(max_size=40))
        above, key = at(tree, path[:-1]), path[-1]
        action = draw(st.sampled_from(["replace", "remove", "rename", "graft", "add"]))
        if action == "replace":
            above[key] = draw(VALUES)
        elif action == "remove":
            del above[key]
        elif action == "graft":  # a part of the study where it does not belong
            above[key] = copy.deepcopy(at(tree, draw(st.sampled_from(places(tree)))))
        elif isinstance(above, dict):
            name = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from(list(above))))
            above[name] = above.pop(key) if action == "rename" else draw(VALUES)
    file = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, file)
    text = file.getvalue()
    cut = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, len(text))))
    return text[:cut]


@settings(max_examples=TRIES, deadline=5000, derandomize=TRIES == 300,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(mutated())
def test_a_mutated_study_is_a_plan_or_one_study_error(text: str) -> None:
    path = Path(tempfile.gettempdir()) / f"mutated{os.getpid()}.yaml"
    try:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        study = load(path)
        assert study.runs and study.as_json()
    except StudyError as error:
        assert str(error)
    finally:
        path.unlink()
