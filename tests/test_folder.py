"""Folders and archives of images made pixel by pixel, and what is wrong with them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import of_images

from study import folder
from study.errors import StudyError

SIZE = 4
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "consistency-gap"


def pixels(seed: int, channels: int = 3, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    image.save(file, kind)
    return file.getvalue()


def png(seed: int, channels: int = 3, size: int = SIZE) -> bytes:
    return encoded(pixels(seed, channels, size))


def raw_png(width: int, height: int, bits: int, colour: int, body: bytes) -> bytes:
    """A PNG made from the format's description."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def put(root: Path, files: Files) -> Path:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def packed(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return path


PARTS = {
    "train/dog/1.png": png(1),
    "train/cat/2.png": png(2),
    "train/dog/0.png": png(3),
    "test/dog/0.png": png(4),
    "train/notes.txt": b"not an image",
    "train/dog/.hidden.png": b"not an image",
    ".git/x.png": b"not an image",
    "extra.png": b"beside the parts",
}
FLAT = {f"{i}.png": png(i) for i in range(10)}


def check(part: tuple[np.ndarray, list[str]], seeds: list[int], paths: list[str]) -> None:
    """Images and paths are exactly these, in this order."""
    images, found = part
    assert images.dtype == np.uint8 and found == paths
    assert images.shape == (len(seeds), SIZE, SIZE, 3)
    assert (images == np.stack([pixels(seed) for seed in seeds])).all()


def aside(part: tuple[np.ndarray, list[str]]) -> list[int]:
    """Which of the FLAT images a part has."""
    known = {pixels(i).tobytes(): i for i in range(10)}
    return [known[image.tobytes()] for image in part[0]]


@pytest.mark.parametrize("archive", [False, True])
def test_parts_and_order(tmp_path: Path, archive: bool) -> None:
    root = packed(tmp_path / "a.zip", PARTS) if archive else put(tmp_path / "a", PARTS)
    for _ in range(2):  # decoded, then from the cache
        parts = folder.load(root, None)
        assert list(parts) == ["train", "held_out"]
        check(parts["train"], [2, 3, 1], ["train/cat/2.png", "train/dog/0.png", "train/dog/1.png"])
        check(parts["held_out"], [4], ["test/dog/0.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([root.name, "cache"])


def test_the_held_out_folders_by_precedence(tmp_path: Path) -> None:
    root = put(tmp_path / "a", {"train/0.png": png(0)})
    for seed, name in enumerate(("val", "test", "held_out"), 1):
        put(root, {f"{name}/0.png": png(seed)})
        parts = folder.load(root, None)
        check(parts["train"], [0], ["train/0.png"])
        check(parts["held_out"], [seed], [f"{name}/0.png"])


def test_setting_aside_depends_on_the_count_alone(tmp_path: Path) -> None:
    first = folder.load(put(tmp_path / "a", FLAT), 3)
    train, held_out = aside(first["train"]), aside(first["held_out"])
    assert len(held_out) == 3 and sorted(train + held_out) == list(range(10))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert held_out == [0, 1, 3]  # the same on every machine, with every numpy
    others = {f"c/{9 - int(name[0])}.PNG": body for name, body in FLAT.items()}
    again = folder.load(packed(tmp_path / "b.zip", others), 3)
    assert aside(again["held_out"]) == [9 - i for i in held_out]
    assert set(held_out) < set(aside(folder.load(tmp_path / "a", 4)["held_out"]))


@pytest.mark.parametrize(
    ("files", "held_out", "message"),
    [
        (FLAT, None, r"held_out: missing; .* the 10 images .*train and test \(found: none\)"),
        (FLAT, 0, "held_out: 0 given; allowed: 1 to 9"),
        (FLAT, 10, "held_out: 10 given; allowed: 1 to 9"),
        (PARTS, 1, "held_out: 1 given; leave it out: .*/a has train and test"),
        ({"Train/0.png": png(0), "Test/0.png": png(1)}, None, r"found: Test, Train\)"),
    ],
)
def test_held_out_is_asked_for_where_it_is_needed(
    tmp_path: Path, files: Files, held_out: int | None, message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        folder.load(put(tmp_path / "a", files), held_out)


@pytest.mark.parametrize("table", [b'{"labels": null}', b"{"])
def test_an_edm_archive_is_read_without_its_labels(tmp_path: Path, table: bytes) -> None:
    files = {f"0000{i % 2}/img0000000{i}.png": png(i) for i in range(4)}
    parts = folder.load(packed(tmp_path / "a.zip", files | {"dataset.json": table}), 1)
    assert sorted(parts["train"][1] + parts["held_out"][1]) == sorted(files)
    for part, paths in parts.values():
        assert (part == np.stack([pixels(int(path[-5])) for path in paths])).all()


# --- sizes and modes ---


GREY = Image.fromarray(pixels(0, 1)[..., 0])
COLOUR = Image.fromarray(pixels(0))
PALETTE = COLOUR.quantize(7)
CLEAR = PALETTE.copy()
CLEAR.info["transparency"] = bytes([0, 128, 255])


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (GREY, "PNG", np.asarray(GREY)[..., None]),
        (GREY, "BMP", np.asarray(GREY)[..., None]),
        (Image.merge("LA", (GREY, GREY)), "PNG", np.asarray(GREY)[..., None]),
        (GREY.point(lambda v: 255 * (v > 99), "1"), "PNG",
         255 * (np.asarray(GREY)[..., None] > 99)),
        (Image.merge("RGBA", (*COLOUR.split(), GREY)), "PNG", np.asarray(COLOUR)),
        (Image.merge("RGBA", (*COLOUR.split(), GREY)), "WEBP", None),
        (PALETTE, "PNG", np.asarray(PALETTE.convert("RGB"))),
        (CLEAR, "PNG", np.asarray(PALETTE.convert("RGB"))),
        (COLOUR, "JPEG", np.asarray(Image.open(io.BytesIO(encoded(COLOUR, "JPEG"))))),
    ],
)  # fmt: skip
def test_modes(tmp_path: Path, image: Image.Image, kind: str, expected: np.ndarray | None) -> None:
    suffix = {"JPEG": "jpg"}.get(kind, kind.lower())
    root = put(tmp_path / "a", {f"{i}.{suffix}": encoded(image, kind) for i in range(2)})
    with warnings.catch_warnings(action="error"):
        images, _ = folder.load(root, 1)["train"]
    assert images.dtype == np.uint8
    assert images.shape == (1, SIZE, SIZE, 3 if expected is None else expected.shape[2])
    assert expected is None or (images[0] == expected).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (png(0, size=5), "found 5 x 5 RGB; 0.png and any other image before it is 4 x 4 RGB"),
        (png(0, 1), "found 4 x 4 grey; 0.png and any other image before it is 4 x 4 RGB"),
        (encoded(pixels(0)[:3]), "found 4 x 3 pixels; allowed: square"),
        (raw_png(2, 2, 16, 2, bytes(26)), "found mode RGB of 16 bits; allowed: grey or RGB"),
        (raw_png(2, 2, 16, 6, bytes(34)), "found mode RGBA of 16 bits"),
        (raw_png(2, 2, 16, 0, bytes(10)), "found mode I;16"),
        (encoded(COLOUR.convert("CMYK"), "JPEG"), "found mode CMYK"),
        (raw_png(9000, 9000, 8, 2, b""), "found 9000 x 9000 pixels; allowed: .*at most 1024"),
        (raw_png(90_000, 90_000, 8, 2, b""), "cannot be decoded: .*decompression bomb"),
        (png(0)[:-30], "cannot be decoded"),
        (encoded(COLOUR, "GIF"), "none of BMP, JPEG, PNG, WEBP"),
        (b"", "none of BMP, JPEG, PNG, WEBP"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_odd_images_are_named(tmp_path: Path, body: bytes, message: str, archive: bool) -> None:
    files = {"0.png": png(0), "1.png": png(1), "2.png": body}
    root = packed(tmp_path / "a.zip", files) if archive else put(tmp_path / "a", files)
    with pytest.raises(StudyError, match=message) as caught:
        folder.load(root, 1)
    assert str(caught.value).startswith(f"{root / '2.png'}: ")


def test_another_format_is_not_left_out_in_silence(tmp_path: Path) -> None:
    root = put(tmp_path / "a", FLAT | {"x.tif": encoded(COLOUR, "TIFF")})
    with pytest.raises(StudyError, match="x.tif: none of BMP"):
        folder.load(root, 1)


@pytest.mark.parametrize("archive", [False, True])
def test_absurd_sizes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool
) -> None:
    monkeypatch.setattr(folder, "LARGEST", 1000)
    files = FLAT | {"0.png": png(0) + bytes(2000)}
    root = packed(tmp_path / "a.zip", files) if archive else put(tmp_path / "a", files)
    with pytest.raises(StudyError, match="0.png: cannot be .*bytes; allowed: 1000"):
        folder.load(root, 1)


# --- roots ---


def broken_zip(path: Path) -> Path:
    """An archive one byte of whose first image is wrong."""
    body = bytearray(packed(path, FLAT).read_bytes())
    body[body.index(b"IDAT") + 6] ^= 1
    path.write_bytes(body)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "none: there is no such folder; allowed: a folder or a zip"),
        (lambda p: put(p, {"a.zip": b"text"}) / "a.zip",
         "a.zip: cannot be read as a zip archive: .*not a zip file.*; allowed: a folder or a zip"),
        (lambda p: put(p, {"a/x.txt": b""}) / "a", "/a: no image in it; allowed: .bmp"),
        (lambda p: packed(p / "a.zip", {}), "a.zip: no image in it"),
        (lambda p: put(p, {"a/train/x.txt": b"", "a/test/0.png": png(0)}) / "a",
         "a/train: no image in it"),
        (lambda p: packed(p / "a.zip", {"train/0.png": png(0), "test/": b""}),
         "a.zip/test: no image in it"),
    ],
)  # fmt: skip
def test_roots_without_images(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        folder.load(make(tmp_path), None)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="a.zip/0.png: cannot be decoded: Bad CRC-32"):
        folder.load(broken_zip(tmp_path / "a.zip"), 1)
    whole = packed(tmp_path / "b.zip", FLAT).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match="b.zip: cannot be read as a zip archive"):
        folder.load(tmp_path / "b.zip", 1)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root, cats = tmp_path / "a", put(tmp_path / "cats", {"0.png": png(1)})
    put(root, {"train/dog/0.png": png(0), "test/dog/0.png": png(2)})
    (root / "train" / "cat").symlink_to(cats)
    check(folder.load(root, None)["train"], [1, 0],
          ["train/cat/0.png", "train/dog/0.png"])  # fmt: skip
    (root / "train" / "cow").symlink_to(root / "test" / "dog")  # trained on what is held out
    with pytest.raises(StudyError, match="comes twice, through a link"):
        folder.load(root, None)
    (root / "train" / "cow").unlink()
    (root / "train" / "dog" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(StudyError, match="train/dog/1.png"):
        folder.load(root, None)


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scandir = put(tmp_path / "a", PARTS), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StudyError, match="cannot be read: .*Permission denied: .*train/cat"):
        folder.load(root, None)


# --- the cache ---


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each decoding from now on decodes."""
    counts, decode = [], folder._decode
    monkeypatch.setattr(folder, "_decode", lambda s, n: counts.append(len(n)) or decode(s, n))
    return counts


def test_decoded_once_until_a_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, counts = put(tmp_path / "a", FLAT), decoded(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: folder.load(root, 2), range(3)))
    assert counts == [10] and len(list(cache.glob("*.npz"))) == 1
    folder.load(root, 5)  # another split of the same images
    put(root, {"new.txt": b"no image"})
    folder.load(root, 5)
    assert counts == [10]
    before, path = folder.load(root, 5), root / "3.png"
    changed = bytearray(encoded(pixels(3), "BMP"))
    path.write_bytes(changed)
    folder.load(root, 5)
    times = path.stat()
    changed[-1] ^= 255
    path.write_bytes(changed)  # of the same size,
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # and it says of the same age
    after = folder.load(root, 5)
    assert counts == [10, 10, 10]
    assert sum(int((after[p][0] != before[p][0]).sum()) for p in before) == 1
    (root / "3.png").rename(root / "x.png")
    folder.load(root, 5)
    assert counts == [10] * 4


def test_two_of_one_listing_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ({f"{i}.bmp": encoded(pixels(i + k), "BMP") for i in range(2)} for k in (0, 5))
    found = [folder.load(packed(tmp_path / "a.zip", f), 1)["train"][0] for f in (first, second)]
    assert (found[0] != found[1]).any()
    walk = folder._walk  # of file systems that keep no times
    monkeypatch.setattr(folder, "_walk", lambda root: ((n, (9, 0, 0)) for n, _ in walk(root)))
    roots = put(tmp_path / "a", first), put(tmp_path / "b", second)
    assert all(
        (folder.load(r, 1)["train"][0] == f).all() for r, f in zip(roots, found, strict=True)
    )


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def stored(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, images=array)
    return file.getvalue()


def test_nothing_is_unpickled(tmp_path: Path, cache: Path) -> None:
    root = put(tmp_path / "a", FLAT)
    folder.load(root, 2)
    (path,) = cache.glob("*.npz")
    trap = Trap(tmp_path / "sprung")
    for body in (pickle.dumps(trap), stored(np.array([trap] * 10, dtype=object))):
        path.write_bytes(body)
        folder.load(root, 2)
    assert not trap.path.exists()


@pytest.mark.parametrize(
    "harm",
    [
        lambda whole: whole[:-9],
        lambda whole: whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        lambda whole: b"",
        lambda whole: stored(np.zeros((10, SIZE, SIZE, 3))),
        lambda whole: stored(np.zeros((9, SIZE, SIZE, 3), np.uint8)),
    ],
    ids=["cut", "flipped", "empty", "float", "too few"],
)
def test_a_torn_cache_is_made_again(
    tmp_path: Path, cache: Path, harm: Callable[[bytes], bytes]
) -> None:
    root = put(tmp_path / "a", FLAT)
    before = folder.load(root, 2)
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    after = folder.load(root, 2)
    assert all((before[p][0] == after[p][0]).all() for p in before)
    assert path.read_bytes() == whole


def test_without_a_cache_folder_it_warns_and_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, counts = put(tmp_path / "a", FLAT), decoded(monkeypatch)
    kept = folder.load(root, 2)
    put(tmp_path, {"file": b""})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="can't be kept"):
        assert (folder.load(root, 2)["train"][0] == kept["train"][0]).all()
    assert counts == [10, 10]


def test_a_full_disk_costs_no_second_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_bytes", full)
    counts = decoded(monkeypatch)
    with pytest.warns(UserWarning, match="No space left"):
        folder.load(put(tmp_path / "a", FLAT), 2)
    assert counts == [10]


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, counts = put(tmp_path / "a", FLAT), decoded(monkeypatch)
    folder.load(root, 2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "FileLock", refuse)
    with warnings.catch_warnings(action="error"):
        folder.load(root, 2)
    assert counts == [10]


def test_without_a_terminal_it_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.load(put(tmp_path / "a", FLAT), 2)
    assert capfd.readouterr() == ("", "")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for given in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert folder.cache_folder() == Path("/home/someone/.cache/consistency-gap")


def test_more_samples_than_images_and_unreadable_weights_are_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from study.run import main

    for i in range(12):
        file = tmp_path / "images" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(pixels(i)))
    (tmp_path / "text.pth").write_text("no weights")
    study = tmp_path / "mine.yaml"
    study.write_text(of_images(tmp_path / "images", [0]))
    ask = "measure.fid={{extractor: inception-v3-compat, samples: {}, reference: [train], "
    ask += "weights: {}}}"
    for samples, said in (
        (9, "cell mine: measure.fid: 9 samples; it compares equal numbers, and"),
        (8, f"cell mine: measure.fid: {tmp_path / 'text.pth'}: cannot be read as weights"),
    ):
        words = ["--results", str(tmp_path / "results"), "--device", "cpu"]
        given = ask.format(samples, tmp_path / "text.pth")
        assert main([str(study), *words, "--set", given]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("results/*/runs/*"))
