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


UNREAD = ["network", "budget", "init", "target", "batch", "data_stream"]  # by a fixed point
SIGMA = [0.05, 0.2, 0.8, 3.0, 12.0, 50.0]


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
                            "charge": list(recipe.charge),
                            "ignored": UNREAD if fixed(factors) else []})
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


def fixed(factors: Mapping[str, Any]) -> bool:
    """Whether a recipe is a fixed point: computed, at no cost."""
    return factors["objective"]["kind"] == "fixed_point"


def _run(root: Path, run: dict, recipe: dict, level: float, rng: np.random.Generator,
         noise: float, vectors: bool) -> None:
    """One finished run folder; adds the measures it writes to run["measures"]."""
    teacher, f = recipe["role"] == "source", recipe["factors"]
    images, cell, seed = f["budget"]["images"], recipe["cell"], run["seed"]
    points = (1.0,) if teacher or fixed(f) else (0.25, 0.5, 1.0)
    write_json(root / "run.json", {"schema": 1, "id": run["id"], "factors": f, "seed": seed,
                                   "role": "teacher" if teacher else "student"})
    start = {"event": "start", "time": "2026-01-02T03:04:05Z", "host": "h", "device": "cpu",
             "torch": "2.15.0", "python": "3.11.7", "code": "0123456789abcdef",
             "commit": "abc1234", "dirty": False, "pid": 1}
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
    if fixed(f):
        trained = json.loads((root / "trained.json").read_text())
        spend = dict.fromkeys(trained["spend"], 0)
        keep = {k: trained[k] for k in trained if k not in ("parameters", "init_digest",
                                                            "stream_digest")}
        write_json(root / "trained.json", keep | {
            "spend": spend, "snapshots": [{"at": 1.0, "images": 0, "file": None}]})
        return
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
    sigma = SIGMA
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
                 "effective_samples": [None if vectors else 1 + 99 * s / (1 + s) for s in sigma],
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


# --- instruments: files added to a study that is written ---


def measured(folder: Path, name: str, seed: int, settings: Mapping[str, Any],
             values: Mapping[str, Any], at: float = 1.0, cell: str = "digits") -> Path:
    """Adds one measurement file to a run and to what the study asks of it; returns its path."""
    root, plan = folder_of(folder, name, seed, cell), json.loads(
        (folder / "study.json").read_text())
    points = {s["at"]: s["images"] for s in json.loads(
        (root / "trained.json").read_text())["snapshots"]}
    file = f"{at:.3f}-{settings['kind']}-{digest(settings, length=8)}.json"
    for run in plan["runs"]:
        if run["folder"] == root.name:
            run["measures"].append(file)
    write_json(folder / "study.json", plan)
    write_json(root / "measures" / file, {
        "id": digest(name, cell, seed), "at": at, "images": points[at],
        "settings": {**settings, "at": at}, **values, "seconds": 1.0})
    return root / "measures" / file


def gradient_noise(rho: float, c: bool = True) -> dict[str, Any]:
    """Parts of a gradient's variance whose share under the law is rho; at the lowest level nothing
    is defined."""
    total = [1e3 / s for s in SIGMA]
    share = [None, *(rho * s / (1 + s) * 1.3 for s in SIGMA[1:])]
    parts = {"estimator": [x and x * v for x, v in zip(share, total, strict=True)],
             "dropout": [0.1 * v for v in total], "total": total, "rho": share,
             "rho_adam": [x and 0.6 * x for x in share], "snr": [0.02 * s for s in SIGMA]}
    parts["draw"] = [None if x is None else 0.9 * v - x
                     for x, v in zip(parts["estimator"], total, strict=True)]
    parts["signal"] = [0.02 * s * v for s, v in zip(SIGMA, total, strict=True)]
    lists = {n: v for k, x in parts.items() for n, v in (
        (k, x), (f"{k}_se", [y and 0.07 * abs(y) for y in x]))}
    law = {"rho": rho, "rho_adam": 0.6 * rho, "estimator": 90.0 * rho, "dropout": 9.0,
           "draw": 81.0 - 90 * rho, "total": 90.0, "signal": 4.5, "snr": 0.05}
    step = [0.04 * s**0.6 for s in SIGMA]
    return {"sigma": SIGMA, "r": [s / 1.2 for s in SIGMA], "N": 161, **lists, "step": step,
            "step_over_c": [s / 0.03 for s in step] if c else None,
            "law": law | {f"{k}_se": 0.05 * abs(v) for k, v in law.items()}, "value": rho}


def instruments(folder: Path, seeds: Sequence[int] = (0, 1, 2), cell: str = "digits",
                names: Sequence[str] = ("ct", "cd", "cd_exact")) -> None:
    """Writes the instruments of images: rho .6 for ct and 0 else, a cosine of .9, slopes -.98 and
    -.5, trajectory errors that double from the first variant to the next, and so on."""
    for k, name in enumerate(names):
        for seed in seeds:
            wobble, edm = 1 + 0.04 * (seed - 1), digest("edm", cell, seed)
            against = {"kind": "teacher", "run": edm}

            def put(kind: str, values: dict, at: float = 1.0, name: str = name, seed: int = seed,
                    **settings: object) -> None:
                measured(folder, name, seed, {"kind": kind, **settings}, values, at, cell)

            for at in (0.5, 1.0):
                put("gradient_noise", gradient_noise(0.6 * wobble * at if name == "ct" else 0.0,
                                                     name != "cd_exact"), at, ema="raw", sigmas=6,
                    batches=16)
            cosine = [None, *(0.9 - 0.1 * k / s for s in SIGMA[1:])]
            put("gradient_cosine", {
                "sigma": SIGMA, "cosine": cosine, "cosine_se": [x and 0.03 for x in cosine],
                "snr_score": [0.02 * s for s in SIGMA], "snr_against": [0.05 * s for s in SIGMA],
                "law": {"cosine": 0.9 * wobble, "cosine_se": 0.02, "snr_score": 0.1},
                "value": 0.9 * wobble}, ema="raw", score={"kind": "single_sample"},
                against=against, sigmas=6, batches=16)
            N = [20, 40, 80, 160, 320]
            loss, apart = [3 / n for n in N], [0.8 * (1 + k) * (20 / n) ** 0.98 for n in N]
            put("gradient_slopes", {
                "N": N, "loss_score": loss, "loss_score_se": [0.02 * x for x in loss],
                "loss_against": [0.7 * x for x in loss], "loss_against_se": [0.01] * 5,
                "loss_ratio": [0.43 * (1 + k) * (20 / n) ** 0.5 for n in N],
                "loss_ratio_se": [0.02] * 5, "gradient_difference": apart,
                "gradient_difference_se": [0.05 * x for x in apart], "slope_loss": -0.5,
                "slope_loss_se": 0.04, "slope_gradient": -0.98 * wobble, "slope_gradient_se": 0.03,
                "predicted_slope_loss": None, "predicted_slope_gradient": -1.0,
                "value": -0.98 * wobble}, ema="raw", score={"kind": "single_sample"},
                against=against, N=N, batches=16)
            off = [None, *(0.02 / (1 + s) for s in SIGMA[1:])]
            put("gradient_rounding", {
                "sigma": SIGMA, "r": [s / 1.2 for s in SIGMA], "N": 161, "error": off,
                "error_se": [x and 0.03 * x for x in off], "bias": [x and x / 4 for x in off],
                "error_over_noise": [0.01 * s for s in SIGMA], "residual_error": off[::-1],
                "law": {"error": 0.012 * wobble, "error_se": 1e-4, "cosine_batch": 0.99993,
                        "bias": None if k else 0.003, "bias_se": None if k else 0.001},
                "value": 0.012 * wobble}, ema="raw", sigmas=6, batches=16)
            error = [0.0, *(0.05 * 2**k * s**0.3 * wobble for s in SIGMA[1:])]
            paths = {p: [e * (1 + 0.3 * j) for e in error]
                     for j, p in enumerate(("teacher", "second_teacher", "empirical"))}
            put("trajectories", {
                "sigma": SIGMA, **paths, **{f"{p}_se": [0.05 * e for e in v]
                                            for p, v in paths.items()},
                **{f"drift_{p}": v[::-1] for p, v in paths.items()},
                **{f"spread_{p}": 0.1 for p in paths}, **{f"spread_{p}_se": 0.01 for p in paths},
                "straight": [2 * e for e in error[::-1]], "floor": 0.06, "floor_se": 0.002,
                "value": error[-1], "value_se": 0.01, "along": "teacher"}, ema=0.05,
                teachers=[edm, digest("edm_half", cell, seed)], sigmas=6, samples=256, steps=64)
            put("memorisation", {"value": 0.5 + 0.1 * k, "value_se": 0.02, "null_se": 0.03,
                                 "nearest_train": 3.0, "nearest_held_out": 3.2, "ratio": 0.94},
                ema=0.05, nfe=1, mid=None, samples=400)
            put("coverage", {"precision": 0.8 - 0.1 * k * wobble, "recall": 0.5 + 0.1 * k * wobble,
                             "value": 0.5 + 0.1 * k * wobble, "tv": 0.05,
                             "shares": [0.12, *[0.1] * 8, 0.08], "reference_shares": [0.1] * 10},
                ema=0.05, nfe=1, mid=None, samples=400, extractor="digits-cnn:0a1b2c3d",
                neighbours=3)


def oracle_study(folder: Path, seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """Writes fixed points along N, K and the distance, whose W2 is (N K)^-1/2, of CD 1 / N, and
    two trained variants whose W2 is 10 % above that of theirs."""
    line = {"data": {"kind": "mixture", "means": [[-1.0], [1.0]], "std": 0.05},
            "network": {"kind": "mlp"}, "objective": {"kind": "fixed_point"},
            "solver": {"kind": "euler"}, "sigma": {"min": 0.002, "max": 80.0},
            "discretization": {"kind": "fixed", "N": 18}, "distance": {"kind": "l2"}}
    exact, trained = {"kind": "analytic"}, {"kind": "consistency"}
    made = {f"ct_{n}": Made({**line, "discretization": {"kind": "fixed", "N": n}})
            for n in (18, 40, 150, 640)}
    made |= {f"cd_{n}": Made({**line, "score": exact, "discretization": {"kind": "fixed", "N": n}})
             for n in (18, 40, 150)}
    made |= {f"ct_18_k{k}": Made({**line, "score": {"kind": "posterior_k", "k": k}})
             for k in (4, 16)}
    made |= {f"ct_18_c{c:g}": Made({**line, "distance": {"kind": "pseudo_huber", "c0": c}})
             for c in (0.3, 0.03)}
    made |= {"ct_mlp": Made({**line, "objective": trained}),
             "cd_mlp": Made({**line, "score": exact, "objective": trained,
                             "distance": {"kind": "pseudo_huber", "c0": 0.03}})}
    primary = PRIMARY | {"variant": "ct_mlp", "against": "ct_18", "metric": "pushforward"}
    write(folder, seeds, ("line",), made, vectors=True, primary=primary)
    for name, recipe in made.items():
        f = recipe.changes
        for seed in seeds:
            n, k = f["discretization"]["N"], f.get("score", {}).get("k", 1)
            w2 = 1 / n if f.get("score") == exact else (n * k) ** -0.5
            w2 *= 1 + 2 * f["distance"].get("c0", 0) * (f.get("score") != exact)
            w2 *= 1 if fixed(f) else 1.1 + 0.02 * (seed - 1)
            measured(folder, name, seed, {"kind": "pushforward", "ema": 0.05, "points": 20000,
                                          "reach": 4.0},
                     {"w2": w2, "between": 0.0 if f.get("score") == exact else w2 / 3,
                      "masses": [0.5, 0.5], "weights": [0.5, 0.5], "value": w2}, cell="line")
    return folder
