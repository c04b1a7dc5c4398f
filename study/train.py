"""Training one run to its budget, exactly, from wherever its folder says it is.

An update is addressed by the image count (see `student`), so a resumed run does the same bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import nn

from study.budget import Spend, passes, snapshot_images
from study.data import Dataset, Draws
from study.errors import StudyError
from study.factors import FixedPoint
from study.halves import settled
from study.meaning import ignored
from study.models import Lookup, initial, level_range
from study.settings import snapshot_points
from study.spec import Run
from study.store import Folder, Step, append_line, read_lines, sha256, write_bytes, write_json
from study.streams import later
from study.student import Student
from study.weights import digest, load_tensors, save_tensors, snapshot_name

LOG_ROWS = 200
SAVE_SECONDS = 60
DIGEST_IMAGES = 256


def set_up() -> None:
    """One CPU thread and deterministic kernels in true float32: the same bits every time."""
    torch.set_num_threads(1)
    # cuBLAS is deterministic only with a fixed workspace, chosen before CUDA's first use
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and not free
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()  # what other runs of this process compiled would count against a limit


def stream_digest(draws: Draws) -> str:
    """Digest of the first images, noise and times: equal for all variants of a block."""
    first = draws(0, DIGEST_IMAGES)
    return digest({"x": first.x, "z": first.z, "u": first.u})


def untrained(
    folder: Folder, facts: Mapping[str, Any], net: nn.Module | None, lengths: Sequence[float]
) -> bool:
    """A run without training, at no expense: weights as they came, each average the same; or a
    fixed point, which has no weights and is computed where it is measured."""
    name = snapshot_name(1.0) if net else None
    if net:
        weights = dict(net.state_dict())
        emas = {str(length): weights for length in lengths}
        save_tensors(folder.file(name), {"raw": weights, "ema": emas})
        facts = facts | {"parameters": sum(w.numel() for w in weights.values()),
                         "init_digest": digest(weights)}  # fmt: skip
    finish(folder, facts, "trained", None, Spend(), [{"at": 1.0, "images": 0, "file": name}])
    return True


def finish(
    folder: Folder,
    facts: Mapping[str, Any],
    outcome: str,
    reason: str | None,
    spend: Spend,
    snapshots: list[dict[str, Any]],
) -> None:
    """Writes trained.json: nothing of the training changes afterwards."""
    attempt = settled(folder.path)
    files = [s["file"] for s in snapshots if s["file"]]
    if folder.file("steps.jsonl").exists():
        files.append("steps.jsonl")
    write_json(
        folder.file("trained.json"),
        {
            **facts,
            "attempt": attempt,
            "outcome": outcome,
            "reason": reason,
            "spend": msgspec.to_builtins(spend),
            "snapshots": snapshots,
            "sha256": {name: sha256(folder.file(name)) for name in files},
        },
    )


def train(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    stop: Callable[[], bool],
    inputs: Mapping[str, str],
) -> bool:
    """Trains the run to its budget; returns False where `stop` cut it short at a step boundary.

    Afterwards the folder holds steps.jsonl, state.pt, the snapshots and, last, trained.json with
    the outcome 'trained', or 'diverged' where the loss was not finite. inputs: digests of what the
    run reads of others, the same for as long as it trains.
    """
    factors, folder = run.recipe.factors, lookup(run.id)
    facts: dict[str, Any] = {
        "id": run.id,
        "sigma_data": level_range(factors, dataset).data,
        "data_digest": dataset.digest,
        "shape": list(dataset.shape),
        "inputs": dict(inputs),
    }
    if isinstance(factors.objective, FixedPoint):
        return untrained(folder, facts, None, ())
    net = initial(run, sources, lookup, dataset)
    if not factors.budget.images:
        return untrained(folder, facts, net, factors.weights_ema)
    budget, batch = factors.budget.images, factors.batch
    student = Student(run, sources, lookup, dataset, device, net)
    facts |= {
        "parameters": sum(w.numel() for w in student.weights),
        "init_digest": digest(dict(net.named_parameters())),
        "stream_digest": stream_digest(student.draws),
    }
    flops = student.flops()

    # Resume from the last state, the log rewound to it.
    spend = Spend()
    log, state_file = folder.file("steps.jsonl"), folder.file("state.pt")
    state = None
    if state_file.exists():
        try:
            state = load_tensors(state_file)
        except StudyError as error:  # torn or edited: the last good state is the first one
            print(f"{error}; training begins anew", flush=True)
    if state is not None:
        for key in ("sigma_data", "data_digest", "init_digest", "stream_digest", "inputs"):
            if state["facts"][key] != facts[key]:
                raise StudyError(
                    f"{state_file}: {key} was {state['facts'][key]} and is now "
                    f"{facts[key]}: the data or a source has changed"
                )
        student.restore(state)
        spend = msgspec.convert(state["spend"], Spend)
    rows = [row for row in read_lines(log, Step) if row["images"] <= spend.images]
    write_bytes(log, "".join(msgspec.json.encode(row).decode() + "\n" for row in rows).encode())

    def save() -> None:
        value = {"facts": facts, **student.state(), "spend": msgspec.to_builtins(spend)}
        save_tensors(state_file, value)

    def ended(outcome: str, reason: str | None, spent: Spend) -> None:
        # a point asked for after training had passed it has no snapshot, and gets none
        made = [s for s in snapshots if folder.file(s["file"]).exists()]
        finish(folder, facts, outcome, reason, spent, made)

    points = snapshot_points(run.recipe.measure, run.measures, factors, run.recipe.role)
    due = snapshot_images(budget, batch, points)
    snapshots = [
        {"at": at, "images": images, "file": snapshot_name(at)} for images, at in due.items()
    ]
    every = math.ceil(budget / batch / LOG_ROWS)
    per_image = passes(factors)
    waiting: list[tuple[dict[str, Any], Spend, Callable[[], list[float]]]] = []

    def logged() -> bool:
        """Writes the row that waits for its numbers; False where they end the run there."""
        for row, spent, numbers in waiting:
            loss, norm = numbers()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                reason = f"loss {loss}, gradient norm {norm} at update {row['step']}"
                if factors.precision == "float16":
                    reason += "; float16 ends at 65 504, so see whether bfloat16 does too"
                ended("diverged", reason, spent)
                return False
            append_line(log, row | {"loss": loss, "grad_norm": norm})
        waiting.clear()
        return True

    student.capture()
    saved = clock = time.perf_counter()
    while spend.images < budget:
        loss, N = student.update(spend.images)
        update, images = spend.updates + 1, spend.images + batch
        logs = update % every == 0 or images >= budget
        if logs:  # those of the row before have come by now
            if not logged():
                return True
            numbers = later(torch.stack((loss, student.gradient_norm())))
        if images in due and device.type == "cuda":
            torch.cuda.synchronize(device)  # what is queued is training, not saving
        tick = time.perf_counter()
        spend = spend.plus(batch, per_image, flops, tick - clock)
        if logs:
            row = {
                "step": update,
                "images": images,
                "progress": images / budget,
                "loss": None,
                "grad_norm": None,
                "lr": student.optimizer.param_groups[0]["lr"],
                "N": None if "discretization" in ignored(factors) else N,
                "seconds": spend.seconds,
            }
            waiting.append((row, spend, numbers))
        stopping = stop()
        saves = stopping or images in due or tick - saved > SAVE_SECONDS
        if (saves or device.type == "cpu") and not logged():
            return True
        if images in due:
            save_tensors(folder.file(snapshot_name(due[images])), student.snapshot())
        if saves:
            save()
            saved = tick
        if stopping and images < budget:
            return False
        clock = time.perf_counter()  # saving is not training
    ended("trained", None, spend)
    state_file.unlink(missing_ok=True)  # the last snapshot holds the weights
    return True
