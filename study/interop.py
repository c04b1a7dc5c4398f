"""Weights from outside, read as data, and weights for others.

Published EDM and ECT snapshots are pickles of objects that bring their source code along: each is
_reconstruct_persistent_obj(meta), meta a mapping {type, version, module_src, class_name, state},
and its tensors are bytes that torch.save wrote. Here meta becomes a plain record, no code in it is
looked at, and what asks for any other name is refused. State dicts go through torch's reader of
weights alone; .safetensors holds tensors and text.

Names are EDM's less the prefix `model.`. The buffers `*.resample_filter` and `map_augment.weight`,
whose input is zero outside of augmented training, are left out: nothing here reads them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from study.errors import StudyError
from study.factors import Denoising, Objective, Sigma
from study.persistent import Record, parameters, unpickled
from study.store import write_bytes
from study.weights import load_tensors

PRECONDITIONED = {"EDMPrecond": "denoising", "ECMPrecond": "consistency"}
LEFT_OUT = re.compile(r"(^|\.)(resample_filter|map_augment\.weight)$")
KEY = "consistency-gap"  # of a .safetensors file's metadata
NAMED = 3  # names of a kind in an error


@dataclass(frozen=True)
class Outside:
    """A file's tensors by parameter name, and what it says of them: None where it does not.

    network: the factor, as plain data; objective: its kind; sigma: of `min`, `max` and `data` what
    is known; shape: of x.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    network: Mapping[str, Any] | None = None
    objective: str | None = None
    sigma: Mapping[str, float] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    precision: str = "float32"


def read(path: Path, ema: str | None = None) -> Outside:
    """A file of weights, nothing in it executed. ema: which average, of a run's own snapshot (a
    length, or raw; else the first). Raises StudyError for anything else, naming what it holds."""
    if not path.is_file():
        raise StudyError(f"{path}: no such file of weights")
    if ema and path.suffix not in (".pt", ".pth"):
        raise StudyError(f"{path}: ema {ema} asked for, and the file holds one set of weights")
    try:
        match path.suffix:
            case ".pkl":
                found = _published(path)
            case ".safetensors":
                found = _safetensors(path)
            case ".pt" | ".pth":
                found = Outside(path, _state_dict(path, ema))
            case _:
                raise StudyError(f"{path}: .pkl, .pt, .pth or .safetensors expected")
    except StudyError:
        raise
    except Exception as error:  # a torn or forged file leads its reader to raise anything
        raise StudyError(f"{path}: cannot be read as weights: {error!r:.300}") from error
    tensors = found.tensors
    if all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): w for name, w in tensors.items()}
    kept = {name: w for name, w in tensors.items() if not LEFT_OUT.search(name)}
    return replace(found, tensors=kept)


# --- state dicts and .safetensors ---


def _state_dict(path: Path, ema: str | None) -> Mapping[str, Tensor]:
    """The tensors of a state dict, or of one average of a run's snapshot."""
    value = load_tensors(path)
    if isinstance(value, dict) and {"raw", "ema"} <= value.keys():
        return average(value, path, ema)
    if ema:
        raise StudyError(f"{path}: ema {ema} asked for, and it is no run's snapshot")
    return tensors(value, path)


def average(snapshot: Mapping[str, Any], path: Path, ema: str | None) -> Mapping[str, Tensor]:
    """The tensors of one average of a run's snapshot: a length, or raw; else the first. Raises
    StudyError where there is none such, or it is no snapshot."""
    try:
        sets = {**snapshot["ema"], "raw": snapshot["raw"]}
    except (KeyError, TypeError, IndexError):
        raise StudyError(f"{path}: its snapshot is not what training writes") from None
    chosen = ema or next(iter(sets))
    if chosen not in sets:
        allowed = ", ".join(map(str, sets))
        raise StudyError(f"{path}: ema {chosen}: no such average; allowed: {allowed}")
    return tensors(sets[chosen], path)


def tensors(value: object, path: Path) -> Mapping[str, Tensor]:
    """The value, found to be plain tensors by name, in numbers that are there. Raises
    StudyError."""
    named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    plain = named and all(type(w) in (Tensor, nn.Parameter) for w in value.values())
    if not plain or any(w.layout != torch.strided or w.is_meta for w in value.values()):
        raise StudyError(f"{path}: a state dict expected, tensors by name")
    return value


class _About(msgspec.Struct):
    """What a file that was written here says of its weights."""

    network: dict[str, Any]
    objective: str
    sigma: dict[str, float]
    shape: tuple[int, ...]
    precision: str


def _safetensors(path: Path) -> Outside:
    """Tensors, and what `write` said of them."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if KEY not in metadata:
        return Outside(path, tensors)
    about = msgspec.json.decode(metadata[KEY], type=_About)
    return Outside(path, tensors, **msgspec.structs.asdict(about))


def write(weights: Outside) -> None:
    """Its .safetensors file, whose metadata say, as JSON under one key (several would come in any
    order), what network this is and of what, all of it known: whole or not at all."""
    about = {name: getattr(weights, name) for name in _About.__struct_fields__}
    tensors = {name: w.contiguous() for name, w in weights.tensors.items()}
    metadata = {KEY: msgspec.json.encode(about).decode()}
    write_bytes(weights.path, safetensors.torch.save(tensors, metadata))


# --- EDM's and ECT's snapshots ---


class _Preconditioning(msgspec.Struct):
    """What the outer object says: unconditional, of square images."""

    img_resolution: int
    img_channels: int
    sigma_min: float
    sigma_max: float
    sigma_data: float
    label_dim: Literal[0] = 0


class _SongUNet(msgspec.Struct):
    """The arguments that make a SongUNet a DDPM++, at the defaults of EDM's code."""

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    channel_mult_emb: Literal[4] = 4
    embedding_type: Literal["positional"] = "positional"
    channel_mult_noise: Literal[1] = 1
    encoder_type: Literal["standard"] = "standard"
    decoder_type: Literal["standard"] = "standard"
    resample_filter: tuple[Literal[1], Literal[1]] = (1, 1)


def _published(path: Path) -> Outside:
    """The averaged network of an EDM or ECT snapshot."""
    value = unpickled(path.read_bytes(), str(path))
    outer = value.get("ema") if isinstance(value, dict) else None
    if not isinstance(outer, Record) or outer.name not in PRECONDITIONED:
        raise StudyError(
            f"{path}: {getattr(outer, 'name', 'no network')} under the key ema; "
            f"{' or '.join(PRECONDITIONED)} expected, as EDM and ECT save"
        )
    model = outer.state["_modules"]["model"]
    if model.name != "SongUNet":
        raise StudyError(f"{path}: its network is a {model.name}; SongUNet expected")
    try:
        about = msgspec.convert(dict(outer.state), _Preconditioning)
        song = msgspec.convert(dict(model.state["_init_kwargs"]), _SongUNet)
    except msgspec.ValidationError as error:
        raise StudyError(
            f"{path}: not an unconditional DDPM++, the only published network that is known "
            f"here: {error}"
        ) from None
    side = about.img_resolution
    sides = [side >> level for level in range(len(song.channel_mult))]
    network = {
        "kind": "ddpmpp",
        "width": song.model_channels,
        "mult": song.channel_mult,
        "blocks": song.num_blocks,
        "attention": [s for s in song.attn_resolutions if s in sides],
    }
    levels = {"min": about.sigma_min, "max": about.sigma_max, "data": about.sigma_data}
    shape = about.img_channels, side, side
    objective = PRECONDITIONED[outer.name]
    return Outside(path, dict(parameters(outer)), network, objective, levels, shape)


# --- into a network ---


def agree(outside: Outside, objective: Objective, sigma: Sigma, as_is: bool) -> None:
    """The weights mean here what they meant where they were trained. as_is: they are not trained
    on. Raises StudyError naming both values where they do not."""
    path, known, kind = outside.path, outside.sigma, objective.__struct_config__.tag
    theirs = outside.objective
    if as_is and theirs and (theirs == "denoising") != isinstance(objective, Denoising):
        raise StudyError(f"{path}: trained by {theirs}; untrained it can't be a run of {kind}")
    if "data" in known and not math.isclose(known["data"], sigma.data, rel_tol=1e-6):
        raise StudyError(
            f"{path}: trained with sigma_data {known['data']:g}, and this run's is "
            f"{sigma.data:g}, which would be another preconditioning; state sigma: "
            f"{{data: {known['data']:g}}}"
        )
    low, high = known.get("min", 0.0), known.get("max", math.inf)
    begins = low == sigma.min if theirs != "denoising" and "min" in known else low <= sigma.min
    if not begins or sigma.max > high:
        raise StudyError(
            f"{path}: trained for noise levels {low:g} to {high:g}, and this run's are "
            f"{sigma.min:g} to {sigma.max:g}; state sigma: {{min: ..., max: ...}}"
        )


def fit(outside: Outside, net: nn.Module) -> dict[str, Tensor]:
    """The network's state with the file's weights in it; a second head that the file does not have
    stays as it is. Raises StudyError naming parameters that are missing, unknown or misshapen."""
    own = net.state_dict()
    found = {k: w for k, w in outside.tensors.items() if k in own or not k.startswith("head.")}
    needed = {k: w for k, w in own.items() if k in found or not k.startswith("head.")}
    missing = [f"{k} {tuple(w.shape)}" for k, w in needed.items() if k not in found]
    unknown = [f"{k} {tuple(w.shape)}" for k, w in found.items() if k not in own]
    shapes = {k: (tuple(found[k].shape), tuple(w.shape)) for k, w in own.items() if k in found}
    other = [f"{k} {a}, here {b}" for k, (a, b) in shapes.items() if a != b]
    parts = {"other shapes": other, "not in the file": missing, "not in the network": unknown}
    if not any(parts.values()):
        return {**own, **found}
    said = "; ".join(
        f"{title}: {', '.join(names[:NAMED])}"
        + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for title, names in parts.items()
        if names
    )
    hint = ""
    if outside.network:
        hint = f"; its network is {json.dumps(outside.network)}".replace('"', "")
        hint += f" for x of shape {outside.shape}"
    raise StudyError(f"{outside.path}: the weights do not fit the run's network; {said}{hint}")
