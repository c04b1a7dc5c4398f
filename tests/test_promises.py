"""The promises of the README, end to end on a small study."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from studies import TWO_MODES, content, read, replaced, write

from study import worker
from study.run import main
from study.store import Folder, Store, read_json, read_lines, sha256, write_json
from study.train import train

ROOT = Path(__file__).parents[1]
FULL = TWO_MODES.replace("  cd: {", "  warm: {from: ct, init: {run: edm}, dropout: 0.2}\n  cd: {")


def run(path: Path, results: Path, *words: str) -> int:
    """The command in this process."""
    return main([str(path), "--results", str(results), "--workers", "0", *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished study: its file and its results folder."""
    folder = tmp_path_factory.mktemp("done")
    path = write(folder, FULL)
    assert run(path, folder / "results") == 0
    return path, folder / "results"


def test_a_finished_study_is_left_alone(done: tuple[Path, Path]) -> None:
    path, results = done
    before = {p: p.stat().st_mtime_ns for p in (results / "small" / "runs").rglob("*")}
    assert run(path, results) == 0
    assert {p: p.stat().st_mtime_ns for p in (results / "small" / "runs").rglob("*")} == before


def test_budgets_are_met_exactly_and_the_ledger_adds_up(done: tuple[Path, Path]) -> None:
    path, results = done
    store = Store(results, read(path.parent, FULL))
    passes = {"edm": 3, "ct": 4, "cd": 5, "warm": 4}
    for r in store.study.runs:
        spend = store.folders[r.id].trained["spend"]
        assert spend["images"] == 1280 and spend["updates"] == 20
        assert spend["passes"] == 1280 * passes[r.recipe.name]
    spends = {r.recipe.name: store.folders[r.id].trained["spend"] for r in store.study.runs}
    flops = {name: spend["flops"] for name, spend in spends.items()}
    # a teacher's forward on top of CT's step: about a quarter more
    assert 1.2 < flops["cd"] / flops["ct"] < 1.4


def test_a_block_is_paired_and_blocks_differ(done: tuple[Path, Path]) -> None:
    path, results = done
    store = Store(results, read(path.parent, FULL))
    facts = {(r.recipe.name, r.seed): store.folders[r.id].trained for r in store.study.runs}
    for seed in (0, 1):
        ct, cd, warm, edm = (facts[name, seed] for name in ("ct", "cd", "warm", "edm"))
        assert ct["stream_digest"] == cd["stream_digest"] == warm["stream_digest"]
        assert ct["stream_digest"] != edm["stream_digest"]  # a teacher has noise of its own
        assert ct["init_digest"] == cd["init_digest"] != warm["init_digest"]
        assert ct["data_digest"] == edm["data_digest"]
    assert facts["ct", 0]["stream_digest"] != facts["ct", 1]["stream_digest"]
    assert facts["ct", 0]["init_digest"] != facts["ct", 1]["init_digest"]


def test_ct_from_random_weights_holds_none_of_its_teachers(done: tuple[Path, Path]) -> None:
    """A published code base copied its teacher into 'CT from scratch'."""
    path, results = done
    store = Store(results, read(path.parent, FULL))
    facts = {r.recipe.name: store.folders[r.id].trained for r in store.study.runs if r.seed == 0}
    teacher = store.folders[next(r.id for r in store.study.runs if r.recipe.name == "edm")]
    from study.weights import digest, weights_at

    copied = digest(weights_at(teacher, 1.0, 0.05))
    assert facts["warm"]["init_digest"] == copied != facts["ct"]["init_digest"]


def test_order_and_processes_change_no_bit(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, results = done
    for pattern in ("cd-*-s1", "warm*", "*"):  # another order, and in processes of their own
        code = main([str(path), "--results", str(tmp_path), "--workers", "2", "--only", pattern])
        assert code == 0
    assert content(tmp_path) == content(results)


def test_a_stopped_run_goes_on_to_the_same_bits(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, results = done
    study = read(path.parent, FULL)
    store = Store(tmp_path, study)
    for r in study.unique.values():
        folder, steps = store.folders[r.id], iter(range(1000))
        folder.create(r, {"id": r.id})
        dataset, cpu = worker.load(r.recipe.factors.data, torch.device("cpu")), torch.device("cpu")
        worker.set_up()
        stopped = train(r, study.unique, store.folders.__getitem__, dataset, cpu,
                        lambda steps=steps: next(steps) == 6,
                        worker.check_inputs(r, store.folders.__getitem__, dataset))
        assert not stopped and folder.trained is None
        # a crash after the last save left rows that the state knows nothing of, and half a row
        with folder.file("steps.jsonl").open("a") as log:
            log.write(json.dumps({"step": 9, "images": 576, "loss": 1.0}) + '\n{"step": 10, "ima')
        assert worker.work(r, study.unique, store.folders, "cpu") == worker.DONE
    assert run(path, tmp_path) == 0
    assert content(tmp_path) == content(results)


def half_trained(folder: Path, name: str, text: str = FULL) -> tuple[Path, Store, Folder]:
    """A study whose run NAME of seed 0 was stopped in its middle, its sources finished."""
    path, results = write(folder, text), folder / "results"
    store = Store(results, read(folder, text))
    r = next(r for r in store.study.runs if r.recipe.name == name and r.seed == 0)
    for i in r.refs.values():
        source = store.study.unique[i]
        assert worker.work(source, store.study.unique, store.folders, "cpu") == worker.DONE
    run_folder, steps = store.folders[r.id], iter(range(1000))
    run_folder.create(r, {"id": r.id})
    cpu = torch.device("cpu")
    worker.set_up()
    dataset = worker.load(r.recipe.factors.data, cpu)
    inputs = worker.check_inputs(r, store.folders.__getitem__, dataset)
    assert not train(r, store.study.unique, store.folders.__getitem__, dataset, cpu,
                     lambda: next(steps) == 11, inputs)  # fmt: skip
    return path, store, run_folder


def test_a_point_asked_for_too_late_is_not_measured_and_breaks_nothing(tmp_path: Path) -> None:
    path, _, folder = half_trained(tmp_path, "ct")
    path.write_text(FULL.replace("at: [0.5, 1.0]", "at: [0.25, 0.75, 1.0]"))
    assert run(path, tmp_path / "results", "--only", "ct-*-s0") == 0
    assert [s["at"] for s in folder.trained["snapshots"]] == [0.75, 1.0]


def test_a_run_learns_from_one_teacher_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store, folder = half_trained(tmp_path, "cd")
    teacher = next(f for f in store.folders.values() if f.path.name.startswith("edm-s0"))
    snapshot, trained = teacher.file("snapshots/1.000.pt"), teacher.trained
    weights = torch.load(snapshot, weights_only=True)
    weights["ema"]["0.05"]["out.weight"] *= 1.7
    torch.save(weights, snapshot)
    assert run(path, tmp_path / "results", "--only", "cd-*-s0") == 1
    assert "SHA-256 has changed" in capsys.readouterr().out
    trained["sha256"]["snapshots/1.000.pt"] = sha256(snapshot)  # a teacher properly trained again
    write_json(teacher.file("trained.json"), trained)
    assert run(path, tmp_path / "results", "--only", "cd-*-s0", "--retry") == 1
    assert "a source has changed" in capsys.readouterr().out.replace("\n", " ")
    assert folder.trained is None


def test_a_finished_run_is_not_measured_beside_another_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = write(tmp_path), tmp_path / "results"
    assert run(path, results, "--only", "cd-*-s0") == 0
    store = Store(results, read(tmp_path))
    teacher = next(f for f in store.folders.values() if f.path.name.startswith("edm-s0"))
    trained = teacher.trained
    trained["sha256"]["snapshots/1.000.pt"] = "0" * 64
    write_json(teacher.file("trained.json"), trained)
    next(results.rglob("cd-small-s0-*/measures/*.json")).unlink()
    assert run(path, results, "--only", "cd-*-s0") == 1
    assert "trained from another score" in capsys.readouterr().out.replace("\n", " ")


def test_finished_runs_are_not_measured_on_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = write(tmp_path), tmp_path / "results"
    assert run(path, results, "--only", "ct-*-s0") == 0
    store = Store(results, read(tmp_path))
    folder = next(f for f in store.folders.values() if f.path.name.startswith("ct-small-s0"))
    write_json(folder.file("trained.json"), folder.trained | {"data_digest": "0123456789abcdef"})
    for file in folder.file("measures").iterdir():
        file.unlink()
    assert run(path, results, "--only", "ct-*-s0") == 1
    assert "0123456789abcdef" in capsys.readouterr().out


def test_a_torn_state_is_named_and_training_begins_anew(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, folder = half_trained(tmp_path, "ct")
    state = folder.file("state.pt")
    state.write_bytes(state.read_bytes()[:-100])
    assert run(path, tmp_path / "results", "--only", "ct-*-s0") == 0
    assert "state.pt" in capsys.readouterr().out
    whole = done[1] / "small" / "runs" / folder.path.name / "trained.json"
    digests = read_json(whole)["sha256"]
    assert {k: v for k, v in folder.trained["sha256"].items() if "snapshots" in k} == {
        k: v for k, v in digests.items() if "snapshots" in k}  # fmt: skip


def test_two_launchers_share_a_study_and_train_nothing_twice(tmp_path: Path) -> None:
    path = write(tmp_path, FULL.replace("images: 1280", "images: 12800"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "results"),
             "--workers", "1"]  # fmt: skip
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    starts = []
    for folder in (tmp_path / "results" / "small" / "runs").iterdir():
        rows = read_lines(folder / "attempts.jsonl")
        assert [row["event"] for row in rows] == ["start", "end"], folder
        starts.append(rows[0]["pid"])
    assert len(starts) == 8


def test_results_of_two_machines_come_together(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, results = done
    for seed in (0, 1):
        words = "--only", f"*-s{seed}"
        assert run(path, tmp_path / f"machine{seed}", *words) == 0
    here, there = (tmp_path / f"machine{seed}/small/runs" for seed in (0, 1))
    assert len(list(here.iterdir())) == len(list(there.iterdir())) == 4
    shutil.copytree(there, here, dirs_exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    assert run(path, tmp_path / "machine0") == 0
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before
    assert content(tmp_path / "machine0") == content(results)


def test_a_torn_measurement_is_made_again(tmp_path: Path) -> None:
    path, results = write(tmp_path), tmp_path / "results"
    assert run(path, results, "--only", "ct-*-s0") == 0
    file = next(results.rglob("measures/*.json"))
    whole = read_json(file)
    file.write_bytes(file.read_bytes()[:40])
    assert run(path, results, "--only", "ct-*-s0") == 0
    assert read_json(file) | {"seconds": 0} == whole | {"seconds": 0}


def test_ctrl_c_at_the_start_ends_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, replaced("images: 1280", "images: 64000"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "results"),
             "--workers", "2", "--only", "ct-*"]  # fmt: skip
    sign = tmp_path / "results" / "small" / "study.json"
    for delay in (0.0, 0.3):  # a terminal's Ctrl-C reaches children that are just being born
        sign.unlink(missing_ok=True)
        process = subprocess.Popen(words, cwd=ROOT, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        wait_for(sign.exists)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 3, out
        assert "failed" not in out
    assert main([*words[3:-2], "--only", "ct-*-s0"]) == 0


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, replaced("images: 1280", "images: 640000"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "results"),
             "--workers", "1", "--only", "ct-*-s0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = Folder(next_folder(tmp_path / "results" / "small" / "runs"))
    wait_for(lambda: folder.progress() is not None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    state = torch.load(folder.file("state.pt"), weights_only=True)
    assert 0 < state["spend"]["images"] < 640000
    assert read_lines(folder.file("attempts.jsonl"))[-1]["reason"] == "stopped"


def test_sigterm_to_all_processes_leaves_the_launcher_waiting_for_its_workers(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, replaced("images: 1280", "images: 640000"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "results"),
             "--workers", "2", "--only", "ct-*"]  # fmt: skip
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    folder = Folder(next_folder(tmp_path / "results" / "small" / "runs"))
    wait_for(lambda: folder.progress() is not None)
    worker = read_lines(folder.file("attempts.jsonl"))[-1]["pid"]
    os.kill(worker, signal.SIGSTOP)  # a worker that takes its time to save
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and schedulers send it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    os.kill(worker, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert folder.file("state.pt").exists()
    assert read_lines(folder.file("attempts.jsonl"))[-1]["reason"] == "stopped"


def next_folder(runs: Path) -> Path:
    """The first run folder to appear."""
    wait_for(lambda: runs.is_dir() and any(runs.iterdir()))
    return next(runs.iterdir())


def wait_for(condition: object, seconds: float = 60) -> None:
    """Waits until condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_loss_that_is_not_finite_is_an_outcome(tmp_path: Path) -> None:
    path = write(tmp_path, replaced("{score: single_sample}", "{optimizer: {lr: 1e30}}"))
    assert run(path, tmp_path / "results", "--only", "ct-*-s0") == 0
    store = Store(tmp_path / "results", read(tmp_path, path.read_text()))
    ct = next(r for r in store.study.runs if r.recipe.name == "ct")
    assert store.folders[ct.id].trained["outcome"] == "diverged"
    assert store.folders[ct.id].state(ct) == "done"


def test_a_failed_run_says_why_and_waits_for_retry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = write(tmp_path), tmp_path / "results"
    assert run(path, results, "--only", "edm-s0") == 0
    store = Store(results, read(tmp_path))
    teacher = store.folders[next(r.id for r in store.study.runs if r.recipe.name == "edm")]
    snapshot = teacher.file("snapshots/1.000.pt")
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[: len(whole) // 2])
    assert run(path, results, "--only", "cd-*-s0") == 1
    told = capsys.readouterr().out
    assert "1.000.pt" in told and "log.txt" in told and "--retry" in told
    snapshot.write_bytes(whole)
    assert run(path, results, "--only", "cd-*-s0") == 1
    assert run(path, results, "--only", "cd-*-s0", "--retry") == 0


def test_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    """SIGKILL to the launcher and all its children, again and again: the end is the same, bit for
    bit. STUDY_KILLS=200 is the soak."""
    text = FULL.replace("images: 1280", "images: 25600")
    path, kills = write(tmp_path, text), int(os.environ.get("STUDY_KILLS", "10"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "killed")]
    chance, survived = random.Random(0), 0
    while survived < kills:
        process = subprocess.Popen(words, cwd=ROOT, start_new_session=True,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        time.sleep(chance.uniform(1.0, 6.0))
        alive = process.poll() is None
        with contextlib.suppress(ProcessLookupError):  # done already, and nobody left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        survived += 1
        if not alive:  # nothing was left to kill: begin again
            shutil.rmtree(tmp_path / "killed")
    assert main([*words[3:], "--workers", "2"]) == 0
    assert run(path, tmp_path / "whole") == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    path = write(tmp_path, replaced("width: 16", "width: 64"))
    words = [sys.executable, "-m", "study.run", str(path), "--results", str(tmp_path / "results"),
             "--workers", "1", "--only", "ct-*-s0"]  # fmt: skip
    limit = 30_000  # bytes a file may have: the logs fit and the weights don't
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                (limit, limit)))  # fmt: skip
    assert done.returncode == 1 and "File too large" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    leftover = [p for p in (tmp_path / "results").rglob(".*") if p.is_file()]
    assert not leftover
    assert main([*words[3:], "--retry"]) == 0


def test_new_seeds_run_only_what_is_new(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = done
    shutil.copytree(results, tmp_path / "results")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "results/small/runs").iterdir()}
    assert run(path, tmp_path / "results", "--plan", "--set", "seeds=[0, 1, 5]") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 runs to train (5,120 images), 8 kept" in told
    assert "by the speed of 8 finished runs" in told
    words = "--plan", "--set", "seeds=[0, 1, 5]", "--only", "edm-s5"
    assert run(path, tmp_path / "results", *words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 run to train (1,280 images), 0 kept, 1 measurement to make, 0 folders" in told
    assert run(path, tmp_path / "results", "--set", "seeds=[0, 1, 5]") == 0
    folders = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "results/small/runs").iterdir()}
    assert {k: folders[k] for k in before} == before
    assert len(folders) == len(before) * 3 // 2


def test_minutes_end_a_study_cleanly(tmp_path: Path) -> None:
    path = write(tmp_path, replaced("images: 1280", "images: 6400000"))
    start = time.monotonic()
    for workers in ("0", "1"):
        words = [str(path), "--results", str(tmp_path / workers), "--minutes", "0.1"]
        assert main([*words, "--workers", workers, "--only", "ct-*-s0"]) == 3
        state = next((tmp_path / workers).rglob("state.pt"))
        assert torch.load(state, weights_only=True)["spend"]["images"] > 0
    assert time.monotonic() - start < 60


def test_a_student_of_a_diverged_teacher_is_blocked_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = replaced("{objective: denoising}", "{objective: denoising, optimizer: {lr: 1e30}}")
    assert run(write(tmp_path, text), tmp_path / "results", "--only", "cd-*-s0") == 1
    assert "its source edm diverged" in capsys.readouterr().out
