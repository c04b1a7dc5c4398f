"""Whatever is done to a study file, the answer is a plan or one StudyError, soon.

STUDY_FUZZ=2000 tries as many; the suite tries fewer.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated import trees
from ruamel.yaml import YAML

from study.errors import StudyError
from study.layers import read_yaml
from study.resolve import load

SWEEPS = Path(__file__).parents[1] / "sweeps"
STUDIES = [read_yaml(p.read_text(), p.name) for p in sorted(SWEEPS.glob("*.yaml"))]
TRIES = int(os.environ.get("STUDY_FUZZ", "300"))
@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A study file with one to four things done to it."""
    file = io.StringIO()
    YAML(typ="safe", pure=True).dump(draw(trees(draw(st.sampled_from(STUDIES)))), file)
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
