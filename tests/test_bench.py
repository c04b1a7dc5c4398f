"""The bench: what is timed, what is counted, and what it makes of a study's length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studies import TWO_MODES, read, replaced, write

from study import bench, errors, measure, timing, worker
from study import run as command
from study.bench import kept, main
from study.capture import usable
from study.errors import StudyError
from study.forecast import BENCH, Speeds, step_key
from study.launch import gpus
from study.resolve import load
from study.spec import Run
from study.store import Store, write_json
from study.student import Student, largest_batch
from study.timing import Site, measure_key, steps_of, together

WARM = """\
  ct_warm: {from: ct, init: {run: edm}}
  ct_twin: {from: ct, data_stream: 1}
  ct_short: {from: ct, budget: {share: 0.5}}
  ct_l2: {from: ct, distance: l2}
"""


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder and the figures of a bench of the small study."""
    folder = tmp_path_factory.mktemp("bench")
    path = write(folder, replaced("seeds: [0, 1]", WARM + "seeds: [0, 1]"))
    words = [str(path), "--device", "cpu", "--steps", "3", "--results", str(folder / "results")]
    assert main(words) == 0
    return folder, json.loads((folder / "results/small/bench-cpu.json").read_text())


def test_a_step_is_timed_once_however_many_runs_take_it(tmp_path: Path) -> None:
    study = read(tmp_path, replaced("seeds: [0, 1]", WARM + "seeds: [0, 1]"))
    keys = {r.recipe.name: step_key(r) for r in study.runs}
    assert keys["ct"] == keys["ct_warm"] == keys["ct_twin"] == keys["ct_short"]
    assert len({keys[name] for name in ("edm", "ct", "cd", "ct_l2")}) == 4
    assert len(steps_of(list(study.unique.values()))) == 4


def test_figures_of_a_step(benched: tuple[Path, dict]) -> None:
    """MLP 1 -> 16 -> 1 with one hidden layer of 16 and a label of 64: multiply-adds by hand."""
    _, found = benched
    steps = found["steps"]
    assert set(steps) == {"edm-small", "ct-small", "cd-small", "ct_l2-small"}
    multiply_adds = 1 * 16 + 64 * 16 + 16 * 16 + 16 * 1
    parameters = 2 * 16 + 65 * 16 + 17 * 16 + 17
    for name, passes in (("edm", 3), ("ct", 4), ("cd", 5), ("ct_l2", 4)):
        row = steps[f"{name}-small"]
        assert row["flops_per_image"] == 2 * multiply_adds * passes
        assert row["parameters"] == parameters and row["batch"] == 64
        assert row["seconds_per_image"] > 0 and row["peak_mebibytes"] > 0
        assert any("sliced_wasserstein" in m for m in row["measures"])
    assert found["ceilings"]["float32"] > 1e9 and found["determinism"]["ratio"] > 0


def test_the_forecast_adds_up_every_run(benched: tuple[Path, dict]) -> None:
    folder, found = benched
    images = {"edm": 1280, "ct": 3.5 * 1280, "cd": 1280, "ct_l2": 1280}  # ct also warm, twin, half
    training = sum(
        2 * n * found["steps"][f"{name}-small"]["seconds_per_image"] for name, n in images.items()
    )
    assert found["forecast_seconds"]["training"] == pytest.approx(training)
    ct = found["steps"]["ct-small"]
    measuring = found["recipes"]["small/ct"]["measuring_seconds"]
    assert measuring == pytest.approx(2 * sum(ct["measures"].values()))  # at 0.5 and 1.0
    everyone = found["forecast_seconds"]["measurements"]
    assert everyone > 2 * 7 * measuring / 10  # seven recipes of two seeds, none left out


def test_plan_tells_the_benchs_forecast(
    benched: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = benched
    words = [str(folder / "small.yaml"), "--plan", "--results", str(folder / "results")]
    assert command.main([*words, "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    length = errors.lasting(found["forecast_seconds"]["training"])
    assert f"takes about {length} of one worker by study.bench on one CPU" in text


def test_figures_of_a_cpu_and_of_a_gpu_lie_side_by_side(
    benched: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, found = benched
    store = Store(tmp_path, load(folder / "small.yaml"))
    run = next(r for r in store.study.runs if r.recipe.name == "ct")
    store.path.mkdir()
    row = found["recipes"]["small/ct"]
    fast = row | {"seconds_per_image": row["seconds_per_image"] / 100}
    for kind, device, its in (("cuda", "a GPU", fast), ("cpu", "one CPU thread", row)):
        figures = found | {"device": device, "recipes": {"small/ct": its}}
        write_json(store.path / BENCH[kind], figures)
    told = {kind: Speeds(store, kind).training(run) for kind in BENCH}
    assert told["cpu"] == row["seconds_per_image"] * run.images
    assert told["cuda"] == pytest.approx(told["cpu"] / 100)


def test_lengths_of_time_are_told_in_what_people_count() -> None:
    assert errors.lasting(0.347) == "0.35 seconds"
    assert errors.lasting(42.1) == "42 seconds"
    assert errors.lasting(90) == "1.5 minutes"
    assert errors.lasting(7199) == "120.0 minutes"
    assert errors.lasting(9000) == "2.5 hours"


def test_a_table_in_a_log_names_runs_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a_variant_of_ct_with_a_name_that_is_long"
    words = [str(write(tmp_path)), "--plan", "--results", str(tmp_path / "results")]
    changes = ["--set", f"variants.{name}={{from: ct}}", "--set", "seeds=[0, 1, 2, 3, 4, 5]"]
    assert command.main([*words, *changes]) == 0
    assert f" {name} " in capsys.readouterr().out


def test_several_at_once_do_work(tmp_path: Path) -> None:
    study = load(write(tmp_path))
    run = next(r for r in study.runs if r.recipe.name == "cd")
    assert together(study, run, "cpu", 2) > 100  # images a second; thousands on any machine


def test_bad_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path))
    assert main([path, "--steps", "0"]) == 2
    assert main([path, "--only", "nothing"]) == 2
    if not torch.cuda.is_available():
        assert main([path, "--device", "cuda"]) == 2
    assert "no GPU here" in capsys.readouterr().err or torch.cuda.is_available()


def test_the_batch_that_fits_lies_on_the_line_of_peaks() -> None:
    """10 bytes and 3 a row: 100 bytes hold 30 rows, which are 24 in eights."""
    assert largest_batch({4: 22, 8: 34}, 100, 1000) == 24
    assert largest_batch({4: 22, 8: 34}, 100, 16) == 8  # 16 was too many: 15 at most
    assert largest_batch({1: 13, 2: 16}, 30, 16) == 6


def test_out_of_memory_says_the_batch_that_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load(write(tmp_path))
    store, run = Store(tmp_path / "results", study), study.runs[0]

    def full(*_: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "train", full)
    monkeypatch.setattr(worker, "batch_that_fits", lambda *_: 24)
    monkeypatch.setattr(worker, "free_memory", lambda _: 20 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 2**30))
    assert worker.work(run, study.unique, store.folders, "cpu") == worker.FAILED
    folder = store.folders[run.id]
    expected = (
        "batch: 64 needs more than the 20 GiB that are free of this GPU's 80; about 24 would fit"
    )
    assert folder.reason() == expected
    assert not folder.file("trained.json").exists()


def test_out_of_memory_in_a_measurement_names_it_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load(write(tmp_path))
    store = Store(tmp_path / "results", study)
    run = next(r for r in study.runs if r.recipe.name == "ct")
    plain, calls = measure.evaluate.sliced_wasserstein, []

    def full(*given: object) -> float:
        calls.append(given)
        if len(calls) > 2:  # of samples, and of the floor, at half of training
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*given)

    monkeypatch.setattr(measure.evaluate, "sliced_wasserstein", full)
    assert worker.work(run, study.unique, store.folders, "cpu") == worker.FAILED
    folder = store.folders[run.id]
    expected = "measure.sliced_wasserstein: this GPU's memory does not hold it; ask for less of it"
    assert folder.reason().startswith(expected)
    assert folder.trained and len(list(folder.path.glob("measures/*"))) == 1


def test_nothing_trained_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TWO_MODES.replace("seeds:", "  copy: {init: {run: edm}, budget: {images: 0}}\nseeds:")
    study = load(write(tmp_path, text))
    copies = [r for r in study.runs if r.recipe.name == "copy"]
    assert steps_of(copies) == {}
    with pytest.raises(StudyError, match="no run matches"):
        command.chosen(study, ["copies*"])


PROBED = """\
question: What is timed?
base:
  data: digits
  augment: flip
  network: {kind: unet, width: 4}
  budget: {images: 256}
  batch: 64
sources:
  edm: {objective: denoising}
  copy: {objective: denoising, init: {run: edm}, budget: {images: 0}}
variants:
  ct: {score: single_sample}
  exact: {score: empirical}
seeds: [0, 1, 2]
measure:
  at: [1.0]
  gradient_cosine: {against: {kind: teacher, run: edm}, sigmas: 2, batches: 4}
"""


def test_every_seeds_measurements_are_in_the_forecast_and_flips_are_timed_as_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their settings name each seed's own teacher. A study whose source is not trained has a
    forecast too; other factors than the timed ones have none."""
    seen = []
    make = Site.student

    def noted(site: Site, run: Run) -> Student:
        seen.append(site.dataset(run))
        return make(site, run)

    monkeypatch.setattr(Site, "student", noted)
    path = write(tmp_path, PROBED)
    words = [str(path), "--results", str(tmp_path / "results")]
    assert main([*words, "--device", "cpu", "--steps", "1"]) == 0
    assert all(dataset.flip for dataset in seen)
    found = json.loads((tmp_path / "results/small/bench-cpu.json").read_text())
    names = "ct", "exact", "edm"
    ct, exact, edm = (found["recipes"][f"small/{n}"]["measuring_seconds"] for n in names)
    assert min(ct, exact) > 0
    total = found["forecast_seconds"]["measurements"]
    assert total == pytest.approx(3 * (ct + exact + edm))
    capsys.readouterr()
    plan = [*words, "--device", "cpu", "--plan"]
    assert command.main(plan) == 0
    assert "by study.bench on one CPU thread" in " ".join(capsys.readouterr().out.split())
    assert command.main([*plan, "--set", "base.network.width=8"]) == 0
    assert "takes about" not in capsys.readouterr().out


def test_settings_of_other_seeds_cost_the_same(tmp_path: Path) -> None:
    study = load(write(tmp_path, PROBED))
    asked = [m for r in study.runs if r.recipe.name == "ct" for m in r.measures]
    assert len({m.file for m in asked}) == 3 and len({measure_key(m) for m in asked}) == 1


@pytest.mark.parametrize("other", ["", "device", "torch", "code"])
def test_figures_are_kept_of_the_same_machine_torch_and_code(other: str, tmp_path: Path) -> None:
    here = {"device": "gpu", "torch": torch.__version__, "code": worker.CODE["code"]}
    timed = {"step": "s", "seconds_per_image": 1.0, "first_update_seconds": 1.0,
             "measuring_seconds": None}  # fmt: skip
    store = Store(tmp_path, load(write(tmp_path)))
    store.path.mkdir(parents=True)
    (store.path / "bench-cuda.json").write_text(
        json.dumps(here | {"recipes": {"c/ct": timed}} | ({other: "x"} if other else {}))
    )
    assert kept(store, "gpu", "cuda") == ({} if other else {"c/ct": timed})


def test_a_bench_leaves_the_other_devices_figures_and_adds_to_its_own(tmp_path: Path) -> None:
    path = write(tmp_path)
    store = Store(tmp_path / "results", load(path))
    store.path.mkdir(parents=True)
    (store.path / BENCH["cuda"]).write_text("another machine's")
    words = [str(path), "--device", "cpu", "--steps", "1", "--steps-only"]
    for only in ("edm-*", "ct-*"):
        assert main([*words, "--only", only, "--results", str(tmp_path / "results")]) == 0
    assert (store.path / BENCH["cuda"]).read_text() == "another machine's"
    found = json.loads((store.path / BENCH["cpu"]).read_text())
    assert set(found["steps"]) == {"ct-small"}
    assert set(found["recipes"]) >= {"small/edm", "small/ct"}


def test_a_bench_cut_short_has_told_and_kept_what_it_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = timing.timed, []

    def cut(*given: object) -> dict:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(bench, "timed", cut)
    words = [str(write(tmp_path)), "--device", "cpu", "--steps", "1", "--steps-only"]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--results", str(tmp_path / "results")])
    found = json.loads((tmp_path / "results/small/bench-cpu.json").read_text())
    assert len(found["steps"]) == 2 and len(found["recipes"]) >= 2
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in found["steps"])
    study = load(Path(words[0]))
    known = sum(f"{r.recipe.cell}/{r.recipe.name}" in found["recipes"]
                for r in study.unique.values())  # fmt: skip
    assert 0 < known < len(study.unique)
    assert command.main([*words[:3], "--plan", "--results", str(tmp_path / "results")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"training {known} of these {len(study.unique)} runs takes about" in said
    assert "of the others nothing is known, python -m study.bench finds out" in said


def test_ctrl_c_ends_a_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def cut() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.command(cut)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit) as ended:
        errors.command(lambda: 2)
    assert ended.value.code == 2


def test_what_determinism_costs_is_kept_before_many_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "determinism", lambda *_: (1.25, 0.01))
    monkeypatch.setattr(bench, "together", cut)
    words = [str(write(tmp_path)), "--device", "cpu", "--steps", "1", "--workers", "2"]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--only", "edm-*", "--results", str(tmp_path / "results")])
    found = json.loads((tmp_path / "results/small/bench-cpu.json").read_text())
    assert found["determinism"]["ratio"] == 1.25


def test_one_that_dies_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load(write(tmp_path))
    run = next(r for r in study.runs if r.recipe.name == "cd")
    broken = replace(study, runs=tuple(r for r in study.runs if r.id == run.id))  # no teacher
    with pytest.raises(StudyError, match="one of 2 processes at once failed"):
        together(broken, run, "cpu", 2)


@pytest.mark.parametrize(("named", "count"), [("", 0), ("-1", 0), ("0,-1,1", 1), ("0, 1", 2)])
def test_hidden_gpus_are_not_counted(
    named: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus() == count


def test_a_gpu_that_torch_cannot_use_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one that it can use")
    with pytest.raises(StudyError, match="cuda:0: torch finds no GPU"):
        usable("cuda:0")
    assert usable("cpu") == torch.device("cpu")


def test_steps_alone_are_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write(tmp_path)), "--results", str(tmp_path / "results")]
    assert main([*words, "--device", "cpu", "--steps", "1", "--steps-only"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measurements of 6 runs not timed" in said and "determinism" not in said
    assert command.main([*words, "--device", "cpu", "--plan"]) == 0
    assert "measuring comes on top" in " ".join(capsys.readouterr().out.split())
