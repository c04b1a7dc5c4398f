"""Measuring a trained run: what is due, from its snapshots, one atomic file each.

A measurement is a pure function of a snapshot and a settings record. Those of one snapshot share
its samples and their features, the latest of which are kept: 50 000 images and their features in
InceptionV3 are half a GB.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from study import evaluate, instruments, oracle, probes, reference, trajectories
from study.data import Dataset, to_uint8
from study.errors import StudyError
from study.extractors.names import is_inception
from study.factors import Denoising
from study.mixtures import Density
from study.models import Lookup, finished, knowledge, level_range
from study.settings import HEUN_NFE, PROBES, Settings
from study.spec import Run
from study.store import Folder, write_bytes, write_json
from study.weights import snapshot_name

LAST = snapshot_name(1.0)
KEEP = 1 << 31  # bytes of samples, of images and of features each that a snapshot keeps
GRID, PIXELS, FRAME = 8, 320, 96  # samples.png: images a side, width in pixels, frame's grey


class Snapshot:
    """One snapshot's model on one device, with its samples and features made once."""

    def __init__(
        self,
        run: Run,
        folder: Folder,
        dataset: Dataset,
        device: torch.device,
        at: float,
        ema: float,
    ) -> None:
        factors = run.recipe.factors
        self.run, self.dataset, self.device = run, dataset, device
        self.sigma = level_range(factors, dataset)
        rows = min(factors.batch, evaluate.CHUNK)
        self.model = finished(factors, folder, dataset, device, rows, at, ema)
        self.samples = latest(lambda *address: torch.cat(list(self._sampled(*address))))
        self.images = latest(
            lambda *address: torch.cat([to_uint8(part) for part in self._sampled(*address)])
        )
        self.features = latest(
            lambda net, *address: evaluate.features(self.images(*address), net)
        )
        self.statistics = cache(
            lambda net, *address: evaluate.statistics(self.features(net, *address), device)
        )

    def _sampled(self, n: int, nfe: int, mid: float | None, draw: int) -> Iterator[Tensor]:
        record = {"samples": n, "nfe": nfe, "mid": mid}
        return evaluate.sampled(
            self.model, record, self.dataset.shape, self.sigma, self.run.seed, draw, self.device
        )


def latest(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """make(*key), its latest results kept up to KEEP bytes, the last one always."""
    results: dict[tuple, Tensor] = {}

    def get(*key: object) -> Tensor:
        results[key] = results.pop(key) if key in results else make(*key)
        while len(results) > 1 and sum(x.nbytes for x in results.values()) > KEEP:
            del results[next(iter(results))]
        return results[key]

    return get


def distances(
    record: Mapping[str, Any], one: Callable[[int], float], floor: float | None
) -> dict[str, Any]:
    """A distance over sampling draws: their mean, each of them, and real against real, where
    there are images enough for it."""
    draws = [one(draw) for draw in range(record["draws"])]
    return {"value": sum(draws) / len(draws), "draws": draws, "floor": floor}


def values(snapshot: Snapshot, settings: Settings) -> dict[str, Any]:
    """The measurement that settings ask of a snapshot."""
    dataset, record = snapshot.dataset, settings.record
    kind, n = record["kind"], record.get("samples")
    if "extractor" in record:
        net = evaluate.extractor(record["extractor"], snapshot.device, settings.weights)

    def made(draw: int) -> tuple:
        return n, record["nfe"], record["mid"], draw

    if kind == "fid":
        real = reference.statistics(dataset, n, record["reference"], net)
        return distances(
            record,
            lambda draw: evaluate.frechet(snapshot.statistics(net, *made(draw)), real),
            reference.floor(kind, dataset, n, net),
        )
    if kind == "kid":
        real = reference.features(dataset, n, record["reference"], net)
        return distances(
            record,
            lambda draw: evaluate.kid(snapshot.features(net, *made(draw)), real),
            reference.floor(kind, dataset, n, net),
        )
    if kind == "sliced_wasserstein":
        generator = torch.Generator(snapshot.device)
        real = [dataset.fresh(n, generator.manual_seed(i)) for i in range(2)]
        projections = record["projections"]
        return distances(
            record,
            lambda draw: evaluate.sliced_wasserstein(
                snapshot.samples(*made(draw)), real[0], projections
            ),
            evaluate.sliced_wasserstein(real[1], real[0], projections),
        )
    if kind == "mode_mass":
        density = dataset.density
        masses = [
            evaluate.mode_mass(snapshot.samples(*made(draw)), density.means, density.stds)
            for draw in range(record["draws"])
        ]
        shares = np.mean([m[0] for m in masses], 0)
        true = density.log_weights.softmax(0).cpu().numpy()
        return {
            "between": float(np.mean([m[1] for m in masses])),
            "tv": float(np.abs(shares / max(shares.sum(), 1e-9) - true).sum() / 2),
            "shares": shares.tolist(),
            "weights": true.tolist(),
        }
    if kind == "coverage":
        pair = snapshot.features(net, *made(0)), reference.features(dataset, n, "train", net)
        if is_inception(record["extractor"]):  # its classes are ImageNet's, not the data's
            pair = (x.to(snapshot.device) for x in pair)  # 2048 features are slow on a CPU
            return evaluate.coverage(*pair, record["neighbours"])
        near = evaluate.coverage(*pair, record["neighbours"])
        logits = evaluate.classes(snapshot.images(*made(0)), net)
        return near | evaluate.class_histogram(logits, reference.classes(dataset, n, net))
    if kind == "memorisation":
        return evaluate.memorisation(snapshot.samples(*made(0)), dataset.train, dataset.held_out)
    if kind == "pushforward":
        x = oracle.quantiles(snapshot.sigma, record["points"])
        x = torch.as_tensor(x, dtype=torch.float32, device=snapshot.device)[:, None]
        with torch.no_grad():
            y = snapshot.model(x, evaluate.filled(snapshot.sigma.max, x))[:, 0].double().cpu()
        density = dataset.density.to("cpu")
        result = oracle.pushforward(y, density, snapshot.sigma, record["reach"])
        return result | {"value": result["w2"]}
    assert kind == "map_error", kind
    return probes.map_error(
        snapshot.model, dataset, snapshot.sigma, record["sigmas"], n
    )


def together(settings: Settings, first: float) -> tuple:
    """What orders measurements so that those of one snapshot, and in it of one number of steps,
    follow each other, the weights that samples.png shows last."""
    ema = settings.record.get("ema")
    return settings.at, ema == first, str(ema), settings.record.get("nfe") or 0


def measure(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    stop: Callable[[], bool],
) -> bool:
    """Makes what is due of a trained run; returns False where `stop` cut it short."""
    folder = lookup(run.id)
    points = {s["at"]: s["images"] for s in folder.trained["snapshots"]}
    rows = min(run.recipe.factors.batch, evaluate.CHUNK)
    teacher = cache(
        lambda i: finished(sources[i].recipe.factors, lookup(i), dataset, device, rows)
    )
    paths = cache(lambda ids: instruments.denoisers(ids, dataset, teacher))
    snapshot = lru_cache(1)(lambda at, ema: Snapshot(run, folder, dataset, device, at, ema))

    def made(settings: Settings) -> dict[str, Any]:
        record = settings.record
        if record["kind"] in PROBES:
            return instruments.gradient(
                run, sources, lookup, dataset, device, settings.at, record, teacher
            )
        if record["kind"] == "trajectories":
            last = snapshot(settings.at, record["ema"])
            return trajectories.trajectories(
                last.model,
                paths(tuple(record["teachers"])),
                dataset,
                last.sigma,
                record["sigmas"],
                record["samples"],
                record["steps"],
                run.seed,
            )
        if record["kind"] == "score_error":
            factors = run.recipe.factors
            return probes.score_error(
                factors.score,
                knowledge(run, sources, lookup, dataset, device),
                dataset,
                level_range(factors, dataset),
                record["sigmas"],
                record["samples"],
                record.get("batch"),
            )
        return values(snapshot(settings.at, record["ema"]), settings)

    first = run.recipe.factors.weights_ema[0]
    due = sorted(folder.due(run, thorough=True), key=lambda s: together(s, first))
    for settings in due:  # a torn one must not pass for a made one if making it fails
        folder.file(f"measures/{settings.file}").unlink(missing_ok=True)
    for settings in due:
        if stop():
            return False
        start, record = time.perf_counter(), settings.record
        try:
            result = made(settings)
        except torch.OutOfMemoryError as error:
            raise StudyError(
                f"measure.{record['kind']}: this GPU's memory does not hold it; ask for less of "
                "it (samples, batches, n), or take a larger GPU or --device cpu"
            ) from error
        write_json(
            folder.file(f"measures/{settings.file}"),
            {
                "id": run.id,
                "at": settings.at,
                "images": points[settings.at],
                "settings": {**record, "at": settings.at},
                "snapshot": folder.trained["sha256"].get(snapshot_name(settings.at)),
                "inputs": {i: lookup(i).digest(LAST) for i in settings.consults},
                **finite(result),
                "seconds": round(time.perf_counter() - start, 3),
            },
        )
    if 1.0 in points and not folder.file("samples.png").exists():
        write_bytes(folder.file("samples.png"), picture(snapshot(1.0, first)))
    return True


def finite(value: Any) -> Any:  # noqa: ANN401
    """Numbers that are not finite as null: JSON has no others."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(snapshot: Snapshot) -> bytes:
    """PNG of samples from a fixed noise grid, the same for every run and seed."""
    nfe = HEUN_NFE if isinstance(snapshot.run.recipe.factors.objective, Denoising) else 1
    count = GRID**2 if snapshot.dataset.images else 2048
    x = evaluate.samples(
        snapshot.model,
        {"samples": count, "nfe": nfe, "mid": None},
        snapshot.dataset.shape,
        snapshot.sigma,
        0,
        -1,
        snapshot.device,
    )
    return grid(x) if snapshot.dataset.images else scatter(x, snapshot.dataset.density)


def png(image: np.ndarray, scale: int = 1) -> bytes:
    """PNG of uint8 pixels (H, W, 1 or 3), each drawn as `scale` a side."""
    file = io.BytesIO()
    shown = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    size = shown.width * scale, shown.height * scale
    shown.resize(size, Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()


def pixels(x: Tensor) -> np.ndarray:
    """Images (n, C, S, S) in [-1, 1] as uint8 (n, S, S, C)."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


def grid(x: Tensor) -> bytes:
    """PNG of images (n, C, S, S) in rows, as many as there are columns, framed."""
    side = math.ceil(math.sqrt(len(x)))
    free = side**2 - len(x)
    rows = np.pad(pixels(x), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=FRAME)
    rows = np.pad(rows, ((0, free), (0, 0), (0, 0), (0, 0)), constant_values=FRAME)
    size = rows.shape[1]
    whole = rows.reshape(side, side, size, size, -1).swapaxes(1, 2)
    whole = whole.reshape(side * size, side * size, -1)
    return png(whole, max(1, PIXELS // len(whole)))


def scatter(x: Tensor, density: Density) -> bytes:
    """PNG of vectors (n, d): a histogram on a line, else their first two coordinates."""
    from matplotlib.figure import Figure  # vectors only: images need no plotting library

    file = io.BytesIO()
    figure = Figure(figsize=(2.56, 2.56), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    x = x.cpu().numpy()
    reach = float(density.means.abs().max() + 4 * density.stds.max())
    if x.shape[1] == 1:
        axes.hist(x[:, 0], bins=120, range=(-reach, reach), color="0.2")
    else:
        axes.scatter(x[:, 0], x[:, 1], s=1, color="0.2", linewidths=0)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
