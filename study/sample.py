"""Draws samples of a finished model: a grid, a folder of images, or numbers.

RUN is a run's folder, results/STUDY/runs/NAME; FILE a file of weights: an EDM or ECT snapshot
(.pkl, whose code is not run) or .safetensors written by --export. Nothing but the files asked for
is written, each whole or not at all: a file that is there, samples.png too, is written over, a
folder that is not empty is refused. Exit status: 0 done; 2 the command has to be mended.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from study.errors import StudyError, command
from study.launch import devices
from study.settings import HEUN_NFE
from study.store import write_bytes

if TYPE_CHECKING:  # --help does without torch
    from torch import Tensor

    from study.saved import Saved

MOST = 1_000_000  # samples
MID = 0.821  # as `measure` has it
DRAW = -1  # of samples.png, which no measurement shares

EXAMPLES = """examples:
  python -m study.sample results/grid/runs/ct-grid-s0-...       the grid of its samples.png
  python -m study.sample RUN --nfe 2 --mid 0.821 --out two.png  in two steps
  python -m study.sample RUN --at 0.5 --ema raw                 halfway, not averaged
  python -m study.sample RUN --count 50000 --out images/        000000.png to 049999.png
  python -m study.sample edm-cifar10.pkl --nfe 35               a published denoiser
  python -m study.sample RUN --export ct.safetensors            its weights, for other programs
  python -m study.sample ct.safetensors                         and back
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m study.sample",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, metavar="RUN_OR_FILE")
    add = p.add_argument
    add("--out", metavar="PATH", help="a .png grid, a .npy of x (of vectors from a file the only "
        "one), or a folder of images, new or empty, where it ends in / (default: samples.png, or "
        "nothing with --export)")  # fmt: skip
    add("--count", type=int, metavar="N", help="how many (default: 64 images or 2048 vectors)")
    add("--nfe", type=int, metavar="N", help="network evaluations for each: of a consistency "
        "model 1 or 2 (default: 1), of a denoiser an odd number from 3, by Heun steps (default: "
        f"{HEUN_NFE})")  # fmt: skip
    add("--mid", type=float, default=MID, metavar="SIGMA",
        help=f"noise level of the second of two steps (default: {MID})")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S",
        help="of the noise (default: 0, that of samples.png)")  # fmt: skip
    add("--at", type=float, default=1.0, metavar="SHARE",
        help="a run's snapshot, as a share of its budget (default: 1)")  # fmt: skip
    add("--ema", metavar="LENGTH", help="which average of a run's weights, or raw (default: the "
        "first of weights_ema)")  # fmt: skip
    add("--batch", type=int, metavar="N", help="samples at once (default: 512)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--export", type=Path, metavar="FILE.safetensors",
        help="write the weights, with what network they are of")  # fmt: skip
    return p


def check(options: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    for name, low, high in (("count", 1, MOST), ("batch", 1, MOST), ("seed", 0, 2**31)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise StudyError(f"--{name} {value}: a whole number from {low} to {high} expected")
    if options.export and options.export.suffix != ".safetensors":
        raise StudyError(f"--export {options.export}: a name that ends in .safetensors expected")
    if options.out is None and not options.export:
        options.out = "samples.png"
    if options.out is not None:
        out = resolved(options.out)
        if is_folder(options.out):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise StudyError(f"--out {options.out}: there, and no empty folder")
            if out == Path.cwd():  # a new folder takes the place of an empty one
                raise StudyError(f"--out {options.out}: the folder that you are in; name another")
        elif out.suffix not in (".png", ".npy"):
            raise StudyError(f"--out {out}: a .png, a .npy or a folder (ending in /) expected")
    for path in (options.export, options.out and resolved(options.out)):
        if path and not path.parent.is_dir():
            raise StudyError(f"{path}: no folder {path.parent} to write it to")


def is_folder(out: str) -> bool:
    """Whether --out names a folder."""
    return out.endswith("/") or Path(out).is_dir()


def resolved(out: str) -> Path:
    """Where --out leads: of a folder, its links followed."""
    return Path(os.path.realpath(out)) if is_folder(out) else Path(out)


def steps(model: Saved, nfe: int | None, mid: float) -> tuple[int, float | None]:
    """Network evaluations, and the second one's noise level where there are two."""
    if nfe is None:
        nfe = HEUN_NFE if model.denoises else 1
    if model.denoises and (nfe < 3 or nfe % 2 == 0 or nfe > 9999):
        raise StudyError(f"--nfe {nfe}: {model.where} is a denoiser; an odd number from 3 to 9999 "
                         "expected, two for each Heun step less one")  # fmt: skip
    if not model.denoises and nfe not in (1, 2):
        raise StudyError(f"--nfe {nfe}: {model.where} is a consistency model; 1 or 2 expected")
    if nfe == 2 and not model.sigma.min <= mid <= model.sigma.max:
        raise StudyError(f"--mid {mid}: a noise level from {model.sigma.min} to "
                         f"{model.sigma.max} expected")  # fmt: skip
    return nfe, mid if nfe == 2 else None


def drawn(model: Saved, options: argparse.Namespace, console: Console) -> Tensor:
    """The samples (n, ...), with a bar on a terminal."""
    import torch

    from study import evaluate, measure
    from study.capture import usable
    from study.train import set_up

    nfe, mid = steps(model, options.nfe, options.mid)
    count = options.count or (measure.GRID**2 if len(model.shape) == 3 else 2048)
    chunk = options.batch or evaluate.CHUNK
    set_up()
    device = usable(devices(options.device, None)[0])
    function = model.function(device, chunk)

    def too_many(option: str, n: int) -> StudyError:
        return StudyError(f"--{option} {n}: too many at once for {device}'s memory; give fewer")

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("samples", total=nfe * -(-count // chunk))

        def counted(x: Tensor, t: Tensor) -> Tensor:
            try:
                y = function(x, t)
            except torch.OutOfMemoryError:
                raise too_many("batch", chunk) from None
            bar.advance(task)
            return y

        record = {"samples": count, "nfe": nfe, "mid": mid}
        arguments = record, model.shape, model.sigma, options.seed, DRAW, device, chunk
        try:
            return evaluate.samples(counted, *arguments)
        except torch.OutOfMemoryError:  # beside the network there are all samples and their noise
            raise too_many("count", count) from None


def write(model: Saved, x: Tensor, out: str) -> None:
    """The samples as --out asks for them."""
    import numpy as np

    from study import measure

    path, images = resolved(out), len(model.shape) == 3
    if is_folder(out):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as half:
            whole = Path(half) / path.name
            whole.mkdir()
            for i, image in enumerate(measure.pixels(x)):
                (whole / f"{i:06d}.png").write_bytes(measure.png(image))
            whole.rename(path)
    elif path.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, x.cpu().numpy())
        write_bytes(path, file.getvalue())
    else:
        write_bytes(path, measure.grid(x) if images else measure.scatter(x, model.density))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parser().parse_args(arguments)
    console, problems = Console(), Console(stderr=True)
    try:
        check(options)
        from study.saved import load

        model = load(options.model, options.at, options.ema)
        images, suffix = len(model.shape) == 3, Path(options.out or "x.npy").suffix
        if not images and suffix != ".npy" and not (suffix == ".png" and model.density):
            raise StudyError(f"--out {options.out}: the samples are vectors; a .npy expected, or "
                             "of a run a .png")  # fmt: skip
        if options.export:
            model.export(options.export)
            console.print(f"wrote {options.export}", highlight=False, soft_wrap=True)
        if options.out is not None:
            write(model, drawn(model, options, problems), options.out)
            console.print(f"wrote {options.out}", highlight=False, soft_wrap=True)
    except StudyError as error:
        problems.print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        return 2
    except OSError as error:
        problems.print(f"error: {error.filename}: cannot be written: {error.strerror}",
                       style="red", highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    command(main)
