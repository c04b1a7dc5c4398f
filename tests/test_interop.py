"""Weights from outside: read as they were written, nothing executed, refused where they do not
fit."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import resource
import struct
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import published
import pytest
import safetensors.torch
import torch
from studies import write
from torch import Tensor, nn

from study import interop, models, worker
from study.data import load as loaded
from study.domains import shape_of
from study.errors import StudyError
from study.factors import Consistency, Denoising, Sigma
from study.pickles import restricted
from study.resolve import load
from study.run import main
from study.saved import load as saved
from study.store import Store, read_json
from study.weights import load_tensors

SONG = {"model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16, 4]}


def numbers(*shape: int) -> Tensor:
    """Numbers that are nobody's default."""
    return torch.arange(float(np.prod(shape))).view(shape) / 7 + 1


def tensors() -> dict[str, Tensor]:
    """A few parameters under EDM's names."""
    return {
        "map_layer0.weight": numbers(8, 4),
        "map_layer0.bias": numbers(8),
        "enc.8x8_conv.weight": numbers(4, 1, 3, 3),
        "enc.8x8_block0.conv0.weight": numbers(4, 4, 3, 3),
        "dec.8x8_aux_conv.weight": numbers(1, 4, 3, 3).transpose(2, 3),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal names and tensors, bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in expected
    )


# --- what is read ---


@pytest.mark.parametrize("kind, objective, low", [
    ("EDMPrecond", "denoising", 0), ("ECMPrecond", "consistency", 0.003),
])  # fmt: skip
def test_published_snapshots_are_read(
    kind: str, objective: str, low: float, tmp_path: Path
) -> None:
    path = published.snapshot(
        tmp_path / "edm.pkl", tensors(), kind, arguments=SONG, sigma_min=low
    )
    found = interop.read(path)
    assert same(found.tensors, tensors()) and found.objective == objective
    assert found.shape == (1, 8, 8)
    assert found.sigma == {"min": low, "max": float("inf"), "data": 0.5}
    assert found.network == {
        "kind": "ddpmpp", "width": 4, "mult": (1, 2), "blocks": 1, "attention": [4]
    }  # fmt: skip
    dropped = {"enc.8x8_block0.conv0.resample_filter", "map_augment.weight"}
    assert not dropped & set(found.tensors)


def test_a_state_dict_and_a_snapshot_are_read(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(OrderedDict((f"model.{k}", w) for k, w in tensors().items()), path)
    assert same(interop.read(path).tensors, tensors())
    sets = [{"w": numbers(3) * i} for i in range(3)]
    torch.save({"raw": sets[0], "ema": {"0.05": sets[1], "0.1": sets[2]}}, tmp_path / "1.000.pt")
    for ema, expected in ((None, sets[1]), ("0.1", sets[2]), ("raw", sets[0])):
        assert same(interop.read(tmp_path / "1.000.pt", ema).tensors, expected)
    with pytest.raises(StudyError, match="ema 0.2: no such average; allowed: 0.05, 0.1, raw"):
        interop.read(tmp_path / "1.000.pt", "0.2")


def test_safetensors_go_out_and_come_back(tmp_path: Path) -> None:
    path, sigma = tmp_path / "net.safetensors", Sigma(min=0.01, max=50.0, data=0.7512345678901)
    about = {"kind": "unet", "width": 8}
    levels = msgspec.to_builtins(sigma)
    interop.write(interop.Outside(path, tensors(), about, "consistency", levels, (1, 8, 8),
                                  "bfloat16"))  # fmt: skip
    found = interop.read(path)
    assert same(found.tensors, tensors()) and found.network == about
    assert found.sigma["data"] == sigma.data and found.sigma["max"] == 50
    assert found.objective == "consistency" and found.shape == (1, 8, 8)
    assert found.precision == "bfloat16"
    with safetensors.safe_open(path, "np") as file:  # as another program sees it
        said = json.loads(file.metadata()["consistency-gap"])
        assert said["network"] == about and said["shape"] == [1, 8, 8]
        assert set(file.keys()) == set(tensors())
    safetensors.torch.save_file({"a": numbers(2)}, path, {"network": "mine"})
    assert interop.read(path).network is None


LEVELS = {"min": 0.002, "max": 80.0, "data": 0.5, "rho": 7.0}


@pytest.mark.parametrize("said, told", [
    ({"precision": "half"}, "precision: 'half' given; allowed: bfloat16, float16, float32"),
    ({"precision": "load"}, "precision: 'load' given; allowed: bfloat16, float16, float32"),
    ({"precision": "int8"}, "precision: 'int8' given; allowed: bfloat16, float16, float32"),
    ({"objective": "fixed_point"}, "objective: 'fixed_point' given; allowed: consistency, cont"),
    ({"sigma": {"min": 0.002, "max": 80.0}}, "sigma: {'min': 0.002, 'max': 80.0} given; .*`data`"),
    ({"sigma": LEVELS | {"data": None}}, "sigma.data: None given"),
    ({"sigma": LEVELS | {"data": 0}}, "sigma.data: 0 given; expected `float` > 0"),
    ({"sigma": LEVELS | {"min": 0}}, "sigma.min: 0 given; expected `float` >= 1e-06"),
    ({"colour": "red"}, "colour: no such key"), ({"shape": None}, "shape: None given"),
])  # fmt: skip
def test_what_a_file_says_of_itself_is_not_believed(
    said: dict, told: str, tmp_path: Path
) -> None:
    path, about = tmp_path / "net.safetensors", {"network": {"kind": "mlp"}, "sigma": LEVELS,
                                                "objective": "consistency", "shape": [2],
                                                "precision": "float32"}  # fmt: skip
    for words in (about, about | said):
        metadata = {interop.KEY: json.dumps(words)}
        safetensors.torch.save_file({"a": numbers(2)}, path, metadata)
        if words is about:
            assert interop.read(path).sigma == LEVELS
    with pytest.raises(StudyError, match=f"net.safetensors: metadata: {interop.KEY}.{told}"):
        interop.read(path)


def test_levels_that_hold_nothing_between_them_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    interop.write(interop.Outside(path, tensors(), {"kind": "unet"}, "consistency",
                                  LEVELS | {"min": 90.0}, (1, 8, 8)))  # fmt: skip
    told = "net.safetensors: sigma: min 90, max 80, data 0.5 given; min below max"
    with pytest.raises(StudyError, match=told):
        saved(path, 1.0, None)
    snapshot = published.snapshot(tmp_path / "edm.pkl", tensors(), sigma_min=90.0)
    with pytest.raises(StudyError, match="edm.pkl: sigma: min 90, max 80"):
        saved(snapshot, 1.0, None)
    for data in (0.0, float("nan"), float("inf")):
        published.snapshot(tmp_path / "edm.pkl", tensors(), sigma_data=data)
        with pytest.raises(StudyError, match=r"edm.pkl: .*sigma_data"):
            interop.read(tmp_path / "edm.pkl")


# --- what is refused ---


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def hit(folder: Path) -> str:
    """A command that leaves a mark."""
    return f"touch {folder / 'executed'}"


def storage(of: Tensor) -> tuple[bytes, list[int]]:
    """A tensor's numbers as EDM's pickles hold them, and where each of the five pickles ends."""
    values = torch.storage.TypedStorage(
        wrap_storage=of.untyped_storage(), dtype=of.dtype, _internal=True
    )
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    ends = [[file.tell() for _ in pickletools.genops(file)][-1] for _ in range(5)]
    return file.getvalue(), ends


def attacks(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that mean harm, each with what its refusal names."""
    mark = str(folder / "executed")
    python = f"open({mark!r}, 'w')"
    torch_file = io.BytesIO()
    torch.save(Calls(os.system, hit(folder)), torch_file)
    older = io.BytesIO()
    torch.save(Calls(os.system, hit(folder)), older, _use_new_zipfile_serialization=False)
    load = torch.storage._load_from_bytes
    magic = older.getvalue()[: older.getvalue().index(b".") + 1]
    build = b"ctorch._utils\n_rebuild_tensor_v2\n(N}\x8c\x08__code__Nstb."
    told, parts = storage(numbers(4))
    too_far = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(" + pickle.dumps(
        Calls(load, told)
    )[2:-1] + b"K\x00K\xff\x85K\x01\x85\x89N}tR."
    dumps = pickle.dumps
    return {
        "os.system": (dumps(Calls(os.system, hit(folder))), "posix.system"),
        "eval": (dumps(Calls(eval, python)), "builtins.eval"),
        "exec": (dumps(Calls(exec, python), 2), "__builtin__.exec"),
        "by protocol 0": (f"cos\nsystem\n(S'{hit(folder)}'\ntR.".encode(), "os.system"),
        "inst": (f"(S'{hit(folder)}'\nios\nsystem\n.".encode(), "os.system"),
        "getattr of a module": (dumps(Calls(getattr, Calls(__import__, "os"), "system")),
                                "builtins.__import__"),
        "getattr of text": (dumps(Calls(getattr, "", "join")), "builtins.getattr of a str"),
        "a dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
                          "collections.OrderedDict.__init__"),
        "torch.load": (dumps(Calls(torch.load, mark)), "torch.serialization.load"),
        "torch.save's file": (dumps(Calls(load, torch_file.getvalue())), "did not write"),
        "code in a storage": (dumps(Calls(load, older.getvalue())), "posix.system"),
        "a bare call in a storage": (
            dumps(Calls(load, magic + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02N)R.")),
            "ask for REDUCE"),
        "state of a function": (b"\x80\x04" + build, "no state to set"),
        "state of a class": (b"\x80\x04cnumpy\ndtype\nN}\x86b.", "pickle"),
        "persistent id": (b"\x80\x04K\x07Q.", "outside it"),
        "persistent id, protocol 0": (b"Pname\n.", "outside it"),
        "a tensor beyond its storage": (too_far, "in a storage of 4 numbers"),
        "a storage without numbers": (
            dumps(Calls(load, told[: parts[3]].replace(b"K\x04Nt", b"J\x00\x00\x00\x01Nt")
                        + b"\x80\x02].")), "larger than its bytes"),
        "no pickle": (b"GIF89a", "cannot be read"),
        "cut short": (dumps({"ema": list(range(1000))})[:-20], "cannot be read"),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks(Path("/")))
def test_pickles_with_code_are_refused_by_name_and_nothing_is_executed(
    name: str, tmp_path: Path
) -> None:
    data, named = attacks(tmp_path)[name]
    path = tmp_path / "edm.pkl"
    path.write_bytes(data)
    with pytest.raises(StudyError, match="edm.pkl") as caught:
        interop.read(path)
    assert named in str(caught.value), caught.value
    assert not (tmp_path / "executed").exists()


def test_the_sources_in_a_snapshot_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    source = f"open({str(mark)!r}, 'w').close()"
    path = published.snapshot(tmp_path / "edm.pkl", tensors(), source=source, arguments=SONG)
    assert source.encode() in path.read_bytes()
    assert same(interop.read(path).tensors, tensors()) and not mark.exists()


def test_a_state_dict_with_code_is_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": Calls(os.system, hit(tmp_path))}, tmp_path / "net.pt",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(StudyError, match="posix.system"):
            interop.read(tmp_path / "net.pt")
    assert not (tmp_path / "executed").exists()


class Object:
    """Pickles as a persistent object with this state."""

    def __init__(self, name: str, **state: object) -> None:
        self.meta = {"class_name": name, "state": state}

    def __reduce__(self) -> tuple:
        return published._reconstruct_persistent_obj, (self.meta,)


def module(**parts: object) -> Object:
    """A module with these modules or tensors in it."""
    return Object("SongUNet", _parameters=parts, _buffers={}, _modules={}, _init_kwargs={})


def network(model: Object) -> bytes:
    """A snapshot of the network, its preconditioning in order."""
    outer = {"sigma_min": 0, "sigma_max": 80, "sigma_data": 0.5, "img_channels": 1,
             "img_resolution": 8, "_parameters": {}, "_buffers": {}, "_modules": {"model": model}}
    with published.elsewhere():
        return pickle.dumps({"ema": Object("EDMPrecond", **outer)})


def malformed() -> dict[str, tuple[Object | str, str]]:
    """Networks of which something is missing, each with what is said of it."""
    whole = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_init_kwargs": {}}
    bare = {k: v for k, v in whole.items() if k != "_modules"}
    return {
        "no network": ("text", "a str where a module belongs"),
        "no modules": (Object("SongUNet", **bare), "SongUNet without _modules"),
        "no arguments": (Object("SongUNet"), "SongUNet without _init_kwargs"),
        "modules in a list": (Object("SongUNet", **whole | {"_modules": []}),
                              "SongUNet whose _modules are not by name"),
        "modules by number": (Object("SongUNet", **whole | {"_modules": {1: module()}}),
                              "SongUNet whose _modules are not by name"),
        "an inner one": (module(enc=Object("Block")), "Block without _parameters"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", malformed())
def test_a_malformed_snapshot_is_said_to_be_none(kind: str, tmp_path: Path) -> None:
    net, said = malformed()[kind]
    (tmp_path / "edm.pkl").write_bytes(network(net))
    with pytest.raises(StudyError) as caught:
        interop.read(tmp_path / "edm.pkl")
    assert str(caught.value) == f"{tmp_path}/edm.pkl: not an EDM or ECT snapshot: {said}"


def test_a_snapshot_without_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    for state, missing in (({}, "_modules.model"), ({"_modules": {}}, "_modules.model")):
        with published.elsewhere():
            data = pickle.dumps({"ema": Object("EDMPrecond", **state)})
        (tmp_path / "edm.pkl").write_bytes(data)
        with pytest.raises(StudyError, match=f"EDM or ECT snapshot: EDMPrecond without {missing}"):
            interop.read(tmp_path / "edm.pkl")


def test_a_truncated_snapshot_is_said_to_be_truncated(tmp_path: Path) -> None:
    path = published.snapshot(tmp_path / "edm.pkl", tensors(), arguments=SONG)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), len(whole) // 40), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StudyError, match="cannot be read as a pickle: it is truncated"):
            interop.read(path)


def bombs() -> dict[str, bytes]:
    """Small pickles that ask for much."""
    load, (told, parts) = torch.storage._load_from_bytes, storage(numbers(4))
    huge = told.replace(b"K\x04Nt", b"\x8a\x05" + (1 << 33).to_bytes(5, "little") + b"Nt")
    assert huge != told
    doubled = module()
    for _ in range(60):
        doubled = module(a=doubled, b=doubled)
    long, kept = "n" * 1_000_000, nn.Parameter(numbers(1))
    named = module(**{f"p{i}": module(**{long: kept}) for i in range(4000)})
    deep = b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."
    deep = told[: parts[1]] + deep + told[parts[2] :]
    once = storage(numbers(250_000))[0]
    return {
        "a place of memory": b"\x80\x04Nr\x00\x00\x00\x0f.",
        "a place of memory, protocol 0": b"Np999999999\n.",
        "declared bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 34) + b"x.",
        "declared text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 34) + b"x.",
        "a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 34) + b"N.",
        "nesting": b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns.",
        "a declared storage": pickle.dumps(Calls(load, huge)),
        "nesting in a storage": pickle.dumps(Calls(load, deep)),
        "one storage many times": pickle.dumps([Calls(load, once) for _ in range(500)]),
        "modules doubled at every level": network(doubled),
        "a long name many times": network(named),
    }


@pytest.mark.parametrize("name", bombs())
def test_memory_is_in_proportion(name: str, tmp_path: Path) -> None:
    path = tmp_path / "edm.pkl"
    path.write_bytes(bombs()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StudyError, match="edm.pkl"):
        interop.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_packed_or_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"w": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(StudyError, match="packed"):
        interop.read(tmp_path / "packed.pt")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StudyError, match="cannot be read as weights"):
        interop.read(path)
    torch.save([1, 2], path)
    with pytest.raises(StudyError, match="a state dict expected"):
        interop.read(path)
    for content in (b"", b"{}", (1 << 40).to_bytes(8, "little") + b"{}"):
        (tmp_path / "net.safetensors").write_bytes(content)
        with pytest.raises(StudyError, match="cannot be read as weights"):
            interop.read(tmp_path / "net.safetensors")
    with pytest.raises(StudyError, match="no such file"):
        interop.read(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("arguments, kind, named", [
    ({"embedding_type": "fourier"}, "EDMPrecond", "embedding_type"),
    ({"resample_filter": [1, 3, 3, 1]}, "EDMPrecond", "resample_filter"),
    ({}, "VPPrecond", "VPPrecond under the key ema; EDMPrecond or ECMPrecond expected"),
])  # fmt: skip
def test_other_networks_are_refused(
    arguments: dict[str, object], kind: str, named: str, tmp_path: Path
) -> None:
    path = published.snapshot(tmp_path / "edm.pkl", tensors(), kind, arguments=arguments)
    with pytest.raises(StudyError, match=named):
        interop.read(path)


def files_of(weights: dict[str, Tensor], folder: Path) -> list[Path]:
    """The weights in a file of each kind."""
    paths = [folder / f"net.{kind}" for kind in ("pt", "safetensors", "pkl")]
    torch.save(weights, paths[0])
    safetensors.torch.save_file(weights, paths[1])
    paths[2].write_bytes(network(module(**weights)))
    return paths


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_of_no_real_numbers_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    for path in files_of({"a": numbers(2), "b": numbers(3).to(kind)}, tmp_path):
        with pytest.raises(StudyError, match=rf"{path.name}: b: numbers of type {kind}; allowed"):
            interop.read(path)


@pytest.mark.filterwarnings("ignore")  # they are to leave torch
def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    bad = torch.quantize_per_tensor(numbers(3), 0.1, 0, torch.qint8)
    torch.save({"raw": {"b": numbers(3)}, "ema": {"0.05": {"b": bad}}}, tmp_path / "net.pt")
    with pytest.raises(StudyError, match=r"net.pt: b: numbers of type torch.qint8; allowed"):
        interop.read(tmp_path / "net.pt")
    assert interop.read(tmp_path / "net.pt", "raw").tensors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    """Also beyond float32, in which networks are."""
    net = nn.Sequential(OrderedDict(a=nn.Linear(1, 2, bias=False), b=nn.Linear(1, 2, bias=False)))
    good = {"a.weight": numbers(2, 1), "b.weight": numbers(2, 1).double()}
    for path in files_of(good, tmp_path):
        assert same(interop.fit(interop.read(path), net), good)
    good["b.weight"][1] = bad
    for path in files_of(good, tmp_path):
        told = f"{path.name}: b.weight: holds numbers that are not finite"
        with pytest.raises(StudyError, match=told):
            interop.fit(interop.read(path), net)


def test_restricted_pickles_know_python_2() -> None:
    """Text of Python 2 is bytes; a name that is allowed stands for what it is mapped to."""
    assert restricted(b"S'a'\np0\n.", {}, "x") == b"a"
    assert restricted(b"cfractions\nFraction\n(I1\nI2\ntR.",
                      {("fractions", "Fraction"): lambda a, b: a + b}, "x") == 3  # fmt: skip


# --- into a network ---


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    net = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Linear(3, 1), head=nn.Linear(3, 1)))
    given = {"a.weight": numbers(3, 2), "a.bias": numbers(4), "c.weight": numbers(2)}
    outside = interop.Outside(tmp_path / "net.pt", given, {"kind": "mlp", "width": 5})
    with pytest.raises(StudyError) as caught:
        interop.fit(outside, net)
    assert str(caught.value) == (
        f"{tmp_path}/net.pt: the weights do not fit the run's network; other shapes: a.bias (4,), "
        "here (3,); not in the file: b.weight (1, 3), b.bias (1,); not in the network: c.weight "
        "(2,); its network is {kind: mlp, width: 5} for x of shape None"
    )
    whole = {k: w + 1 for k, w in net.state_dict().items() if not k.startswith("head.")}
    state = interop.fit(interop.Outside(tmp_path / "net.pt", whole), net)
    kept = {k: w for k, w in net.state_dict().items() if k.startswith("head.")}
    assert same(state, whole | kept)  # a head that the file does not know starts as it was


@pytest.mark.parametrize("objective, theirs, known, given, said", [
    (Denoising(), "denoising", {"data": 0.5}, {"data": 0.25}, "0.5, and this run's is 0.25"),
    (Denoising(), "denoising", {"min": 0, "max": 70}, {}, "0 to 70, and this run's are 0.002"),
    (Denoising(), "denoising", {"min": 0.01, "max": 80}, {}, "0.01 to 80"),
    (Consistency(), "consistency", {"min": 0.003}, {}, "0.003 to inf"),
    (Consistency(), "consistency", {"min": 0.001}, {}, "0.001 to inf"),
    (Consistency(), "denoising", {}, {}, "trained by denoising"),
    (Denoising(), "consistency", {}, {}, "trained by consistency"),
])  # fmt: skip
def test_weights_of_another_meaning_are_refused(
    objective: object, theirs: str, known: dict, given: dict, said: str, tmp_path: Path
) -> None:
    outside = interop.Outside(tmp_path / "x.pkl", {}, objective=theirs, sigma=known)
    with pytest.raises(StudyError, match="x.pkl") as caught:
        interop.agree(outside, objective, Sigma(**{"data": 0.5} | given), True)
    assert said in str(caught.value)


def test_weights_of_the_same_meaning_are_taken(tmp_path: Path) -> None:
    for objective, theirs, low, as_is in ((Denoising(), "denoising", 0.0, True),
                                          (Consistency(), "consistency", 0.002, True),
                                          (Consistency(), "denoising", 0.0, False)):  # fmt: skip
        known = {"min": low, "max": float("inf"), "data": 0.5}
        outside = interop.Outside(tmp_path / "x.pkl", {}, objective=theirs, sigma=known)
        interop.agree(outside, objective, Sigma(data=0.5), as_is)


# --- in a study ---

DIGITS = """\
question: Does it work?
base:
  data: digits
  network: {kind: unet, width: 4, levels: 1}
  budget: {images: 256}
  batch: 64
  discretization: {kind: fixed, N: 10}
sources:
  edm: {objective: denoising}
variants:
  cd: {score: {kind: teacher, run: edm}}
measure: {at: [1.0], fid: {extractor: digits-cnn, samples: 64, nfe: [1], draws: 1}}
"""


def run(path: Path, *words: str) -> int:
    """The command in this process."""
    return main([str(path), "--results", str(path.parent / "results"), "--workers", "0", *words])


def stored(path: Path) -> Store:
    """The study's folders."""
    return Store(path.parent / "results", load(path))


def untrained(file: Path) -> str:
    """The study with its teacher from the file."""
    teacher = f"edm: {{objective: denoising, init: {{weights: {file}}}, budget: {{images: 0}}}}"
    return DIGITS.replace("edm: {objective: denoising}", teacher)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished study and its teacher as a file."""
    path = write(tmp_path_factory.mktemp("trained"), DIGITS)
    assert run(path) == 0
    store = stored(path)
    (teacher,) = (r for r in store.study.runs if r.recipe.name == "edm")
    file = path.parent / "edm.safetensors"
    saved(store.folders[teacher.id].path, 1.0, None).export(file)
    return path, file


def raw(path: Path, name: str) -> dict[str, Tensor]:
    """The last weights of a variant or source."""
    store = stored(path)
    (of,) = (r for r in store.study.runs if r.recipe.name == name)
    return load_tensors(store.folders[of.id].file("snapshots/1.000.pt"))["raw"]


def test_a_teacher_from_a_file_is_the_teacher(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Distilled from the file of a teacher or from the teacher itself: the same student."""
    path, file = trained
    other = write(tmp_path, untrained(file))
    assert run(other) == 0
    assert same(raw(other, "cd"), raw(path, "cd"))
    store = stored(other)
    (teacher,) = (r for r in store.study.runs if r.recipe.name == "edm")
    facts = store.folders[teacher.id].trained
    assert list(facts["inputs"]) == ["edm.safetensors"] and facts["spend"]["images"] == 0
    assert same(raw(other, "edm"), interop.read(file).tensors)


def test_a_file_may_move_and_not_change(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one" / "edm.safetensors"
    file.parent.mkdir()
    file.write_bytes(trained[1].read_bytes())
    path = write(tmp_path, untrained(file))
    ids = [r.id for r in load(path).runs]
    assert run(path) == 0
    moved = tmp_path / "two" / "edm.safetensors"
    moved.parent.mkdir()
    file.rename(moved)
    write(tmp_path, untrained(moved))
    assert [r.id for r in load(path).runs] == ids and run(path, "--plan") == 0
    renamed = write(tmp_path, untrained(moved.with_name("other.safetensors")))
    assert not {r.id for r in load(renamed).runs} & set(ids)

    write(tmp_path, untrained(moved))
    weights = interop.read(moved)
    changed = replace(weights, tensors={k: w + 1 for k, w in weights.tensors.items()})
    for measurement in (tmp_path / "results").glob("*/runs/edm-*/measures/*"):
        measurement.unlink()
    moved.unlink()
    assert run(path) == 0  # what it holds is in the run's snapshot
    interop.write(changed)
    for measurement in (tmp_path / "results").glob("*/runs/edm-*/measures/*"):
        measurement.unlink()
    capsys.readouterr()
    assert run(path) == 2
    said = f"{moved}: not the file that edm-s0 began with; bring that one back"
    assert said in " ".join(capsys.readouterr().err.split())
    # nor does a worker that meets it, whoever started that
    store = stored(path)
    (teacher,) = (r for r in store.study.runs if r.recipe.name == "edm")
    assert worker.work(teacher, store.study.unique, store.folders, "cpu") == worker.FAILED
    assert f"trained from another {moved} than is there now" in store.folders[teacher.id].reason()


def test_a_variant_added_later_begins_with_the_same_file(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it would be compared with runs that began elsewhere."""
    file = tmp_path / "edm.safetensors"
    file.write_bytes(trained[1].read_bytes())
    path = write(tmp_path, untrained(file))
    assert run(path) == 0
    weights = interop.read(file)
    interop.write(replace(weights, tensors={k: w + 1 for k, w in weights.tensors.items()}))
    more = ["--set", "variants.late={score: single_sample, init: {run: edm}}"]
    late = ["--set", f"variants.late={{score: single_sample, init: {{weights: {file}}}}}"]
    assert run(path, *more, "--only", "late-*") == 2  # by way of its source
    assert run(path, *late, "--only", "late-*") == 2 and run(path, *late, "--plan") == 2
    assert "not the file that edm-s0 began with" in " ".join(capsys.readouterr().err.split())


def test_files_are_looked_for_before_anything_is_trained(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, untrained(tmp_path / "gone.pkl"))
    for words in (["--plan"], []):
        assert run(path, *words) == 2
        told = f"small: sources.edm: init.weights: {tmp_path}/gone.pkl: no such file"
        assert told in " ".join(capsys.readouterr().err.split())
    (tmp_path / "gone.pkl").write_bytes(pickle.dumps(Calls(os.system, hit(tmp_path))))
    assert run(path, "--plan") == 0 and run(path) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"small: sources.edm: init.weights: {tmp_path}/gone.pkl: " in told
    assert "posix.system" in told
    assert not (tmp_path / "results").exists() and not (tmp_path / "executed").exists()
    assert run(path, "--status") in (0, 3)
    write(tmp_path, untrained(tmp_path / "gone.bin"))
    assert run(path) == 2 and "gone.bin" in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    text = untrained(trained[1])
    more = f"  other: {{init: {{weights: {tmp_path}/edm.safetensors}}}}\nvariants:"
    path = write(tmp_path, text.replace("variants:", more))
    with pytest.raises(StudyError, match="are both called 'edm.safetensors'; rename one"):
        load(path)


def test_weights_that_do_not_fit_are_refused_once_and_before_training(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begins = f"init: {{weights: {trained[1]}}}"
    more = f"  ct: {{{begins}}}\n  low: {{{begins}, sigma: {{max: 100}}}}\n  cold: {{}}\nmeasure:"
    text = untrained(trained[1]).replace("measure:", more) + "seeds: [0, 1]\n"
    path = write(tmp_path, text.replace("width: 4", "width: 8"))
    assert run(path, "--plan") == 0 and run(path) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("time.weight (16, 8), here (32, 16)") == 1
    assert "its network is {kind: unet, width: 4, levels: 1" in told
    assert "error: small: sources.edm, variants.ct: init.weights: " in told
    assert "small: variants.low: init.weights: " in told and "are 0.002 to 100" in told
    assert "cold" not in told and not (tmp_path / "results").exists()
    # nor does a worker begin with them, whoever started that
    store = stored(path)
    (late, _) = (r for r in store.study.runs if r.recipe.name == "ct")
    assert worker.work(late, store.study.unique, store.folders, "cpu") == worker.FAILED
    assert "time.weight (16, 8), here (32, 16)" in store.folders[late.id].reason()
    assert run(path, "--only", "cold-*-s0") == 0  # which begins elsewhere


@pytest.mark.parametrize("data, network", [
    ("digits", "{kind: unet, width: 4, levels: 2, patch: 2}"),
    ("digits", "{kind: ddpmpp, width: 8, mult: [1, 2], blocks: 1, attention: [4]}"),
    ("{kind: fitted_mixture, of: digits, components: 2, rank: 1}", "{kind: unet, width: 4}"),
    ("{kind: mixture, means: [[-1.0, 0.0], [1.0, 0.0]], std: 0.2}", "{kind: mlp, width: 8}"),
])  # fmt: skip
def test_what_fits_is_known_from_shapes_alone(data: str, network: str, tmp_path: Path) -> None:
    measure = "" if "of:" in data or data == "digits" else "sliced_wasserstein: {samples: 64}"
    text = DIGITS[: DIGITS.index("measure:")] + f"measure: {{{measure}}}\nprimary: null\n"
    text = text.replace("data: digits", f"data: {data}")
    text = text.replace("{kind: unet, width: 4, levels: 1}", network)
    factors = load(write(tmp_path, text)).runs[0].recipe.factors
    there = models.network(factors, loaded(factors.data))
    whole = interop.Outside(tmp_path / "net.pt", there.state_dict())
    shape = shape_of(factors.data)
    models.check_fit(whole, factors, shape)
    with pytest.raises(StudyError, match="not fit the run's network"):
        models.check_fit(whole, factors, (*(2 * n for n in shape[:1]), *shape[1:]))


def test_a_published_snapshot_is_a_teacher(tmp_path: Path) -> None:
    """From a pickle in EDM's format, a DDPM++ at its CIFAR-10 file's sigma_data of 0.5."""
    pytest.importorskip("study.ddpmpp")
    from study import networks
    from study.subjects import DdpmPP

    kind = DdpmPP(width=4, mult=(1, 2), blocks=1, attention=(4,))
    net = networks.build(kind, (1, 8, 8), 0.0, 3, "")
    drawn = {k: w + 0.01 for k, w in net.state_dict().items()}
    file = published.snapshot(tmp_path / "edm.pkl", drawn, arguments=SONG)
    text = untrained(file).replace("network: {kind: unet, width: 4, levels: 1}",
                                   "network: {kind: ddpmpp, width: 4, mult: [1, 2], blocks: 1, "
                                   "attention: [4]}")  # fmt: skip
    path = write(tmp_path, text)
    assert run(path) == 1  # sigma_data of digits is measured
    (folder,) = (tmp_path / "results").glob("*/runs/edm-*")
    assert "state sigma: {data: 0.5}" in (folder / "log.txt").read_text()
    write(tmp_path, text.replace("  batch: 64", "  batch: 64\n  sigma: {data: 0.5}"))
    assert run(path) == 0 and same(raw(path, "edm"), drawn)
    model = saved(file, 1.0, None)
    x, t = numbers(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    D = model.function(torch.device("cpu"))(x, t)
    folders = (tmp_path / "results").glob("*/runs/edm-*")
    (folder,) = (p for p in folders if read_json(p / "trained.json"))
    assert torch.equal(D, saved(folder, 1.0, None).function(torch.device("cpu"))(x, t))
