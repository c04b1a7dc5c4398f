"""Weights, caches and archives of images that promise little and come to much, or never end."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import everything, held_to, peak
from PIL import Image

from study import cifar10, fitted, folder, interop, reference
from study.errors import StudyError
from study.sample import main as sample
from study.weights import load_tensors, save_tensors


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    """A zip archive that is packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def repacked(path: Path) -> Path:
    """The same archive, packed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return zipped(path, members)


def png(side: int = 4, value: int = 0, kind: str = "L") -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new(kind, (side, side), value).save(file, "PNG")
    return file.getvalue()


# --- weights and caches ---


def test_packed_weights_are_not_unpacked(tmp_path: Path) -> None:
    """Also a run's own state and snapshots, which nobody else should have written."""
    path = tmp_path / "state.pt"
    save_tensors(path, {"w": torch.zeros(50_000_000)})
    repacked(path)
    assert path.stat().st_size < 1_000_000
    code = "from pathlib import Path\nfrom study.weights import load_tensors\n" \
           "load_tensors(Path(sys.argv[1]))"  # fmt: skip
    done = held_to(100, code, path)
    assert "state.pt: cannot be read as weights: packed" in done.stderr, done.stderr
    assert "StudyError" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00X\x01\x00\x00",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.J\xff",
    b"", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(100), b"\x80\x02cos\nsystem\n.",
])  # fmt: skip
def test_torn_weights_of_any_format_are_one_error(content: bytes, tmp_path: Path) -> None:
    """What torch raises of them were AssertionError, TypeError and struct.error."""
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="state.pt: cannot be read as weights"):
        load_tensors(path)


@pytest.mark.parametrize("tensor", [
    torch.zeros(3, 3).to_sparse(), torch.zeros(3, 3, device="meta"),
    torch.zeros(3, 3).to_sparse_csr(),
])  # fmt: skip
def test_tensors_without_their_numbers_are_no_weights(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    torch.save({"w": tensor}, tmp_path / "net.pt")
    with pytest.raises(StudyError, match="net.pt: "):
        interop.read(tmp_path / "net.pt")


@pytest.mark.parametrize("read", [
    lambda path: folder._cached(path, 3), reference.unpacked, fitted.read,
])  # fmt: skip
def test_a_packed_or_forged_cache_is_none(read: Callable, tmp_path: Path) -> None:
    path = tmp_path / "cache.npz"
    np.savez_compressed(path, images=np.zeros((3, 10_000, 10_000), np.uint8),
                        mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))  # fmt: skip
    before = peak()
    assert path.stat().st_size < 1_000_000 and read(path) is None
    assert peak() - before < 50_000  # KiB
    for content in (b"no array", b"\x93NUMPY\x01\x00v\x00", b"\x80\x04N."):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("images.npy", "mu.npy", "sigma.npy"):
                archive.writestr(name, content)
        assert read(path) is None


def tiny(path: Path, network: dict, shape: tuple[int, ...]) -> interop.Outside:
    """Two numbers that are said to be of a network."""
    levels = {"min": 0.002, "max": 80.0, "data": 0.5}
    return interop.Outside(path, {"w": torch.zeros(2)}, network, "consistency", levels, shape)


@pytest.mark.parametrize("network", [
    {"kind": "mlp", "width": 65_536, "depth": 64}, {"kind": "unet", "width": 4096, "levels": 6},
    {"kind": "ddpmpp", "width": 4096, "mult": [16, 16, 16], "blocks": 8, "attention": []},
])  # fmt: skip
def test_a_network_that_its_file_does_not_hold_is_not_made(network: dict, tmp_path: Path) -> None:
    """It would take from 200 GB to 4 TB."""
    path, before = tmp_path / "net.safetensors", peak()
    shape = (2,) if network["kind"] == "mlp" else (1, 64, 64)
    interop.write(tiny(path, network, shape))
    assert sample([str(path), "--out", str(tmp_path / "x.npy")]) == 2
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors"]
    assert peak() - before < 300_000  # KiB


def test_the_same_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.safetensors"
    for shape, told in (((2,), "the weights do not fit"), ((3, 64, 32), "square grey or RGB"),
                        ((7, 8, 8), "square grey or RGB"), ((1, 4096, 4096), "up to 1024"),
                        ((2, 2), "(d,) or (C, S, S)"), ((-1,), "(d,) or")):  # fmt: skip
        interop.write(tiny(path, {"kind": "mlp"}, shape))
        assert sample([str(path), "--out", str(tmp_path / "x.npy")]) == 2
        assert told in capsys.readouterr().err


# --- images ---


def parts(**members: bytes) -> dict[str, bytes]:
    """Two images in train and test, and more."""
    return {"train/0.png": png(), "test/0.png": png(), **members}


def test_names_that_lead_elsewhere_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    names = ["train/../../../up.png", "/etc/abs.png", "train/a/../../b.png", "train//c.png",
             "train/\\..\\d.png", "train/C:e.png", "../../f.png"]  # fmt: skip
    path = zipped(tmp_path / "in" / "a.zip", parts(**{n: png(value=9) for n in names}))
    before = everything(tmp_path / "in")
    try:
        assert len(folder.load(path, None)["train"][0]) >= 1
    except StudyError as error:
        assert "a.zip" in str(error)
    assert everything(tmp_path / "in") == before
    assert sorted(os.listdir(tmp_path)) in (["cache", "in"], ["in"])
    assert not Path("/etc/abs.png").exists()


def test_many_images_that_come_to_more_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 000 images of 3 MB, each 3 kB on disk: 6 GB in 6 MB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = png(1024, kind="RGB")
    members = {f"{part}/{i}.png": one for part in ("train", "test") for i in range(1000)}
    path, before = zipped(tmp_path / "a.zip", members), peak()
    with pytest.raises(StudyError, match="a.zip: 2000 files of .* 6291456000 bytes; allowed: 100"):
        folder.load(path, None)
    assert peak() - before < 200_000 and sorted(os.listdir(tmp_path)) in (  # KiB
        ["a.zip", "cache"], ["a.zip"])  # fmt: skip


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_an_image_that_never_ends(make: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("train/0.png", "test/0.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png())
    make(tmp_path / "train" / "1.png")
    with pytest.raises(StudyError, match="train/1.png: no plain file"):
        folder.load(tmp_path, None)


@pytest.mark.parametrize("body", [b"PK\x05\x06" + bytes(18), b"PK\x05\x06" + b"\xff" * 18])
def test_an_archive_that_no_reader_can_open(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(tmp_path / "b.zip", parts()).read_bytes()[:-22] + body)
    with pytest.raises(StudyError, match="a.zip"):
        folder.load(tmp_path / "a.zip", None)


def test_a_version_of_zip_that_is_not_known(tmp_path: Path) -> None:
    """NotImplementedError, where BadZipFile would be thought of."""
    data = bytearray(zipped(tmp_path / "a.zip", parts()).read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 255
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(StudyError, match="a.zip: cannot be read"):
        folder.load(tmp_path / "a.zip", None)


# --- CIFAR-10's archive ---


@pytest.mark.parametrize("headers", [
    {"comment": "x" * 300_000_000}, {"path": "../../evil"}, {"linkpath": "/etc/passwd"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "data_batch_1",
     "GNU.sparse.realsize": str(1 << 40)},
    {"size": "-1"}, {"size": str(1 << 60)},
], ids=["a long comment", "a path", "a link", "holes", "a negative size", "a size"])  # fmt: skip
def test_what_a_tar_header_may_say_beside(headers: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "in" / cifar10.ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, compresslevel=1) as archive:
        member = tarfile.TarInfo(f"{cifar10.FOLDER}/data_batch_1")
        member.pax_headers = headers
        member.size = 10
        archive.addfile(member, io.BytesIO(b"0123456789"))
    before = everything(tmp_path), peak()
    with pytest.raises(StudyError, match=cifar10.ARCHIVE):
        cifar10.load(path.parent)
    assert everything(tmp_path) == before[0]
    assert peak() - before[1] < 1_500_000  # KiB; tarfile takes a header of 256 MB whole
