"""Small study files for tests."""

from __future__ import annotations

from pathlib import Path

from study.resolve import load
from study.spec import Study
from study.store import read_json, read_lines

TWO_MODES = """\
question: Does it work?
primary: {variant: ct, against: cd, metric: sliced_wasserstein}
base:
  data: {kind: mixture, means: [[-1.0], [1.0]], std: 0.2, samples: 500}
  network: {kind: mlp, width: 16, depth: 1}
  budget: {images: 1280}
  batch: 64
  discretization: {kind: fixed, N: 10}
sources:
  edm: {objective: denoising}
variants:
  ct: {score: single_sample}
  cd: {score: {kind: teacher, run: edm}}
seeds: [0, 1]
measure:
  at: [0.5, 1.0]
  sliced_wasserstein: {samples: 256, draws: 1}
"""


def write(folder: Path, text: str = TWO_MODES, name: str = "small") -> Path:
    """The study file NAME.yaml in `folder`."""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str = TWO_MODES, sets: tuple[str, ...] = ()) -> Study:
    """The study resolved."""
    return load(write(folder, text), sets)


def trained(name: str, **changes: object) -> dict:
    """What training writes into trained.json of the run of this id, with one snapshot."""
    return {
        "id": name, "outcome": "trained", "reason": None,
        "spend": {"images": 1280, "seconds": 1.0}, "snapshots": [{"at": 1.0, "images": 1280}],
        "sha256": {}, "data_digest": "0" * 16, "inputs": {}, **changes}  # fmt: skip


def replaced(old: str, new: str) -> str:
    """TWO_MODES with one piece of text replaced; it must be there."""
    assert old in TWO_MODES, old
    return TWO_MODES.replace(old, new)


def of_images(root: Path, seeds: list[int]) -> str:
    """A study of a folder of small images."""
    return f"""
base:
  data: {{kind: images, root: {root}, held_out: 4}}
  network: {{kind: unet, width: 4, levels: 1}}
  budget: {{images: 16}}
  batch: 8
variants: {{ct: {{}}}}
seeds: {seeds}
measure: {{at: [1.0]}}
"""


def content(results: Path, name: str = "small") -> dict[str, object]:
    """Everything that must be the same whenever and however a study was run: snapshots by digest,
    logs and measurements without their seconds."""
    found: dict[str, object] = {}
    for folder in sorted((results / name / "runs").iterdir()):
        trained = read_json(folder / "trained.json")
        del trained["spend"]["seconds"], trained["sha256"]["steps.jsonl"], trained["attempt"]
        found[folder.name] = trained
        rows = read_lines(folder / "steps.jsonl")
        found[f"{folder.name}/steps"] = [r | {"seconds": 0} for r in rows]
        for file in sorted((folder / "measures").iterdir()):
            found[f"{folder.name}/{file.name}"] = read_json(file) | {"seconds": 0}
        found[f"{folder.name}/samples"] = (folder / "samples.png").read_bytes()
    return found
