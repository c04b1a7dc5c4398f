"""A finished model by itself, from a run's folder or from a file of weights: its network, what it
is a function of, and where its samples start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch
from torch import Tensor

from study import data, interop, networks, subjects
from study.consistency import Function
from study.errors import StudyError, nearest
from study.evaluate import CHUNK
from study.factors import Denoising, Factors, Objective, Sigma
from study.identity import SCHEMA
from study.limits import check_sample
from study.mixtures import Density
from study.models import function_of
from study.store import Folder, read_json
from study.subjects import FittedMixture, Mixture
from study.weights import snapshot_at

MOST = 1024  # pixels a side, or numbers of a vector


class Known(TypedDict):
    """What is read of run.json."""

    schema: int
    factors: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """Weights and what makes them a model. sigma: with `data`; shape: of x; rows: the batch that
    it is compiled for on a GPU; density: the population, of a run on vectors."""

    where: Path
    weights: Mapping[str, Tensor]
    network: subjects.Network
    objective: Objective
    sigma: Sigma
    shape: tuple[int, ...]
    precision: str
    rows: int = CHUNK
    density: Density | None = None

    @property
    def denoises(self) -> bool:
        """Whether it is a denoiser, whose samples take many steps."""
        return isinstance(self.objective, Denoising)

    def function(self, device: torch.device, most: int = CHUNK) -> Function:
        """D(x_t, t) or f(x_t, t) on the device, on a GPU in batches of `most` at the most."""
        head = any(name.startswith("head.") for name in self.weights)
        outside = interop.Outside(self.where, self.weights)
        with torch.device("meta"):  # the file may describe a network of any size
            shapes = networks.made(self.network, self.shape, 0.0, self.precision, head)
        interop.fit(outside, shapes)
        net = networks.build(self.network, self.shape, 0.0, 0, "", self.precision, head)
        net.load_state_dict(interop.fit(outside, net))
        return function_of(net, self.objective, self.sigma, device, min(self.rows, most))

    def export(self, path: Path) -> None:
        """Writes them as .safetensors, with what another program needs to use them."""
        network, sigma = msgspec.to_builtins(self.network), msgspec.to_builtins(self.sigma)
        kind = self.objective.__struct_config__.tag
        interop.write(interop.Outside(
            path, self.weights, network, kind, sigma, self.shape, self.precision
        ))  # fmt: skip


def load(path: Path, at: float, ema: str | None) -> Saved:
    """A run's folder or a file of weights. at: share of a run's budget; ema: length of an average,
    or raw; the first where there are several. Raises StudyError for anything else."""
    return _from_run(path, at, ema) if path.is_dir() else _from_file(path, ema)


def _from_run(path: Path, at: float, ema: str | None) -> Saved:
    """A run's snapshot."""
    known, folder = read_json(path / "run.json", Known), Folder(path)
    if known is None:
        raise StudyError(f"{path}: no run.json in it; a run's folder (results/STUDY/runs/...) or "
                         "a file of weights expected")  # fmt: skip
    if known.get("schema") != SCHEMA:
        raise StudyError(f"{path}: run.json: schema {known.get('schema')!r}; allowed: {SCHEMA}")
    if (known["factors"].get("objective") or {}).get("kind") == "fixed_point":
        raise StudyError(f"{path}: a fixed point is computed; it has no weights")
    trained = folder.trained
    if trained is None:
        raise StudyError(f"{path}: not trained yet; the command that starts its study goes on")
    try:
        recipe = msgspec.convert(known["factors"], Factors)
        levels = msgspec.to_builtins(recipe.sigma) | {"data": trained.get("sigma_data")}
        sigma = msgspec.convert(levels, Sigma)
    except (msgspec.ValidationError, RecursionError) as error:
        raise StudyError(f"{path}: run.json is of another version: {error}") from None
    if isinstance(recipe.data, Mixture | FittedMixture):
        check_sample(recipe.data, f"{path}: run.json")
    points = [s["at"] for s in trained["snapshots"]]
    if at not in points:
        raise StudyError(f"{path}: --at {at:g}: no such snapshot; {nearest(at, points)}")
    weights = interop.average(snapshot_at(folder, at), path, ema)
    shape = tuple(trained.get("shape", ()))
    vectors = len(shape) == 1
    if not shape or vectors:  # of vectors the population is drawn beside; older runs have no shape
        dataset = data.load(recipe.data)
        shape, vectors = dataset.shape, not dataset.images
    return Saved(
        path,
        weights,
        recipe.network,
        recipe.objective,
        sigma,
        shape,
        recipe.precision,
        min(recipe.batch, CHUNK),
        dataset.density if vectors else None,
    )


def _from_file(path: Path, ema: str | None) -> Saved:
    """A file that says what network its weights are of."""
    outside = interop.read(path, ema)
    if outside.network is None or outside.objective is None or outside.shape is None:
        raise StudyError(
            f"{path}: it does not say what network its weights are of; name it as a run's first "
            "weights (init: {weights: PATH}), whose study says so"
        )
    if len(outside.shape) not in (1, 3) or not all(0 < n <= MOST for n in outside.shape[-2:]):
        raise StudyError(f"{path}: x of shape {outside.shape}; (d,) or (C, S, S) up to {MOST}")
    if outside.shape[2:] and (outside.shape[0] not in (1, 3) or len({*outside.shape[1:]}) > 1):
        raise StudyError(f"{path}: x of shape {outside.shape}; square grey or RGB images expected")
    sigma, known = Sigma(), outside.sigma
    low, high = max(sigma.min, known.get("min", 0)), min(sigma.max, known.get("max", sigma.max))
    levels: dict[str, Any] = {**known, "min": low, "max": high}
    try:
        return Saved(
            path,
            outside.tensors,
            msgspec.convert(outside.network, subjects.Network),
            msgspec.convert({"kind": outside.objective}, Objective),
            msgspec.convert(levels, Sigma),
            outside.shape,
            outside.precision,
        )
    except msgspec.ValidationError as error:
        raise StudyError(f"{path}: what it says of its network is unknown here: {error}") from None
