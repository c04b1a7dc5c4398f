"""Whatever is done to a file, it is a value or one StudyError: never another exception, nothing
written beside it, in bounded time and memory.

The suite tries a few dozen of each kind, always the same ones. STUDY_FUZZ=20000 tries as many of
each, others every time, and says how many were taken.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_study
import numpy as np
import published
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated import damaged, trees
from PIL import Image
from studies import TWO_MODES, trained, write
from test_cifar10 import array, batch, numbers

from analysis import answer, factorial, ledger, load, report, tables
from study import cifar10, fashion_mnist, folder, forecast, interop, reference, run
from study.errors import StudyError
from study.layers import read_yaml
from study.resolve import load as resolved
from study.store import Folder, Store, append_line, write_bytes, write_json

FEW = 20
TRIES = int(os.environ.get("STUDY_FUZZ", FEW))
GROWTH = 200_000  # KiB that one file may take
TENSORS = {"enc.8x8_conv.weight": torch.ones(4, 1, 3, 3), "enc.8x8_conv.bias": torch.ones(4),
           "dec.out.weight": torch.ones(2, 2)}  # fmt: skip
ABOUT = {"network": {"kind": "mlp"}, "objective": "consistency", "shape": [2],
         "precision": "float32", "sigma": {"min": 0.002, "max": 80.0, "data": 0.5}}  # fmt: skip
BATCH = batch(array(np.zeros((2, cifar10.ROW), np.uint8)), numbers([1, 2]))
SWEEPS = sorted(Path(__file__).parents[1].glob("sweeps/*.yaml"))
FEW_VARIANTS = {k: fake_study.VARIANTS[k] for k in ("ct", "cd", "self_pretrain")}
counts: dict[str, Counter] = {}


@pytest.fixture(autouse=True)
def told() -> Iterator[None]:
    """Says after each test what was tried, where more than a few were."""
    yield
    while counts:
        kind, count = counts.popitem()
        if TRIES != FEW:
            print(f"{kind}: {count['tried']} tried, {count['taken']} of them read", flush=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that holds `work`, where files are, and something beside it."""
    path = tmp_path_factory.mktemp("fuzz")
    (path / "beside").write_text("as it was")
    (path / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "work" / "cache"))
        patch.chdir(path / "work")
        yield path


def tried(kind: str, base: Path, what: Callable[[], object]) -> None:
    """It gives a value or one StudyError, and leaves alone what lies beside."""
    count = counts.setdefault(kind, Counter())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count["tried"] += 1
    try:
        what()
        count["taken"] += 1
    except StudyError as error:
        assert str(error)
    assert sorted(os.listdir(base)) == ["beside", "work"]
    assert (base / "beside").read_text() == "as it was"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GROWTH or count["tried"] == 1, f"{grown} KiB"  # the first one loads modules


def often(
    strategy: st.SearchStrategy, test: Callable[[Any], None], tries: int = TRIES, most: int = 5
) -> None:
    """The test of many of what the strategy draws, each in `most` seconds."""
    limits = settings(max_examples=max(1, tries), deadline=1000 * most, derandomize=TRIES == FEW,
                      database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
    limits(given(strategy)(test))()


# --- files of weights and of data ---


def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive, every checksum in order."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def saved(value: object, **options: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """What a zip archive holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npz() -> bytes:
    """Decoded images, as the cache keeps them."""
    file = io.BytesIO()
    np.savez(file, images=np.zeros((3, 4, 4, 1), np.uint8))
    return file.getvalue()


def png(value: int, kind: str = "PNG") -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, kind)
    return file.getvalue()


def images_of_kinds() -> dict[str, bytes]:
    """Members of an archive of images."""
    return {"train/a/0.png": png(0), "train/b/1.jpg": png(9, "JPEG"),
            "test/a/0.bmp": png(3, "BMP"), "test/b/0.png": png(5)}  # fmt: skip


def tarred(data: bytes) -> bytes:
    """The six batches as a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in cifar10.BATCHES:
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def cifar(path: Path, data: bytes) -> object:
    """The archive where it is looked for, read."""
    (path.parent / cifar10.ARCHIVE).write_bytes(data)
    return cifar10.load(path.parent)


def read_as(suffix: str) -> Callable[[Path, bytes], object]:
    """The reader of weights, of a file so named."""

    def read(path: Path, data: bytes) -> object:
        path.with_suffix(suffix).write_bytes(data)
        return interop.read(path.with_suffix(suffix))

    return read


def one_of(archive: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> st.SearchStrategy:
    """The archive with one member damaged, its checksum in order."""
    names = st.sampled_from(sorted(archive))
    return names.flatmap(
        lambda name: damaged(archive[name]).map(lambda d: zipped({**archive, name: d}, kind))
    )


def kinds() -> dict[str, tuple[st.SearchStrategy, Callable[[Path, bytes], object]]]:
    """What is damaged and how it is read, by what it is."""
    with tempfile.TemporaryDirectory() as place:
        pickled = published.snapshot(Path(place, "edm.pkl"), TENSORS).read_bytes()
    state, snapshot = saved(TENSORS), saved({"raw": TENSORS, "ema": {"0.05": TENSORS}})
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28)) + bytes(1568)
    plain, deflated = images_of_kinds(), zipfile.ZIP_DEFLATED

    def gz(path: Path, data: bytes) -> object:
        return fashion_mnist.read_idx(written(path.with_suffix(".gz"), data), (28, 28))

    def written(path: Path, data: bytes) -> Path:
        path.write_bytes(data)
        return path

    def read_images(path: Path, data: bytes) -> object:
        return folder.load(written(path.with_suffix(".zip"), data), None)

    return {
        "EDM's pickle": (damaged(pickled), read_as(".pkl")),
        "state dict": (damaged(state), read_as(".pt")),
        "state dict, one member": (one_of(members(state)), read_as(".pt")),
        "snapshot, one member": (one_of(members(snapshot)), read_as(".pt")),
        "state dict, older format": (
            damaged(saved(TENSORS, _use_new_zipfile_serialization=False)), read_as(".pth")),
        "safetensors": (damaged(safetensors.torch.save(TENSORS)), read_as(".safetensors")),
        "safetensors, what it says of itself": (
            trees(ABOUT).map(lambda about: safetensors.torch.save(
                TENSORS, {interop.KEY: json.dumps(about)})), read_as(".safetensors")),
        "CIFAR-10's batch": (damaged(BATCH), lambda _, data: cifar10.read_batch(data, "batch")),
        "CIFAR-10's archive": (damaged(gzip.compress(tarred(BATCH))), cifar),
        "CIFAR-10's archive, inside": (damaged(tarred(BATCH)).map(gzip.compress), cifar),
        "IDX": (damaged(idx), lambda p, d: fashion_mnist.read_idx(written(p, d), (28, 28))),
        "IDX, gzipped": (damaged(gzip.compress(idx)), gz),
        "IDX, gzipped, inside": (damaged(idx).map(gzip.compress), gz),
        "images": (damaged(zipped(plain, deflated)), read_images),
        "images, one of them": (one_of(plain, deflated), read_images),
        "cached images": (damaged(npz()), lambda p, d: folder._cached(written(p, d), 3)),
        "cached images, inside": (
            one_of(members(npz())), lambda p, d: folder._cached(written(p, d), 3)),
        "cached statistics, inside": (
            one_of(members(npz())), lambda p, d: reference.unpacked(written(p, d))),
    }  # fmt: skip


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file(kind: str, base: Path) -> None:
    strategy, read = KINDS[kind]
    path = base / "work" / "file"
    often(strategy, lambda data: tried(kind, base, lambda: read(path, data)))


# --- study files ---


@pytest.mark.parametrize("kind", ["study file, letters", "study file, --set"])
def test_a_damaged_study_file(kind: str, base: Path) -> None:
    """What is done to the tree of a study file stands in test_mutations."""
    path = base / "work" / "damaged.yaml"

    def check(data: bytes) -> None:
        sets = ()
        if kind == "study file, --set":
            sets = (data.decode(errors="replace"),)
            data = TWO_MODES.encode()
        path.write_bytes(data)
        tried(kind, base, lambda: resolved(path, sets).as_json())

    texts = st.sampled_from(SWEEPS).flatmap(lambda sweep: damaged(sweep.read_bytes()))
    often(texts if kind == "study file, letters" else damaged(b"base.data.means=[[1.5], [2]]"),
          check)  # fmt: skip


# --- results ---


def finished(base: Path) -> Path:
    """A study whose every run is done, as far as its folders say."""
    path = write(base / "work")
    store = Store(base / "work" / "results", resolved(path))
    store.path.mkdir(parents=True)
    store.write_study(path)
    for one in store.study.unique.values():
        place: Folder = store.folders[one.id]
        place.create(one, {"schema": 2, "id": one.id, "role": "student", "factors": {}})
        append_line(place.file("attempts.jsonl"), {"event": "start", "time": "x", "host": "y"})
        append_line(place.file("attempts.jsonl"), {"event": "end", "time": "x", "reason": "done"})
        append_line(place.file("steps.jsonl"), {"step": 1, "images": 64, "loss": 0.5})
        for asked in one.measures:
            record = {"id": one.id, "settings": dict(asked.record), "value": 1.0}
            write_json(place.file(f"measures/{asked.file}"), record)
        write_bytes(place.file("samples.png"), png(7))
        points = [{"at": m.at, "images": 64, "file": "x"} for m in one.measures]
        write_json(place.file("trained.json"), trained(one.id, snapshots=points))
    ct = next(r for r in store.study.runs if r.recipe.name == "ct")
    timed = {"step": forecast.step_key(ct), "seconds_per_image": 1e-3,
             "first_update_seconds": 1.0, "measuring_seconds": None}  # fmt: skip
    bench = {"device": "cpu", "torch": "2", "code": "x", "recipes": {"small/ct": timed}}
    write_json(store.path / forecast.BENCH["cpu"], bench)
    return path


def edited(draw: st.DrawFn, path: Path) -> bytes:
    """A JSON file or a log with something done to its values, or to its letters."""
    data = path.read_bytes()
    if path.suffix not in (".json", ".jsonl") or draw(st.integers(0, 3)) == 0:
        return draw(damaged(data))
    if path.suffix == ".json":
        return json.dumps(draw(trees(json.loads(data)))).encode()
    rows = draw(trees([json.loads(line) for line in data.splitlines()]))
    return b"".join(json.dumps(r).encode() + b"\n" for r in (rows if isinstance(rows, list)
                                                           else [rows]))  # fmt: skip


@st.composite
def edits(draw: st.DrawFn, root: Path) -> dict[Path, bytes | None]:
    """One to three files of a tree with other content; None: a folder stands there instead."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and "report" not in p.parts)
    chosen = draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True))
    return {p: None if draw(st.integers(0, 20)) == 0 else edited(draw, p) for p in chosen}


@contextlib.contextmanager
def applied(changes: dict[Path, bytes | None]) -> Iterator[None]:
    """The tree with these edits; afterwards it is whole again."""
    whole = {path: path.read_bytes() for path in changes}
    try:
        for path, data in changes.items():
            if data is None:
                path.unlink()
                path.mkdir()
            else:
                path.write_bytes(data)
        yield
    finally:
        for path, data in whole.items():
            if path.is_dir():
                shutil.rmtree(path)
            path.write_bytes(data)


def test_an_edited_results_tree_has_a_state_and_a_plan(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = finished(base)
    results = base / "work" / "results"
    store = Store(results, resolved(study))
    assert set(store.states(thorough=True).values()) == {"done"}

    def check(changes: dict[Path, bytes | None]) -> None:
        def states() -> None:
            again = Store(results, store.study)
            again.states(thorough=True)
            for one in store.study.unique.values():
                again.blocked(one)
                again.folders[one.id].progress()

        with applied(changes):
            tried("run folders", base, states)
            words = [str(study), "--results", str(results), "--device", "cpu"]
            for word in ("--plan", "--status"):
                assert run.main([*words, word]) in (0, 1, 2, 3)
            assert "\x1b" not in capsys.readouterr().out

    often(edits(store.path), check)


def test_an_edited_results_tree_has_a_report(base: Path) -> None:
    tree = fake_study.write(base / "work" / "told", variants=FEW_VARIANTS)

    def read(whole: bool) -> None:
        if whole:
            report.build(tree)
            return
        study = load.load(tree)
        table, mismatches = tables.comparisons(study), ledger.audit(study)
        factorial.effects(study)
        answer.answers(study, table)
        report._beside(study, table, factorial.effects(study), mismatches)
        for part in (report._completeness, report._provenance):
            part(study)
        report._audit(study, mismatches)
        for cell in study.cells:
            report._variants(cell)
            report._trace(cell)
            report._values(cell, mismatches)
            report._comparisons(cell, table, mismatches)

    def check(changes: dict[Path, bytes | None], whole: bool = False) -> None:
        with applied(changes):
            tried("results, report" if whole else "results, tables", base, lambda: read(whole))

    often(edits(tree), lambda changes: check(changes))
    often(edits(tree), lambda changes: check(changes, True), TRIES // 10, 30)


def test_every_file_is_read_before_it_is_damaged(base: Path) -> None:
    """Otherwise nothing would be tried but the first refusal."""
    assert len(interop.read(published.snapshot(base / "work" / "e.pkl", TENSORS)).tensors) == 3
    assert len(cifar(base / "work" / "file", gzip.compress(tarred(BATCH)))["test"][1]) == 2
    (base / "work" / "i.zip").write_bytes(zipped(images_of_kinds()))
    assert len(folder.load(base / "work" / "i.zip", None)["train"][0]) == 2
    assert all(read_yaml(s.read_text(), s.name) for s in SWEEPS)
