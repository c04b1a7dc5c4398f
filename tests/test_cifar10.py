"""The reader against batches written opcode by opcode as Python 2 wrote them, whole and harmed."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from study import cifar10, data, fetch, folder, run
from study.errors import StudyError
from study.extractors import splits
from study.pickles import restricted
from study.resolve import load as load_study
from study.subjects import Cifar10

COUNT = {name: 20 for name in cifar10.BATCHES}


def text(value: bytes) -> bytes:
    """A str of Python 2: BINSTRING."""
    return b"T" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    """BININT."""
    return b"J" + struct.pack("<i", value)


def array(rows: np.ndarray, kind: bytes = b"u1", shape: tuple[int, int] | None = None) -> bytes:
    """numpy's reconstruction of an array, as protocol 2 of Python 2 has it."""
    n, d = shape or rows.shape
    made = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + b"K\0\x85"
            + text(b"b") + b"\x87R")  # fmt: skip
    dtype = b"cnumpy\ndtype\n" + text(kind) + b"K\0K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\0tb"
    state = b"(K\x01" + number(n) + number(d) + b"\x86" + dtype + b"\x89" + text(rows.tobytes())
    return made + state + b"tb"


def batch(images: bytes, labels: bytes, extra: bytes = b"") -> bytes:
    """A whole pickle."""
    items = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + labels
    return b"\x80\x02}(" + items + text(b"data") + images + extra + b"u."


def numbers(values: list[int]) -> bytes:
    return b"](" + b"".join(map(number, values)) + b"e"


def pixels(name: str) -> np.ndarray:
    rng = np.random.default_rng(cifar10.BATCHES.index(name))
    return rng.integers(0, 256, (COUNT[name], 3072), np.uint8)


def labels(name: str) -> list[int]:
    return [(i * 7 + cifar10.BATCHES.index(name)) % 10 for i in range(COUNT[name])]


def official() -> dict[str, bytes]:
    """Small batches and what is beside them in the archive, by name."""
    files = {n: batch(array(pixels(n)), numbers(labels(n))) for n in cifar10.BATCHES}
    return files | {"batches.meta": b"not read", "readme.html": b"<html>"}


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def packed(files: dict[str, bytes], *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The .tar.gz, its folder first; further members come first of all."""
    members = [*more, member(cifar10.FOLDER, type=tarfile.DIRTYPE)]
    members += [member(f"{cifar10.FOLDER}/{name}", body) for name, body in files.items()]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(file.getvalue(), 1, mtime=0)


def put(root: Path, body: bytes) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / cifar10.ARCHIVE).write_bytes(body)
    return root


def unpack(root: Path, files: dict[str, bytes]) -> Path:
    (root / cifar10.FOLDER).mkdir(parents=True)
    for name, body in files.items():
        (root / cifar10.FOLDER / name).write_bytes(body)
    return root


def check(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Value by value: image i of a batch, channel c, row y, column x is at 1024 c + 32 y + x."""
    for part, names in cifar10.PARTS.items():
        images, found = parts[part]
        assert images.dtype == np.uint8 and images.shape == (20 * len(names), 32, 32, 3)
        assert found.tolist() == [label for name in names for label in labels(name)]
        for b, name in enumerate(names):
            raw = pixels(name)
            for i, c, y, x in ((0, 0, 0, 1), (3, 1, 31, 0), (19, 2, 5, 17)):
                assert images[20 * b + i, y, x, c] == raw[i, 1024 * c + 32 * y + x]
            assert images[20 * b : 20 * b + 20].astype(int).sum() == raw.astype(int).sum()


@pytest.mark.parametrize("place", [unpack, lambda root, files: put(root, packed(files))])
def test_the_archive_is_read_whole_and_unpacked(place: Callable, tmp_path: Path) -> None:
    root = place(tmp_path / "data", official())
    before = sorted(tmp_path.rglob("*"))
    check(cifar10.load(root))
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked to disk


def test_pythons_own_pickles_of_that_layout_mean_the_same() -> None:
    """The hand-written stream is what pickle itself reads as that dict, numpy's array included."""
    content = official()["data_batch_2"].replace(b"numpy.core.", b"numpy._core.")
    plain = pickle.loads(content, encoding="bytes")
    images, found = cifar10.read_batch(official()["data_batch_2"], "x")
    assert plain[b"labels"] == found.tolist()
    rows = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
    assert np.array_equal(plain[b"data"], rows)
    assert np.array_equal(rows, pixels("data_batch_2"))


# --- what is refused ---


class Trap:
    """Unpickled, it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_code_in_it_is_refused_by_name(protocol: int, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    files = official() | {"data_batch_3": pickle.dumps({"data": trap}, protocol)}
    roots = unpack(tmp_path / "a", files), put(tmp_path / "b", packed(files))
    for root in roots:
        with pytest.raises(StudyError, match=r"data_batch_3: the pickle asks for \w+\.\w+") as e:
            cifar10.load(root)
        assert str(root) in str(e.value) and "numpy.dtype" in str(e.value)
    assert not trap.path.exists()
    pickle.loads(files["data_batch_3"])
    assert trap.path.exists()  # it was armed


@pytest.mark.parametrize("body, asked", [
    (b"cposix\nsystem\n(S'touch sprung'\ntR.", "posix.system"),  # GLOBAL
    (b"(S'touch sprung'\niposix\nsystem\n.", "posix.system"),  # INST
    (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031+1\x85R.", "builtins.eval"),
    (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
    (b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),  # as written
    (b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile_\x93.", "numpy.ndarray.tofile_"),  # dotted
])  # fmt: skip
def test_every_way_of_naming_code_is_closed(
    body: bytes, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=f"x: the pickle asks for {asked}; allowed: numpy.core"):
        cifar10.read_batch(body, "x")
    assert not list(tmp_path.iterdir())


def doubled(levels: int) -> bytes:
    """The pickle of ((1, 1), (1, 1)) and so on: levels of a tuple that holds one other twice."""
    return b"\x80\x02K\x01" + b"2\x86" * levels


GOOD, ONE = array(pixels("test_batch")), pixels("test_batch")
SET = b"(" + text(b"__code__") + text(b"x") + b"d"  # {"__code__": "x"}


@pytest.mark.parametrize("body, message", [
    (batch(array(ONE, b"O8"), numbers([1] * 20)), "elements of type b'O8'; allowed: b'u1'"),
    (batch(array(ONE, b"f4"), numbers([1] * 20)), "elements of type b'f4'"),
    (batch(array(ONE.reshape(60, 1024)), numbers([1] * 60)), r"found shape \(60, 1024\)"),
    (batch(array(ONE, shape=(10**8, 3072)), numbers([1])), r"\(100000000, 3072\) over 61440 b"),
    (batch(array(ONE[:0]), numbers([])), r"found shape \(0, 3072\)"),
    (batch(GOOD, numbers([1] * 19)), "found 19 labels for 20 images"),
    (batch(GOOD, numbers([1] * 19 + [10])), "no whole number from 0 to 9"),
    (batch(GOOD, b"](" + text(b"1") * 20 + b"e"), "no whole number from 0 to 9"),
    (batch(text(b"pixels"), numbers([1])), "found a dict of b'batch_label', b'data', b'labels'"),
    (b"\x80\x02}.", "found a dict of ; allowed: a dict of data, an array, and labels, a list"),
    (b"\x80\x02].", "found list; allowed: a dict of data"),
    (b"\x80\x02cnumpy\nndarray\n)R.", "calls numpy.ndarray itself"),
    (b"\x80\x02cnumpy\nndarray\n" + SET + b"b.", "a function has no state"),  # BUILD on a name
    (b"\x80\x02cnumpy\ndtype\n" + text(b"u1") + b"\x85R" + b"Nb" + b"}.", "found a dict of ;"),
    (b"\x80\x02U\x03idxQ.", "refers to something outside it, b'idx'"),
    (b"\x80\x06].", "cannot be read as a pickle: .*unsupported pickle protocol: 6"),
    (b"", "cannot be read as a pickle"),
    (b"\xff\xd8\xff\xe0JFIF", "cannot be read as a pickle"),
    (official()["test_batch"][:-9], "cannot be read as a pickle"),
    (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "cannot be read as a pickle"),
    (doubled(20) + b"Q.", "more than 50000 times"),  # as a reference outside: told in words
    (b"\x80\x02}" + doubled(40)[2:] + b"Ns.", "more than 50000 times"),  # as a key: hashed
    (b"\x80\x02K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"Q.",
     "more than 50000 times"),  # and out of the memory
    (b"\x80\x02(" + doubled(9)[2:] + b"lQ.", r"outside it, \[\(\("),  # said in short
    (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "more than 50000 times"),
])  # fmt: skip
def test_a_batch_of_anything_else_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(StudyError, match=f"^where: .*{message}"):
        cifar10.read_batch(body, "where")


def test_reading_one_batch_leaves_no_trace_in_the_next() -> None:
    """A forged one can set nothing that outlives it."""
    for target in (b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct"):
        with pytest.raises(StudyError):
            cifar10.read_batch(b"\x80\x02c" + target + b"\n" + SET + b"b.", "forged")
    images, _ = cifar10.read_batch(official()["test_batch"], "good")
    assert images.shape == (20, 32, 32, 3)


def test_the_general_reader() -> None:
    """Whatever the caller allows, and a bound on the size."""
    data = pickle.dumps({"a": [1, (2.5, b"x", "y", None, True)]}, 5)
    assert restricted(data, {}, "x") == pickle.loads(data)
    with pytest.raises(StudyError, match=f"x: found a pickle of {len(data)} bytes; allowed: 9"):
        restricted(data, {}, "x", largest=9)
    stream = b"\x80\x02ca.b\nc\nK\x02K\x03\x86R."
    assert restricted(stream, {("a.b", "c"): lambda x, y: x * y}, "x") == 6
    with pytest.raises(StudyError, match="x: the pickle asks for a.b.c; allowed: none"):
        restricted(stream, {}, "x")


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
def test_missing_batches_are_named(name: str, tmp_path: Path) -> None:
    files = official()
    del files[name]
    for root in (unpack(tmp_path / "a", files), put(tmp_path / "b", packed(files))):
        with pytest.raises(StudyError, match=f"{name} is missing"):
            cifar10.load(root)


@pytest.mark.parametrize("more, message", [
    (member("cifar-10-batches-py/data_batch_6", b"x"), "data_batch_6: no such member"),
    (member("data_batch_1", b"x"), "data_batch_1: no such member; allowed, in cifar-10-batches"),
    (member("../data_batch_1", b"x"), r"\.\./data_batch_1: no such member"),
    (member("cifar-10-batches-py/../../x", b"x"), r"\.\./x: no such member"),
    (member("/etc/data_batch_1", b"x"), "no such member"),
    (member("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
     "data_batch_1: a link or special file"),
    (member("cifar-10-batches-py/test_batch", type=tarfile.LNKTYPE, linkname="x"), "a link"),
    (member("cifar-10-batches-py/batches.meta", type=tarfile.FIFOTYPE), "a link or special"),
    (member("cifar-10-batches-py/test_batch", official()["test_batch"]), "batch: comes twice"),
    (member("cifar-10-batches-py/readme.html", b"x" * 300), "readme.html: found 300 bytes"),
])  # fmt: skip
def test_an_archive_of_anything_else_is_refused(
    more: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "300" in message:
        monkeypatch.setattr(cifar10, "LARGEST", 299)
    root = put(tmp_path / "data", packed(official(), more))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StudyError, match=f"{cifar10.ARCHIVE}: .*{message}"):
        cifar10.load(root)
    assert sorted(tmp_path.rglob("*")) == before


WHOLE = packed(official())


@pytest.mark.parametrize("body", [
    WHOLE[: len(WHOLE) // 2],
    WHOLE[:-8],  # its checksum
    WHOLE[:-6] + bytes([WHOLE[-6] ^ 1]) + WHOLE[-5:],
    WHOLE[:5000] + bytes([WHOLE[5000] ^ 255]) + WHOLE[5001:],
    gzip.compress(gzip.decompress(WHOLE)[:100_000]),  # a tar cut inside a whole gzip
    gzip.decompress(WHOLE),
    gzip.compress(b""),
    b"",
], ids=["half", "no sum", "wrong sum", "flipped", "cut tar", "no gzip", "empty", "nothing"])
def test_a_corrupt_archive_is_named(body: bytes, tmp_path: Path) -> None:
    root = put(tmp_path, body)
    with pytest.raises(StudyError, match=f"{cifar10.ARCHIVE}"):
        cifar10.load(root)
    assert [path.name for path in root.iterdir()] == [cifar10.ARCHIVE]


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that is megabytes long, which tar would read whole, behind a small file."""
    monkeypatch.setattr(cifar10, "UNPACKED", 1 << 20)
    long = member(f"{cifar10.FOLDER}/" + "x" * 20_000_000, b"")
    root = put(tmp_path, packed(official(), long))
    with pytest.raises(StudyError, match="or more; allowed: 1048576"):
        cifar10.load(root)


# --- download ---


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A server of what is under "body", whose md5 and size pass for the published ones."""
    given = {"body": WHOLE}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(given.get("length", len(given["body"]))))
            self.end_headers()
            self.wfile.write(given["body"])

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/{cifar10.ARCHIVE}"
        monkeypatch.setattr(cifar10, "URL", url)
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(WHOLE).hexdigest())
        monkeypatch.setattr(cifar10, "SIZE", len(WHOLE))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield given
        server.shutdown()
        thread.join()


def test_downloads_once_whole_or_not_at_all(
    serve: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "cifar10"  # the default
    for body, length in ((WHOLE[:-1] + b"x", len(WHOLE)), (WHOLE[:999], len(WHOLE))):
        serve |= {"body": body, "length": length}
        with pytest.raises(StudyError, match=f"{cifar10.ARCHIVE}.*put {cifar10.ARCHIVE} into"):
            cifar10.load()
        assert list(root.iterdir()) == []
    serve |= {"body": WHOLE, "length": len(WHOLE)}
    check(cifar10.load())
    assert [path.name for path in root.iterdir()] == [cifar10.ARCHIVE]
    serve["body"] = b"another"
    check(cifar10.load())
    assert fetch.md5(root / cifar10.ARCHIVE) == cifar10.MD5


# --- the split, and the data set of a study ---


def test_the_split_halves_the_test_images_by_class_and_place(tmp_path: Path) -> None:
    root = put(tmp_path / "data", WHOLE)
    whole, parts = cifar10.load(root), splits.of_cifar10(root)
    assert np.array_equal(parts["train"][0], whole["train"][0])
    images, of = whole["test"]
    for c in range(10):
        own, held = (parts[p][0][parts[p][1] == c] for p in ("extractor", "held_out"))
        assert len(own) == len(held) == 1
        both = {own[0].tobytes(), held[0].tobytes()}
        assert both == {image.tobytes() for image in images[of == c]}
    # a folder of the same images, class by class, is cut alike
    from PIL import Image

    for part, (x, y) in whole.items():
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            path = tmp_path / "folder" / part / f"c{label}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    again = splits.of_cifar10_or_folder(tmp_path / "folder")
    for name in ("extractor", "held_out"):
        a, b = ({row.tobytes() for row in p[name][0]} for p in (parts, again))
        assert a == b and len(again[name][1]) == len(parts[name][1])


def test_a_study_trains_on_all_training_images(tmp_path: Path) -> None:
    loaded = data.load(Cifar10(root=str(put(tmp_path, WHOLE))))
    assert loaded.shape == (3, 32, 32) and loaded.train.shape == (100, 3, 32, 32)
    assert len(loaded.held_out) == 10
    first = torch.from_numpy(pixels("data_batch_1")[0].copy())
    assert torch.equal(loaded.train[0], first.view(3, 32, 32))


def test_before_training_the_data_have_the_digest_that_training_writes(tmp_path: Path) -> None:
    """Another one would refuse to go on with a study."""
    root = put(tmp_path, WHOLE)
    study = load_study(write(tmp_path, "cifar10", root, "cifar10-cnn"), ("measure.fid=null",))
    (found,) = run.fetch_data(study).values()
    assert found.digest == data.load(Cifar10(root=str(root))).digest
    assert found.shape == (3, 32, 32)


STUDY = """\
base:
  data: {kind: %s, root: %s}
  network: {kind: unet, width: 4}
  budget: {images: 128}
  batch: 64
variants:
  ct: {score: single_sample}
measure:
  at: [1.0]
  fid: {extractor: %s, samples: 8, draws: 1}
"""


def write(tmp_path: Path, kind: str, root: Path, extractor: str) -> Path:
    path = tmp_path / "colours.yaml"
    path.write_text(STUDY % (kind, root, extractor))
    return path


def test_an_extractor_is_tied_to_the_shape_of_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "own" / ("train" if i < 10 else "test") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    assert len(folder.load(tmp_path / "own", None)["train"][0]) == 10
    study = load_study(write(tmp_path, "images", tmp_path / "own", "cifar10-cnn"))
    run.fetch_data(study)
    study = load_study(write(tmp_path, "images", tmp_path / "own", "fashion_mnist-cnn"))
    with pytest.raises(StudyError, match="measure.fid: fashion_mnist-cnn .* takes 1 x 28 x 28 "
                       "images, and those are 3 x 32 x 32"):  # fmt: skip
        run.fetch_data(study)
    with pytest.raises(StudyError, match="digits-cnn is not an extractor for cifar10"):
        load_study(write(tmp_path, "cifar10", tmp_path, "digits-cnn"))
    load_study(write(tmp_path, "cifar10", tmp_path, "cifar10-cnn"))


def test_a_study_on_a_broken_archive_ends_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "data", WHOLE[:999])
    path = write(tmp_path, "cifar10", root, "cifar10-cnn")
    words = [str(path), "--results", str(tmp_path / "results"), "--workers", "0"]
    assert run.main(words) == 2
    assert cifar10.ARCHIVE in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
