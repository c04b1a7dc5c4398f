"""Imports go one way, and the parts that plan, store and report know nothing of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH_FREE = ("errors", "values", "subjects", "factors", "metrics", "meaning",
              "halves", "identity", "layers", "settings", "spec", "domains", "checks",
              "resolve", "bounded", "limits", "store", "seeds", "budget", "sharing", "launch",
              "entry", "progress", "standing", "places", "pinned", "forecast", "queued", "sealed",
              "parameters", "jobs", "cluster", "run", "sample")  # fmt: skip
HEAVY = {"torch", "torchvision", "torch_fidelity", "sklearn"}


def imports(path: Path, inside_functions: bool) -> set[str]:
    """Modules that a file imports; `from study import x` counts as study.x."""
    tree, found = ast.parse(path.read_text()), set()
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= ({f"study.{a.name}" for a in node.names} if node.module == "study"
                      else {node.module})  # fmt: skip
    return found


def graph() -> dict[str, set[str]]:
    """study's modules and what each imports of study when it is loaded."""
    return {p.stem: {m.split(".")[1] for m in imports(p, False) if m.startswith("study.")}
            for p in (ROOT / "study").glob("*.py") if p.stem != "__init__"}  # fmt: skip


def test_study_imports_go_one_way() -> None:
    left, order = graph(), []
    while left:
        free = [m for m, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        order += free
        left = {m: needs for m, needs in left.items() if m not in free}
    assert order.index("spec") < order.index("store") < order.index("train")


def test_planning_and_storing_import_no_torch() -> None:
    modules = graph()
    for name in TORCH_FREE:
        path = ROOT / "study" / f"{name}.py"
        heavy = {m.split(".")[0] for m in imports(path, False)} & HEAVY
        assert not heavy and modules[name] <= {*TORCH_FREE, "extractors"}, name


def test_analysis_reads_folders_and_nothing_else() -> None:
    for path in (ROOT / "analysis").glob("*.py"):
        found = imports(path, True)
        assert not {m.split(".")[0] for m in found} & HEAVY, path
        ours = {m for m in found if m.startswith("study")}
        assert ours <= {"study.spec", "study.store", "study.halves", "study.bounded",
                        "study.errors"}, path


def test_help_and_plan_load_no_torch() -> None:
    plan = [str(ROOT / "sweeps" / "grid.yaml"), "--plan"]
    files = [str(ROOT / "sweeps" / "cifar10.yaml"), "--plan"]  # looks whether they are there
    modules = (("run", ["--help"]), ("run", plan), ("run", [*plan, "--on", "slurm"]),
               ("run", files), ("sample", ["--help"]))  # fmt: skip
    for module, words in modules:
        code = (f"import sys; from study.{module} import main\n"
                f"try: main({words!r})\nexcept SystemExit: pass\n"
                "heavy = {'torch', 'pandas', 'sklearn'}\n"
                f"heavy |= set() if '--on' in {words!r} else {{'submitit'}}\n"
                "assert not heavy & set(sys.modules)")  # fmt: skip
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
