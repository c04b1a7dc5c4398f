"""Snapshots as EDM and ECT save them, made by modules that are pickled as theirs are.

`torch_utils.persistence` and `dnnlib` exist here only while such a file is written: what reads one
has to do without them.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class EasyDict(dict):
    """dnnlib's dict with attributes."""


EasyDict.__module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("the code of a pickle was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextmanager
def elsewhere() -> None:
    """The modules that such pickles name."""
    made = {name: types.ModuleType(name) for name in
            ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}  # fmt: skip
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def persistent(source: str = "raise AssertionError('executed')") -> Callable[[type], type]:
    """Pickled as an object that carries `source` and its constructor's arguments."""

    def decorated(cls: type) -> type:
        class Persistent(cls):
            def __init__(self, *args: object, **kwargs: object) -> None:
                super().__init__(*args, **kwargs)
                self._init_args, self._init_kwargs = args, copy.deepcopy(kwargs)

            def __reduce__(self) -> tuple:
                state = object.__reduce__(self)[2]
                meta = {"type": "class", "version": 6, "module_src": source,
                        "class_name": cls.__name__, "state": state}  # fmt: skip
                return _reconstruct_persistent_obj, (meta,), None

        return Persistent

    return decorated


@persistent()
class Conv2d(nn.Module):
    """A convolution with a buffer of a filter, as EDM's resampling ones have."""

    def __init__(self, weight: Tensor, bias: Tensor | None, resampled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        filter = torch.full((1, 1, 2, 2), 0.25) if resampled else None
        self.register_buffer("resample_filter", filter)


@persistent()
class Node(nn.Module):
    """A module with children and the plain attributes that EDM's have."""

    def __init__(self) -> None:
        super().__init__()
        self.skip_scale = np.sqrt(0.5)
        self.init_attn = {"init_weight": np.sqrt(0.2)}


class SongUNet(nn.Module):
    """Tensors by dotted name as a tree of persistent modules, `enc` and `dec` plain ones."""

    def __init__(self, tensors: dict[str, Tensor], **kwargs: object) -> None:
        super().__init__()
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for name, value in tensors.items():
            *path, layer, leaf = name.split(".")
            if leaf == "bias":
                continue
            where = self
            for step in path:
                if step not in where._modules:
                    where.add_module(step, Node())
                where = where._modules[step]
            bias = tensors.get(name.removesuffix("weight") + "bias")
            where.add_module(layer, Conv2d(value, bias, "conv0" in layer))


class Precond(nn.Module):
    """The preconditioning around the network."""

    def __init__(self, model: nn.Module, **levels: object) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = 8, 1, 0, False
        for name, value in levels.items():
            setattr(self, name, value)
        self.model = model


class ECMLoss:
    """A loss that keeps one of its methods in itself, as ECT's does."""

    def __init__(self) -> None:
        self.t_to_r = self.t_to_r_sigmoid

    def t_to_r_sigmoid(self) -> None:
        """Not called."""


def snapshot(
    path: Path,
    tensors: dict[str, Tensor],
    kind: str = "EDMPrecond",
    source: str = "raise AssertionError('executed')",
    arguments: dict[str, object] | None = None,
    **levels: object,
) -> Path:
    """An EDM or ECT snapshot of a network with these tensors and SongUNet arguments."""
    outer = type(kind, (Precond,), {})
    levels = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5} | levels
    mapped = {"map_augment.weight": torch.ones(3, 2)} if kind == "EDMPrecond" else {}
    with elsewhere():
        inner = persistent(source)(SongUNet)(tensors | mapped, **arguments or {})
        inner._init_kwargs.pop("tensors", None)
        inner._init_args = ()
        ema = persistent(source)(outer)(inner, **levels)
        ema._init_args, ema._init_kwargs = (), EasyDict(model_type="SongUNet")
        value = {"ema": ema.eval().requires_grad_(False), "loss_fn": persistent(source)(ECMLoss)(),
                 "augment_pipe": None, "dataset_kwargs": EasyDict(path="x", resolution=8)}
        file = io.BytesIO()
        pickle.dump(value, file)
    path.write_bytes(file.getvalue())
    return path
