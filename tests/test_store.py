"""Files are written whole, state is derived from them, the lock is the kernel's."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from studies import read, trained

from study.errors import StudyError
from study.store import Folder, Store, append_line, read_json, read_lines, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(path, "text")  # type: ignore[arg-type] - fails in the middle of the write
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_torn_file_is_named_and_a_missing_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(StudyError, match="a.json"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "b.json") is None


def test_a_log_cut_in_its_last_line_reads_up_to_it(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for step in range(3):
        append_line(path, {"step": step})
    path.write_bytes(path.read_bytes()[:-4])
    assert [row["step"] for row in read_lines(path)] == [0, 1]
    append_line(path, {"step": 2})  # and goes on on a line of its own
    append_line(path, {"step": 3})
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]


def _hold(path: Path, ready: object, leave: object) -> None:
    with Folder(path).lock() as mine:
        ready.put(mine)
        leave.get()


def test_the_lock_is_exclusive_between_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Queue(), context.Queue()
    holder = context.Process(target=_hold, args=(tmp_path / "run", ready, leave))
    holder.start()
    assert ready.get(timeout=60)
    folder = Folder(tmp_path / "run")
    assert folder.locked
    with folder.lock() as mine:
        assert not mine
    holder.kill()
    holder.join()
    assert not folder.locked
    with folder.lock() as mine:
        assert mine


def test_state_follows_from_the_files(tmp_path: Path) -> None:
    study = read(tmp_path)
    store = Store(tmp_path / "results", study)
    run = next(r for r in study.runs if r.recipe.name == "ct")
    folder = store.folders[run.id]
    assert folder.state(run) == "pending"
    folder.create(run, {"id": run.id})
    append_line(folder.file("attempts.jsonl"), {"event": "start"})
    assert folder.state(run) == "interrupted"
    with folder.lock():
        pass
    append_line(folder.file("attempts.jsonl"), {"event": "end", "reason": "disk full"})
    assert folder.state(run) == "failed" and folder.reason() == "disk full"
    append_line(folder.file("attempts.jsonl"), {"event": "start"})
    write_json(folder.file("trained.json"), trained(run.id))
    # what is asked at 0.5 has no snapshot: not measured, and not waited for
    asked = [m for m in run.measures if m.at == 1.0]
    assert folder.due(run) == asked and len(asked) < len(run.measures)
    for settings in asked:
        write_json(folder.file(f"measures/{settings.file}"), {})
    assert folder.state(run) == "to measure"  # the picture is still to be made
    write_bytes(folder.file("samples.png"), b"")
    assert folder.state(run) == "done"
    folder.file(f"measures/{asked[0].file}").write_text('{"value": ')
    assert folder.state(run) == "done" and folder.state(run, thorough=True) != "done"


def test_only_the_id_of_a_folder_is_key(tmp_path: Path) -> None:
    study = read(tmp_path)
    run = study.runs[0]
    old = tmp_path / "results" / "small" / "runs" / f"an-older-name-s0-{run.id}"
    old.mkdir(parents=True)
    (old.parent / "gone-s0-0123456789").mkdir()
    store = Store(tmp_path / "results", study)
    assert store.folders[run.id].path == old
    assert [p.name for p in store.orphans] == ["gone-s0-0123456789"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    run = read(tmp_path).runs[0]
    folder = Folder(tmp_path / "run")
    folder.create(run, {"id": run.id})
    left = [folder.file(".state.pt.host.123"), folder.file("measures/.1.000-fid.json.host.123")]
    for path in left:
        path.write_bytes(b"half")
    folder.create(run, {"id": run.id})
    assert not any(path.exists() for path in left) and folder.file("run.json").exists()


def test_a_run_without_its_measures_folder_is_measured_again(tmp_path: Path) -> None:
    run = read(tmp_path).runs[-1]
    folder = Folder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.file("trained.json"), trained(run.id))
    assert folder.due(run)
    write_json(folder.file("trained.json"), {})
    with pytest.raises(StudyError, match="trained.json"):
        folder.due(run)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run = read(tmp_path).runs[0]
    folder = Folder(tmp_path / "run")
    folder.create(run, {"id": "0123456789"})
    with pytest.raises(StudyError, match="0123456789"):
        folder.create(run, {"id": run.id})
