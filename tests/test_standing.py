"""What a user is told of runs beside their report: outcomes, and the data they stand on."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import TWO_MODES, of_images, trained, write

from study import data, fashion_mnist, standing, worker
from study.errors import StudyError
from study.resolve import load
from study.run import fetch_data, main
from study.store import Folder, Store, append_line, write_json
from study.subjects import Images

ROOT = Path(__file__).parents[1]
Told = pytest.CaptureFixture[str]


def command(folder: Path, *words: str) -> int:
    """The command on the study in this folder."""
    where = "--results", str(folder / "results"), "--device", "cpu", "--workers", "0"
    return main([str(folder / "small.yaml"), *where, *words])


def folders(folder: Path) -> dict[str, Folder]:
    """Run folders by NAME-sSEED, made."""
    store = Store(folder / "results", load(folder / "small.yaml"))
    made = {f"{r.recipe.name}-s{r.seed}": store.folders[r.id] for r in store.study.runs}
    for place in made.values():
        place.path.mkdir(parents=True, exist_ok=True)
    return made


def ended(place: Folder, **changes: object) -> None:
    """Training has ended, and whatever is asked of it is not there."""
    told = trained(place.path.name.rpartition("-")[2], **changes)
    write_json(place.file("trained.json"), told)


def failed(place: Folder) -> None:
    """The last attempt failed."""
    append_line(place.file("attempts.jsonl"), {"event": "end", "reason": "no luck"})


def rows(told: str) -> dict[str, list[str]]:
    """The cells of the state table by the run's name."""
    lines = (re.split(r"\s*│\s*", line.strip().strip("│").strip())
             for line in told.splitlines() if line.startswith("│"))  # fmt: skip
    return {name.removesuffix(" (source)"): cells for _, name, *cells in lines}


def test_the_table_says_diverged_and_blocked(tmp_path: Path, capsys: Told) -> None:
    write(tmp_path)
    made = folders(tmp_path)
    ended(made["edm-s0"], outcome="diverged", reason="at 64 images")
    ended(made["ct-s0"], outcome="diverged", reason="at 64 images")
    failed(made["edm-s1"])
    assert command(tmp_path, "--status") == 1
    told = capsys.readouterr().out
    assert rows(told) == {"edm": ["diverged", "failed"], "ct": ["diverged", "pending"],
                          "cd": ["blocked", "blocked"]}  # fmt: skip
    counts = "2 diverged, 2 blocked, 1 failed, 1 pending"
    assert sorted(counts.split(", ")) in [sorted(x.split(", ")) for x in told.splitlines()]
    # a variant that diverged is an outcome, and waits for nothing
    assert command(tmp_path, "--status", "--only", "ct-*-s0") == 0
    assert "\n1 diverged\n" in capsys.readouterr().out
    many = f"seeds={list(range(20))}"
    assert command(tmp_path, "--status", "--set", many) == 1
    assert "1 diverged, 19 pending" in " ".join(rows(capsys.readouterr().out)["ct"])


def test_what_has_begun_is_blocked_too_once_it_cannot_go_on(tmp_path: Path, capsys: Told) -> None:
    write(tmp_path)
    made = folders(tmp_path)
    ended(made["edm-s0"], outcome="diverged", reason="at 64 images")
    append_line(made["cd-s0"].file("attempts.jsonl"), {"event": "start"})
    assert command(tmp_path, "--status", "--only", "cd-*-s0") == 1
    told = capsys.readouterr().out
    assert rows(told)["cd"] == ["blocked", "pending"] and "work is left" not in told


def test_a_plan_leaves_out_what_cannot_be_made(tmp_path: Path, capsys: Told) -> None:
    write(tmp_path)
    made = folders(tmp_path)
    ended(made["edm-s0"], outcome="diverged", reason="at 64 images")
    for name in ("edm-s1", "cd-s0"):
        failed(made[name])
    assert command(tmp_path, "--retry", "--plan") == 0
    told = capsys.readouterr().out
    assert rows(told)["cd"] == ["failed", "pending"]  # its source is tried again
    told = " ".join(told.split())
    assert "4 runs to train (5,120 images), 1 kept" in told and "left out: 1 run" in told
    assert "cd-small-s0 left out: its source edm diverged" in told
    assert command(tmp_path, "--plan") == 0
    told = capsys.readouterr().out
    assert rows(told)["cd"] == ["failed", "blocked"]
    told = " ".join(told.split())
    assert "2 runs to train (2,560 images), 1 kept" in told
    assert "edm-s1 left out: failed; --retry tries it again" in told
    assert "cd-small-s1 left out: its source edm failed" in told


def test_zero_minutes_are_for_slurm(tmp_path: Path, capsys: Told) -> None:
    write(tmp_path)
    assert command(tmp_path, "--minutes", "0") == 2
    assert "--minutes 0: a number above 0 expected" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_seeds_on_other_data_are_told_of(tmp_path: Path, capsys: Told) -> None:
    study = write(tmp_path, TWO_MODES + "cells: {a: {batch: 32}, b: {}}\n")
    store = Store(tmp_path / "results", load(study))
    for run in store.study.runs:
        digest = "beef0123" if (run.recipe.cell, run.seed) == ("b", 1) else "cafe0123"
        store.folders[run.id].file("measures").mkdir(parents=True)
        told = trained(run.id, data_digest=digest * 2)
        write_json(store.folders[run.id].file("trained.json"), told)
    said = ("b: seed 0 learned from data cafe0123, seed 1 learned from data beef0123: "
            "seeds on different data are not pooled\n")  # fmt: skip
    for word in ("--status", "--plan"):
        command(tmp_path, word)
        told = capsys.readouterr().out
        assert f"\n{said}" in told and told.count("learned from") == 2
    kind = store.study.recipes[0].factors.data
    same, other = (standing.unlike(store, {kind: d * 2}) for d in ("cafe0123", "00000000"))
    assert len(same) == 1 and "; the data are now cafe0123: " in same[0]
    assert len(other) == 2 and other[0] == (
        "a: seeds 0, 1 learned from data cafe0123; the data are now 00000000: seeds on different "
        "data are not pooled")  # fmt: skip
    assert not standing.unlike(Store(tmp_path / "none", load(study)), {kind: "0" * 16})


def test_an_image_that_changed_between_two_seeds_is_told_before_training(
    tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shades = random.Random(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        values = np.array([shades.randrange(256) for _ in range(192)], np.uint8).reshape(8, 8, 3)
        Image.fromarray(values).save(tmp_path / "images" / f"{i:02}.png")
    write(tmp_path, of_images(tmp_path / "images", [0, 1]))
    kind = Images(root=str(tmp_path / "images"), held_out=4)
    before = data.load(kind).digest
    assert command(tmp_path, "--only", "ct-*-s0") == 0
    assert command(tmp_path, "--only", "ct-*-s0") == 0
    assert "learned from" not in capsys.readouterr().out  # they are the same still
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "03.png")
    after = data.load(kind).digest
    worker.load.cache_clear()  # each command is a process of its own
    assert command(tmp_path) == 0
    told = capsys.readouterr().out
    first, _, rest = told.partition(" to work on")
    assert (f"small: seed 0 learned from data {before[:8]}; the data are now {after[:8]}: seeds "
            "on different data are not pooled\n") in first  # fmt: skip
    assert f"seed 1 learned from data {after[:8]}" in rest


def shade(path: Path, seed: int) -> None:
    """A small image of colours that the seed gives."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(values).save(path)


def pair_of_images(root: Path) -> str:
    """A study of CT and CD on a folder of small images."""
    pair = "{ct: {}, cd: {score: {kind: teacher, run: edm}}}"
    text = of_images(root, [0, 1]).replace("{ct: {}}", pair)
    return text + "sources: {edm: {objective: denoising}}\n"


def test_nothing_is_trained_beside_runs_of_its_block_on_other_data(
    tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    root.mkdir()
    for i in range(12):
        shade(root / f"{i:02}.png", i)
    write(tmp_path, pair_of_images(root))
    assert command(tmp_path, "--only", "ct-*-s0") == 0
    shade(root / "03.png", 99)
    worker.load.cache_clear()  # each command is a process of its own
    runs = tmp_path / "results" / "small" / "runs"
    capsys.readouterr()
    for words in ([], ["--only", "cd-*-s0"], ["--only", "edm-s0"]):
        assert command(tmp_path, *words) == 2
        told = " ".join(capsys.readouterr().err.split())
        new = words[1].replace("*", "small") if words else "edm-s0, cd-small-s0"
        new = "edm-s0, cd-small-s0" if new == "cd-small-s0" else new  # which needs its source
        assert told == (
            f"error: small: data.root: {root}: not the data that ct-small-s0 learned from, and "
            f"{new} would be trained on them in the same block; bring the old data back, or name "
            "another folder for what is trained on these: --results DIR"
        )
        assert [p.name.partition("-")[0] for p in runs.iterdir()] == ["ct"]
    assert command(tmp_path, "--only", "*-s1") == 0  # a block of its own
    first = capsys.readouterr().out.partition(" to work on")[0]
    assert "\non other data than are there now: ct-small-s0\n" in first
    shade(root / "03.png", 3)
    worker.load.cache_clear()
    assert command(tmp_path) == 0  # seed 1 is whole, and seed 0 meets its own data
    assert "on other data than are there now: edm-s1, ct-small-s1, cd-small-s1\n" in (
        capsys.readouterr().out)  # fmt: skip


def test_digests_before_training_are_those_that_training_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a user's own files in the places of published ones too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clothes = (("train", 12), ("t10k", 3))
    for part, n in clothes:
        for name, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            body = np.arange(np.prod(shape), dtype=np.uint8).tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(head + body)
    for i in range(12):
        shade(tmp_path / f"{i:02}.png", i)
    grey = f"{{kind: fashion_mnist, root: {tmp_path}}}"
    colour = f"{{kind: images, root: {tmp_path}, held_out: 4}}"
    for text in (grey, colour):
        study = load(write(tmp_path, of_images(tmp_path, [0]).replace(colour, text)))
        kind = study.recipes[0].factors.data
        loaded = data.load(kind)
        assert fetch_data(study) == {kind: (loaded.digest, loaded.shape)}


def test_a_failed_run_keeps_nobody_from_working_until_it_is_tried_again(tmp_path: Path) -> None:
    study = write(tmp_path, pair_of_images(tmp_path))
    made = folders(tmp_path)
    ended(made["ct-s0"], data_digest="cafe" * 4)
    failed(made["cd-s0"])
    ended(made["edm-s0"])
    store = Store(tmp_path / "results", load(study))
    kind, wanted = store.study.recipes[0].factors.data, list(store.study.unique.values())
    now = {kind: "0" * 16}
    names = ["on other data than are there now: ct-small-s0"]
    assert standing.check_blocks(store, wanted, now, False) == names
    assert standing.check_blocks(store, wanted, {}, True) == []
    with pytest.raises(StudyError, match="cd-small-s0 would be trained"):
        standing.check_blocks(store, wanted, now, True)


@pytest.mark.parametrize("kind, said", [
    ("{kind: images, root: photos.zip, held_out: 4}", "photos.zip is not there"),
    ("cifar10", "cifar10 is not in data/cifar10; will be downloaded (170 MB)"),
    ("{kind: cifar10, root: mine}", "cifar10 is not in mine; will be downloaded (170 MB)"),
    ("fashion_mnist", "fashion_mnist is not in data/fashion_mnist; will be downloaded (31 MB)"),
    ("{kind: fitted_mixture, of: fashion_mnist}",
     "fashion_mnist is not in data/fashion_mnist; will be downloaded (31 MB)"),
    ("{kind: fashion_mnist, root: own}", "own: t10k-images-idx3-ubyte is not the published file"),
    ("{kind: images, root: own, held_out: 4}", None), ("digits", None),
    ("{kind: cifar10, root: whole}", None),
])  # fmt: skip
def test_a_plan_says_which_data_are_not_there(
    kind: str, said: str | None, tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")  # may be here
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "t10k-images-idx3-ubyte").write_bytes(b"of my own")
    (tmp_path / "whole" / "cifar-10-batches-py").mkdir(parents=True)
    text = of_images(tmp_path, [0])
    write(tmp_path, text.replace(f"{{kind: images, root: {tmp_path}, held_out: 4}}", kind))
    assert command(tmp_path, "--plan") == 0
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("data: ")]
    assert [x.startswith(f"data: {said}") for x in told] == [True] * (said is not None)
    assert not (tmp_path / "data").exists()


def test_the_report_is_made_by_the_command_that_is_printed(tmp_path: Path, capsys: Told) -> None:
    study = write(tmp_path)
    store = Store(tmp_path / "results", load(study))
    store.write_study(study)
    assert command(tmp_path, "--status") == 3
    (words,) = re.findall(r"report: python (.*?)  ->  (.*)", capsys.readouterr().out)
    where = {**os.environ, "PYTHONPATH": str(ROOT)}  # what an installed package comes to
    subprocess.run([sys.executable, *words[0].split()], check=True, cwd=tmp_path, env=where)
    assert Path(words[1]).is_file()


def test_what_is_trained_and_not_measured_is_not_called_interrupted(
    tmp_path: Path, capsys: Told
) -> None:
    """Other measurements are asked for: nothing is trained again, and nothing sounds like it."""
    write(tmp_path)
    made = folders(tmp_path)
    for name in ("ct-s0", "ct-s1"):
        append_line(made[name].file("attempts.jsonl"), {"event": "end", "reason": "done"})
    ended(made["ct-s0"])
    assert command(tmp_path, "--status") == 3
    told = capsys.readouterr().out
    assert rows(told)["ct"] == ["to measure", "interrupted"]
    assert "1 to measure" in told and "work is left" in told
    assert command(tmp_path, "--plan") == 0
    assert rows(capsys.readouterr().out)["ct"] == ["to measure", "interrupted"]
    many = f"seeds={list(range(20))}"
    assert command(tmp_path, "--status", "--set", many) == 3
    told = " ".join(rows(capsys.readouterr().out)["ct"])
    assert "1 to measure, 1 interrupted, 18 pending" in told
