"""Training one run to its budget, exactly, from wherever its folder says it is.

Draw and step are split: the batch is addressed by the image count, and the loss is a pure function
of it, so a resumed run does the same bits.
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
from torch.utils.flop_counter import FlopCounterMode

from study import schedules
from study.budget import Spend, passes, snapshot_images
from study.capture import compiled, gradient
from study.data import Dataset, Draws
from study.errors import StudyError
from study.factors import FixedPoint
from study.meaning import ignored
from study.models import Lookup, initial, level_range, make_optimizer, make_problem
from study.settings import snapshot_points
from study.spec import Run
from study.store import Folder, append_line, read_lines, sha256, write_bytes, write_json
from study.weights import average, digest, load_tensors, power_gamma, save_tensors, snapshot_name

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


def second_moment(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Adam's running mean of squared gradients, its bias corrected, by parameter name."""
    beta = optimizer.param_groups[0]["betas"][1]
    states = {name: optimizer.state[w] for name, w in weights.items()}
    return {name: s["exp_avg_sq"] / (1 - beta ** float(s["step"])) for name, s in states.items()}


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
    files = [s["file"] for s in snapshots if s["file"]]
    if folder.file("steps.jsonl").exists():
        files.append("steps.jsonl")
    write_json(
        folder.file("trained.json"),
        {
            **facts,
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
        "inputs": dict(inputs),
    }
    if isinstance(factors.objective, FixedPoint):
        return untrained(folder, facts, None, ())
    net = initial(run, sources, lookup, dataset)
    if not factors.budget.images:
        return untrained(folder, facts, net, factors.weights_ema)
    budget, batch = factors.budget.images, factors.batch
    net = compiled(net, device)
    facts |= {
        "parameters": sum(p.numel() for p in net.parameters()),
        "init_digest": digest(dict(net.named_parameters())),
    }
    problem = make_problem(run, sources, lookup, dataset, device, net)
    followers = {
        name: (net_, decay)
        for name, net_, decay in (
            ("target", problem.average, lambda N: schedules.target_decay(factors.target, N)),
            ("own", problem.own, lambda _: factors.score.mu),
        )
        if net_ is not None
    }
    draws = Draws(dataset, run.seed, run.recipe.role, factors.data_stream)
    facts["stream_digest"] = stream_digest(draws)

    weights = list(net.parameters())
    gammas = [power_gamma(length) for length in factors.weights_ema]
    averages = [[w.detach().clone() for w in weights] for _ in gammas]
    optimizer = make_optimizer(factors.optimizer, net)

    # Multiply-adds of one step, counted on a real one.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        problem.loss(draws(0, batch), 2).backward()
    flops = float(counter.get_total_flops())

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
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        averages = [[a.to(device) for a in average] for average in state["averages"]]
        for name, (follower, _) in followers.items():
            follower.load_state_dict(state[name])
        spend = msgspec.convert(state["spend"], Spend)
    rows = [row for row in read_lines(log) if row["images"] <= spend.images]
    write_bytes(log, "".join(msgspec.json.encode(row).decode() + "\n" for row in rows).encode())

    def save() -> None:
        save_tensors(
            state_file,
            {
                "facts": facts,
                "net": net.state_dict(),
                **{name: follower.state_dict() for name, (follower, _) in followers.items()},
                "optimizer": optimizer.state_dict(),
                "averages": averages,
                "spend": msgspec.to_builtins(spend),
            },
        )

    def ended(outcome: str, reason: str | None) -> None:
        # a point asked for after training had passed it has no snapshot, and gets none
        made = [s for s in snapshots if folder.file(s["file"]).exists()]
        finish(folder, facts, outcome, reason, spend, made)

    points = snapshot_points(run.recipe.measure, run.measures, factors, run.recipe.role)
    due = snapshot_images(factors.budget.images, batch, points)
    snapshots = [
        {"at": at, "images": images, "file": snapshot_name(at)} for images, at in due.items()
    ]
    every = math.ceil(budget / batch / LOG_ROWS)
    per_image = passes(factors)
    step = gradient(problem, draws(0, batch))  # drops the gradients of the count above
    saved = clock = time.perf_counter()
    while spend.images < budget:
        N = schedules.grid_points(factors.discretization, spend.images / budget)
        loss = step(draws(spend.images, batch), N, spend.images / budget)
        update = spend.updates + 1
        logs = update % every == 0 or spend.images + batch >= budget
        if logs:
            norm = torch.stack(torch._foreach_norm([w.grad for w in weights])).norm()
            value = [float(loss), float(norm)]
            if not all(map(math.isfinite, value)):
                ended("diverged", f"loss {value[0]}, gradient norm {value[1]} at update {update}")
                return True
        optimizer.step()
        average(averages, weights, gammas, update)
        for follower, decay in followers.values():
            with torch.no_grad():
                torch._foreach_lerp_(list(follower.parameters()), weights, 1 - decay(N))

        if spend.images + batch in due and device.type == "cuda":
            torch.cuda.synchronize(device)  # what is queued is training, not saving
        tick = time.perf_counter()
        spend = spend.plus(batch, per_image, flops, tick - clock)
        if logs:
            append_line(
                log,
                {
                    "step": update,
                    "images": spend.images,
                    "progress": spend.images / budget,
                    "loss": value[0],
                    "grad_norm": value[1],
                    "lr": optimizer.param_groups[0]["lr"],
                    "N": None if "discretization" in ignored(factors) else N,
                    "seconds": spend.seconds,
                },
            )
        if spend.images in due:
            names = [name for name, _ in net.named_parameters()]
            emas = {
                str(length): dict(zip(names, average, strict=True))
                for length, average in zip(factors.weights_ema, averages, strict=True)
            }
            save_tensors(
                folder.file(snapshot_name(due[spend.images])),
                {
                    "raw": net.state_dict(),
                    "ema": emas,
                    "second_moment": second_moment(optimizer, dict(net.named_parameters())),
                    **{name: follower.state_dict() for name, (follower, _) in followers.items()},
                },
            )
        stopping = stop()
        if stopping or spend.images in due or tick - saved > SAVE_SECONDS:
            save()
            saved = tick
        if stopping and spend.images < budget:
            return False
        clock = time.perf_counter()  # saving is not training
    ended("trained", None)
    state_file.unlink(missing_ok=True)  # the last snapshot holds the weights
    return True
