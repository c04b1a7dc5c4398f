"""The reader against IDX files made byte by byte, the download against a local server."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from study import fashion_mnist
from study.errors import StudyError

Serve = Callable[..., None]
COUNTS = {"train_images": 7, "train_labels": 7, "test_images": 3, "test_labels": 3}


def payload(key: str) -> bytes:
    """A whole IDX file with COUNTS[key] elements, from the format's description."""
    n = COUNTS[key]
    rng = np.random.default_rng(len(key))
    if key.endswith("labels"):
        return struct.pack(">BBBBI", 0, 0, 8, 1, n) + rng.integers(0, 10, n, np.uint8).tobytes()
    body = rng.integers(0, 256, n * 784, np.uint8).tobytes()
    return struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28) + body


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Small stand-ins for the published files by key; Debian's folder is moved out of sight."""
    files = {key: gzip.compress(payload(key), mtime=0) for key in COUNTS}
    published = {
        key: fashion_mnist.FILES[key]._replace(
            md5=hashlib.md5(body).hexdigest(), size=len(body)
        )
        for key, body in files.items()
    }
    monkeypatch.setattr(fashion_mnist, "FILES", published)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    return files


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, packed: dict[str, bytes]) -> Iterator[Serve]:
    """A server of the published files; serve(key, body, length) changes what one key gives."""
    bodies = {fashion_mnist.FILES[key].name: (body, len(body)) for key, body in packed.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path[1:] not in bodies:
                self.send_error(404)
                return
            body, length = bodies[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    def change(key: str, body: bytes | None, length: int | None = None) -> None:
        name = fashion_mnist.FILES[key].name
        bodies.pop(name)
        if body is not None:
            bodies[name] = (body, len(body) if length is None else length)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(fashion_mnist, "BASE_URL", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield change
        server.shutdown()
        thread.join()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, packed: dict[str, bytes]) -> None:
    """A port that nothing listens on: any download fails at once."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    monkeypatch.setattr(fashion_mnist, "BASE_URL", f"http://127.0.0.1:{port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def put(folder: Path, files: dict[str, bytes], plain: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, body in files.items():
        name = fashion_mnist.FILES[key].name
        (folder / (name.removesuffix(".gz") if plain else name)).write_bytes(body)


def check(arrays: dict[str, np.ndarray]) -> None:
    """The arrays hold exactly the bytes that the made files hold."""
    assert set(arrays) == set(COUNTS)
    for key, array in arrays.items():
        header = 8 if key.endswith("labels") else 16
        assert array.dtype == np.uint8 and array.tobytes() == payload(key)[header:]
        assert array.shape == ((COUNTS[key],) if header == 8 else (COUNTS[key], 28, 28))


def test_downloads_once_into_root(serve: Serve, tmp_path: Path) -> None:
    root = tmp_path / "data" / "mine"
    check(fashion_mnist.load(root))
    assert {path.name for path in root.iterdir()} == {
        published.name for published in fashion_mnist.FILES.values()
    }
    for key in COUNTS:
        serve(key, None)
    check(fashion_mnist.load(root))


def test_default_root_is_in_the_working_directory(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(fashion_mnist.load())
    assert len(list((tmp_path / "data" / "fashion_mnist").iterdir())) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: (b"not the file", 12), "found 12 bytes with md5 .* allowed: {size} bytes"),
        (lambda good: (None, 0), "the download failed: HTTP Error 404"),
        (lambda good: (good[:-9], len(good)), "train-labels-idx1"),  # closed 9 bytes too early
        (lambda good: (good + b"x" * 99_999, len(good) + 99_999), "found {more} bytes"),
    ],
    ids=["md5", "404", "cut", "long"],
)
def test_failed_download_leaves_nothing_and_says_what_to_do(
    serve: Serve, packed: dict[str, bytes], tmp_path: Path,
    damage: Callable[[bytes], tuple[bytes | None, int]], message: str,
) -> None:
    good, root = packed["train_labels"], tmp_path / "data"
    serve("train_labels", *damage(good))
    with pytest.raises(StudyError, match=message.format(size=len(good), more=len(good) + 1)) as e:
        fashion_mnist.load(root)
    first = fashion_mnist.FILES["train_images"].name
    assert f"put the files {first}" in str(e.value) and f"into {root}" in str(e.value)
    assert [path.name for path in root.iterdir()] == [first]  # this one came whole
    if damage(good)[0] is not None:
        serve("train_labels", good)
        check(fashion_mnist.load(root))


def test_no_network_makes_no_folder(offline: None, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="the download failed.*put the files"):
        fashion_mnist.load(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_debians_folder_comes_before_the_network(
    offline: None, packed: dict[str, bytes], tmp_path: Path
) -> None:
    put(fashion_mnist.DEBIAN, packed)
    check(fashion_mnist.load(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("plain", [False, True])
def test_the_users_own_files_come_first(
    offline: None, packed: dict[str, bytes], tmp_path: Path, plain: bool
) -> None:
    put(fashion_mnist.DEBIAN, packed)
    own = {key: bytearray(payload(key)) for key in COUNTS}
    own["train_labels"][-1] ^= 1
    put(tmp_path / "own", own if plain else {k: gzip.compress(v) for k, v in own.items()}, plain)
    arrays = fashion_mnist.load(tmp_path / "own")
    assert arrays["train_labels"][-1] == payload("train_labels")[-1] ^ 1


def test_own_files_are_never_completed_with_published_ones(
    serve: Serve, packed: dict[str, bytes], tmp_path: Path
) -> None:
    put(fashion_mnist.DEBIAN, packed)
    put(tmp_path / "own", {"train_images": payload("train_images")}, plain=True)
    with pytest.raises(StudyError, match="train-labels-idx1-ubyte.gz, t10k.* is missing"):
        fashion_mnist.load(tmp_path / "own")


def test_published_files_are_completed(
    serve: Serve, packed: dict[str, bytes], tmp_path: Path
) -> None:
    put(tmp_path / "data", {"test_images": packed["test_images"]})
    serve("test_images", None)
    check(fashion_mnist.load(tmp_path / "data"))


def test_labels_and_images_must_be_as_many(packed: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, packed | {"test_labels": packed["train_labels"]})
    with pytest.raises(StudyError, match="t10k-labels.*found 7 labels for 3 images"):
        fashion_mnist.load(tmp_path)


GOOD = payload("test_images")
BOMB = struct.pack(">BBBBIII", 0, 0, 8, 3, 1, 28, 28) + bytes(50_000_000)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "found magic ; allowed: 00 00 08 03"),
        (b"\x89PNG" + GOOD[4:], "found magic 89 50 4e 47"),
        (b"\0\0\x0d\x03" + GOOD[4:], "found magic 00 00 0d 03"),  # float32 elements
        (payload("test_labels"), "found magic 00 00 08 01"),
        (GOOD[:9], "header is cut after 9 bytes"),
        (GOOD[:4] + struct.pack(">III", 3, 32, 32) + GOOD[16:], "found shape 3 x 32 x 32.*n x 28"),
        (GOOD[:4] + struct.pack(">III", 0, 28, 28), "found shape 0 x 28 x 28"),
        (GOOD[:-1], "found 2351 bytes of data; the header says 2352"),
        (GOOD + b"\0", "found more than the 2352 bytes"),
        (GOOD[:4] + struct.pack(">III", 2**32 - 1, 28, 28) + GOOD[16:],
         "found 2352 bytes of data; the header says 3367254359280"),
        (BOMB, "found more than the 784 bytes"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_torn_and_wrong_files_are_named(
    tmp_path: Path, body: bytes, message: str, plain: bool
) -> None:
    path = tmp_path / ("t10k-images-idx3-ubyte" + ("" if plain else ".gz"))
    path.write_bytes(body if plain else gzip.compress(body, 1))
    with pytest.raises(StudyError, match=message) as caught:
        fashion_mnist.read_idx(path, (28, 28))
    assert str(path) in str(caught.value)


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]


@pytest.mark.parametrize(
    "body",
    [
        gzip.compress(GOOD)[:-200],  # cut
        gzip.compress(GOOD)[:-8],  # cut before its checksum
        flipped(gzip.compress(GOOD), -6),  # checksum
        flipped(gzip.compress(GOOD), 12),  # deflate header
        GOOD,  # not gzipped at all
    ],
    ids=["cut", "no checksum", "wrong checksum", "bad deflate", "plain"],
)
def test_corrupt_gzip_is_named(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(body)
    with pytest.raises(StudyError, match="t10k-images-idx3-ubyte.gz: cannot be read"):
        fashion_mnist.read_idx(path, (28, 28))


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """50 MB of zeros behind a header for one image: only a little more than one image is read."""
    import tracemalloc

    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(BOMB, 1))
    tracemalloc.start()
    with pytest.raises(StudyError, match="found more"):
        fashion_mnist.read_idx(path, (28, 28))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_the_published_files_are_what_the_table_says() -> None:
    for key, published in fashion_mnist.FILES.items():
        body = (fashion_mnist.DEBIAN / published.name).read_bytes()
        assert (hashlib.md5(body).hexdigest(), len(body)) == (published.md5, published.size)
        array = fashion_mnist.read_idx(fashion_mnist.DEBIAN / published.name, published.item)
        assert len(array) == (60_000 if key.startswith("train") else 10_000)
        if key.endswith("labels"):
            assert np.bincount(array).tolist() == [len(array) // 10] * 10
