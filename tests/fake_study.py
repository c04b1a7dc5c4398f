"""Writes a synthetic study folder of known effects, for the tests of analysis/.

log FID = block effect + variant effect - .6 log(share of budget) + noise, drawn from a seeded
generator; everything else is plausible filler. Nothing here computes what the analysis computes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES = 64_000
BASE = {"data": {"kind": "digits"}, "network": {"kind": "unet", "width": 8},
        "budget": {"images": IMAGES}, "objective": {"kind": "consistency"},
        "score": {"kind": "single_sample"}, "init": {"kind": "random"},
        "target": {"kind": "stopgrad"}, "batch": 128, "data_stream": 0}
TEACHER = {"score": {"kind": "teacher", "run": "edm"}}
WARM = {"init": {"kind": "run", "run": "edm"}}


@dataclass(frozen=True)
class Made:
    """A recipe to write. effect: its effect on log FID; refs and charge: names of sources."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    effect: float = 0.0
    refs: Sequence[str] = ()
    charge: Sequence[str] = ()


SOURCES = {"edm": Made({"objective": {"kind": "denoising"}}),
           "edm_half": Made({"objective": {"kind": "denoising"},
                             "budget": {"images": IMAGES // 2}})}
VARIANTS = {
    "ct": Made(effect=-0.1),
    "cd": Made(TEACHER, 0.0, ["edm"]),
    "cd_exact": Made({"score": {"kind": "empirical"}}, -0.05),
    "ct_warm": Made(WARM, -0.4, ["edm"]),
    "cd_warm": Made({**TEACHER, **WARM}, -0.3, ["edm"]),
    "self_pretrain": Made({"init": {"kind": "run", "run": "edm_half"},
                           "budget": {"images": IMAGES // 2}}, 0.15, ["edm_half"], ["edm_half"]),
}
PRIMARY = {"variant": "ct", "against": "cd", "metric": "fid", "nfe": 1, "at": 1.0, "ema": 0.05,
           "reference": "train", "margin": 0.05}


def digest(*parts: object, length: int = 10) -> str:
    """A stable hexadecimal name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:length]


def write_json(path: Path, record: object) -> None:
    """Writes a record as JSON, making the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def fid_settings(**changes: object) -> dict[str, Any]:
    """A settings record of kind fid."""
    return {"kind": "fid", "extractor": "digits-cnn:0a1b2c3d", "samples": 400, "nfe": 1,
            "ema": 0.05, "reference": "train", "mid": None, "draws": 3, **changes}


def write(folder: Path, seeds: Sequence[int] = (0, 1, 2), cells: Sequence[str] = ("digits",),
          variants: Mapping[str, Made] = VARIANTS, noise: float = 0.04, vectors: bool = False,
          primary: Mapping[str, Any] | None = PRIMARY) -> Path:
    """Writes a finished study and returns its folder; tests damage it afterwards.

    primary: one for all cells, or a mapping of cells to theirs.
    """
    rng = np.random.default_rng(7)
    recipes, runs = [], []
    made = {**SOURCES, **variants}
    for cell in cells:
        for name, recipe in made.items():
            role = "source" if name in SOURCES else "variant"
            factors = json.loads(json.dumps({**BASE, **recipe.changes}))
            if vectors:
                factors |= {"data": {"kind": "mixture"}, "network": {"kind": "mlp"}}
            recipes.append({"name": name, "role": role, "cell": cell, "factors": factors,
                            "charge": list(recipe.charge), "ignored": []})
            for seed in seeds:
                runs.append({
                    "recipe": len(recipes) - 1, "seed": seed, "id": digest(name, cell, seed),
                    "folder": f"{name}-{cell}-s{seed}-{digest(name, cell, seed)}",
                    "refs": [digest(s, cell, seed) for s in recipe.refs],
                    "charged": [digest(s, cell, seed) for s in recipe.charge], "measures": []})
    block = {(c, s): rng.normal(3.7, 0.25) for c in cells for s in seeds}
    for run in runs:
        recipe = recipes[run["recipe"]]
        _run(folder / "runs" / run["folder"], run, recipe, made[recipe["name"]].effect
             + block[recipe["cell"], run["seed"]], rng, noise, vectors)
    write_json(folder / "study.json", {
        "schema": 1, "name": folder.name, "seeds": list(seeds), "cells": list(cells),
        "question": "At equal images and equal initialisation, does CT trail CD?",
        "primary": dict.fromkeys(cells, primary) if "variant" in (primary or {}) else primary,
        "recipes": recipes, "runs": runs})
    return folder


def _run(root: Path, run: dict, recipe: dict, level: float, rng: np.random.Generator,
         noise: float, vectors: bool) -> None:
    """One finished run folder; adds the measures it writes to run["measures"]."""
    teacher, f = recipe["role"] == "source", recipe["factors"]
    images, cell, seed = f["budget"]["images"], recipe["cell"], run["seed"]
    points = (1.0,) if teacher else (0.25, 0.5, 1.0)
    write_json(root / "run.json", {"schema": 1, "id": run["id"], "factors": f, "seed": seed,
                                   "role": "teacher" if teacher else "student"})
    start = {"event": "start", "time": "2026-01-02T03:04:05Z", "host": "h", "device": "cpu",
             "torch": "2.15.0", "python": "3.11.7", "commit": "abc1234", "dirty": False, "pid": 1}
    end = {"event": "end", "time": "2026-01-02T03:05:05Z", "reason": "done"}
    (root / "attempts.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
    write_json(root / "trained.json", {
        "id": run["id"], "outcome": "trained", "reason": None,
        "spend": {"images": images, "updates": images // 128, "passes": 4.0 * images,
                  "flops": 2e7 * images, "seconds": images / 3000},
        "parameters": 22_000, "sigma_data": 0.75, "data_digest": digest("data", cell),
        "init_digest": digest("init", seed, teacher, f["init"]),
        "stream_digest": digest("stream", cell, seed, teacher, f["data_stream"]),
        "snapshots": [{"at": a, "images": int(a * images), "file": f"snapshots/{a:.3f}.pt"}
                      for a in points], "sha256": {}})

    def measure(at: float, settings: dict, values: dict) -> None:
        file = f"{at:.3f}-{settings['kind']}-{digest(settings, length=8)}.json"
        run["measures"].append(file)
        write_json(root / "measures" / file, {
            "id": run["id"], "at": at, "images": int(at * images), "settings": settings,
            "seconds": 1.0, **values})

    own = rng.normal(0, noise)
    for at in points:
        for nfe in (35,) if teacher else (1, 2):
            value = math.exp(level + own - 0.6 * math.log(at) - 0.3 * math.log(min(nfe, 3)))
            if vectors:
                settings = {"kind": "sliced_wasserstein", "samples": 2048, "nfe": nfe,
                            "ema": 0.05, "mid": None, "draws": 3, "projections": 128}
                measure(at, settings, {"value": value / 100, "draws": [value / 100],
                                       "floor": 0.02})
                settings = {k: v for k, v in settings.items() if k != "projections"}
                measure(at, {**settings, "kind": "mode_mass"},
                        {"between": value / 200, "tv": 0.1, "shares": [0.4, 0.6],
                         "weights": [0.5, 0.5]})
            else:
                for reference in ("train", "held_out"):
                    measure(at, fid_settings(nfe=nfe, reference=reference,
                                             mid=0.821 if nfe == 2 else None),
                            {"value": value, "draws": [0.9 * value, value, 1.1 * value],
                             "floor": 0.6})
    sigma = [0.05, 0.2, 0.8, 3.0, 12.0, 50.0]
    posterior = [64 * s * s / (1 + s * s) * 0.3 + 1e-4 for s in sigma]
    if not teacher and vectors:
        measure(1.0, {"kind": "map_error", "sigmas": 6, "samples": 512, "ema": 0.05},
                {"sigma": sigma, "rms": [0.01 * s**0.5 * math.exp(level) / 40 for s in sigma],
                 "value": math.exp(level) / 100})
    first = (recipe["name"], seed) in (("ct", 0), ("cd_exact", 0)) or recipe["name"] == "cd"
    if first:
        single = recipe["name"] == "ct"
        teacher_error = [0.0 if recipe["name"] != "cd" else 0.2 + 0.05 * p for p in posterior]
        measure(1.0, {"kind": "score_error", "sigmas": 6, "samples": 2048, "score": f["score"],
                      "data": f["data"]},
                {"sigma": sigma, "variance": posterior if single else [0.0] * 6,
                 "variance_se": [0.01] * 6, "bias2": teacher_error if vectors else None,
                 "bias2_se": None, "distance2": None if vectors else teacher_error,
                 "distance2_se": [0.01] * 6, "held_out_loss": [2 + p for p in posterior],
                 "held_out_loss_se": [0.01] * 6, "posterior_variance": posterior,
                 "known": vectors, "dimension": 64, "t_star": None if vectors else 0.3})
    if not teacher:
        picture = np.clip(rng.normal(120, 40 * level, (64, 64)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / "samples.png")


def edit(path: Path, **changes: object) -> None:
    """Overwrites keys of a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def folder_of(folder: Path, name: str, seed: int, cell: str = "digits") -> Path:
    """The run folder of a name, seed and cell."""
    return folder / "runs" / f"{name}-{cell}-s{seed}-{digest(name, cell, seed)}"


def diverge(folder: Path, name: str, seed: int, cell: str = "digits") -> None:
    """Turns a run into one that diverged at half of its budget; later measurements vanish."""
    root = folder_of(folder, name, seed, cell)
    trained = json.loads((root / "trained.json").read_text())
    spend = trained["spend"] | {"images": trained["spend"]["images"] // 2}
    edit(root / "trained.json", outcome="diverged", reason="loss is not finite at step 250",
         spend=spend, snapshots=trained["snapshots"][:2])
    for file in (root / "measures").glob("1.000-*"):
        file.unlink()
