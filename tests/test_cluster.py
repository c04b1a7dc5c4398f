"""Studies on Slurm: against a real one where there is one, and a pretended one for the rest."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm
from studies import TWO_MODES, content, read, replaced, trained, write

from study import cluster, jobs, pinned, sealed
from study.cluster import arrays
from study.errors import StudyError
from study.jobs import Job
from study.parameters import parameters
from study.pinned import code
from study.queued import FOLDER, LETTERS, TAIL, Queue, ending
from study.resolve import load
from study.run import main
from study.store import Folder, Store, append_line, read_json, read_lines, write_json

ROOT = Path(__file__).parents[1]
REQUEUES = "Calling checkpoint method"  # what submitit logs before it has a job requeued
LONG = replaced("images: 1280", "images: 128000")  # some seconds a run


# --- without Slurm, or beside a pretended one ---


@dataclass
class Fake:
    """A pretended Slurm: programs in a folder that is first on PATH."""

    folder: Path

    def program(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text("#!/bin/sh\n" + text)
        file.chmod(0o755)

    def scripts(self) -> list[str]:
        """What was given to sbatch, in order."""
        files = sorted(self.folder.glob("script.*"), key=lambda p: int(p.suffix[1:]))
        return [p.read_text() for p in files]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """It takes what it is given and never starts it; accounting is absent, as without slurmdbd."""
    found = Fake(tmp_path / "bin")
    found.folder.mkdir()
    found.program("sbatch", f"""cd {found.folder}
n=$(($(ls script.* 2>/dev/null | wc -l) + 1))
if [ $n -gt $(cat limit 2>/dev/null || echo 99) ]; then
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1
fi
cp "$1" script.$n; echo "Submitted batch job $((n + 40))"
""")
    found.program("squeue", f"cat {found.folder}/queue\n")
    (found.folder / "queue").touch()
    found.program("scontrol", "echo 'MaxArraySize            = 3'\n")
    found.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1\n")
    found.program("srun", "exit 1\n")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    return found


def command(path: Path, *words: str) -> list[str]:
    """The command line that submits, each run a job of its own."""
    return [str(path), "--results", str(path.parent / "results"), "--on", "slurm", "--device",
            "cpu", "--minutes", "0", *words]  # fmt: skip


def dependencies(scripts: list[str]) -> list[str]:
    """The dependency line of each script, '' where it has none."""
    key = "#SBATCH --dependency="
    return ["".join(x.removeprefix(key) for x in s.splitlines() if x.startswith(key))
            for s in scripts]  # fmt: skip


def test_arrays_keep_to_the_clusters_limit_and_wait_for_their_sources(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TWO_MODES.replace("  cd: {", "  later: {from: ct, init: {run: edm}}\n  cd: {")
    path = write(tmp_path, text.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    assert main(command(path)) == 3
    told, scripts = capsys.readouterr().out, fake.scripts()
    for number, count in ((41, 3), (42, 3), (43, 3), (44, 1), (45, 2)):
        assert f"submitted {number}: {count} job" in told
    # six runs read no other: edm and ct of seed 0, edm of seed 1, and the rest; six follow
    assert dependencies(scripts) == ["", "", "afterany:41", "afterany:41", "afterany:42"]
    assert all("#SBATCH --array=0-2%3" in s for s in scripts[:3]) and "--array=" not in scripts[3]
    assert all("#SBATCH --requeue" in s for s in scripts)
    assert all("#SBATCH --signal=USR2@90" in s and "gpus" not in s for s in scripts)


def test_plan_shows_what_would_be_submitted_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write(tmp_path)
    words = ["--results", str(tmp_path / "results"), "--on", "slurm", "--plan", "--minutes", "0"]
    given = ["--slurm", "partition=gpu", "--slurm", "mem=4G", "--slurm",
             "additional_parameters={reservation: night}"]  # fmt: skip
    assert main([str(path), *words, *given]) == 0
    told = capsys.readouterr().out
    for line in ("array1: 4 jobs", "array2: 2 jobs", "#SBATCH --dependency=afterany:array1",
                 "#SBATCH --partition=gpu", "#SBATCH --mem=4G", "#SBATCH --gpus-per-node=1",
                 "#SBATCH --reservation=night", "#SBATCH --time=240", "#SBATCH --array=0-3%4",
                 "job 1, about 1.4 minutes: cd-small-s1"):  # fmt: skip
        assert line in told, line
    assert not (tmp_path / "results").exists()
    assert main([str(path), *words[:-3]]) == 2
    assert "no sbatch and srun here" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slurm", "partitoin=gpu"], "did you mean 'partition'"),
        (["--slurm", "cheese=1"], "allowed: account, "),
        (["--slurm", "time=soon"], "Expected `int`"),
        (["--slurm", "time=4:00:00"], "Expected `int`, got `str`; minutes, a whole number"),
        (["--slurm", "gpus_per_node=0", "--device", "auto"], "would find no GPU; runs on CPUs"),
        (["--slurm", "gres=gpu:a100:0", "--device", "cuda"], "want --device cpu"),
        (["--slurm", "gres=none", "--device", "auto"], "gres=none: its jobs would find no GPU"),
        (["--slurm", "additional_parameters={gpus: 0}", "--device", "auto"], "would find no GPU"),
        (["--slurm", "cpus_per_task=2.5"], "Expected `int | null`"),
        (["--slurm", "time=14"], "at least 15 minutes"),
        (["--slurm", "dependency=afterok:1"], "set by --on slurm"),
        (["--slurm", "mem=4"], "Slurm would take it for megabytes; name the unit, 4G or 4M"),
        (["--slurm", "mem_per_cpu=16000"], "name the unit, 16000G or 16000M"),
        (["--slurm", "additional_parameters={mem-per-gpu: 8}"], "name the unit, 8G or 8M"),
        (["--slurm", "partition"], "key=value expected"),
        (["--slurm", "cpus_per_task=0"], "cpus_per_task=0: at least 1"),
        (["--slurm", "array_parallelism=0"], "array_parallelism=0: at least 1"),
        (["--slurm", "additional_parameters={cpus-per-task: 0}"], "cpus-per-task=0: at least 1"),
        (["--slurm", "gpus_per_node=2"], "gpus_per_node=2: with --device cpu its jobs"),
        (["--slurm", "gres=lustre:1,gpu:a100:1"], "gres=gpu:a100:1: with --device cpu its jobs"),
        (["--slurm", "additional_parameters={gpus: 1}"], "gpus=1: with --device cpu its jobs"),
        (["--workers", "2"], "one run at a time"),
    ],
)
def test_what_slurm_would_misunderstand_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(command(write(tmp_path), "--plan", *words)) == 2
    told = capsys.readouterr()
    assert said in told.err and not told.out  # before anything is shown


def test_a_slurm_parameter_without_slurm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write(tmp_path)), "--plan", "--slurm", "partition=gpu"]) == 2
    assert "only with --on slurm" in capsys.readouterr().err


def test_a_gpu_is_asked_for_unless_something_else_is() -> None:
    assert parameters([], "auto", "x")["gpus_per_node"] == 1
    assert "gpus_per_node" not in parameters([], "cpu", "x")
    for said in ("gres=gpu:a100:1", "gres=gpu", "gpus_per_task=1", "gres=lustre:1,shard:20",
                 "additional_parameters={gpus: 2}"):  # fmt: skip
        assert "gpus_per_node" not in parameters([said], "auto", "x"), said
    assert parameters(["gres=lustre:1"], "auto", "x")["gpus_per_node"] == 1
    assert parameters(["gpus_per_node=0"], "cpu", "x")["gpus_per_node"] == 0


def test_all_memory_of_a_node_has_no_unit() -> None:
    assert parameters(["mem=0"], "cpu", "x")["mem"] == "0"
    assert parameters(["mem=1.5G"], "cpu", "x")["mem"] == "1.5G"


@pytest.mark.parametrize("given", ["mem=0", "mem=0G", "mem_per_cpu=0",
                                   "additional_parameters={mem: 0}"])  # fmt: skip
def test_what_asks_for_all_memory_of_a_node_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    path, said = write(tmp_path), "asks for all memory of a node: one job at a time runs on each"
    assert main(command(path, "--plan", "--slurm", given)) == 0
    assert said in capsys.readouterr().out
    assert main(command(path, "--plan", "--slurm", "mem=10G")) == 0
    assert said not in capsys.readouterr().out


def test_a_refused_array_is_told_and_the_same_command_submits_the_rest(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    (fake.folder / "limit").write_text("1")
    assert main(command(path)) == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "array 2 of 3 was not submitted" in told and "QOSMaxSubmitJobPerUserLimit" in told
    assert "submitted before it: 41, and the same command leaves that alone" in told
    assert told.count("QOSMaxSubmitJobPerUserLimit") == 1
    (fake.folder / "limit").unlink()
    (fake.folder / "queue").write_text("41_0 PENDING\n41_1 RUNNING\n41_2 PENDING\n")
    assert main(command(path)) == 3
    told = capsys.readouterr().out
    assert "3 runs to submit, 3 queued already" in told
    assert "submitted 42: 1 job, 1 run" in told and "submitted 43: 2 jobs, 2 runs" in told
    jobs = [read_json(p)["jobs"] for p in (tmp_path / "results/small" / FOLDER).glob("*.json")]
    assert len([i for job in jobs for ids in job for i in ids]) == 6  # each once
    # what is new waits for what was queued before
    assert dependencies(fake.scripts())[1:] == ["", "afterany:41"]


def test_nothing_is_submitted_twice_and_what_is_gone_is_again(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    assert main(command(path)) == 3
    assert len(fake.scripts()) == 3
    queue = ["41_0 PENDING", "41_1 RUNNING", "41_2 REQUEUED", "42 PENDING", "43_0 PENDING",
             "43_1 PENDING", "77_0 RUNNING"]  # fmt: skip
    (fake.folder / "queue").write_text("\n".join(queue) + "\n")
    assert main(command(path)) == 3
    assert len(fake.scripts()) == 3
    (fake.folder / "queue").write_text("\n".join(queue[1:]) + "\n")
    capsys.readouterr()
    assert main([str(path), "--results", str(tmp_path / "results"), "--status"]) == 3
    told = capsys.readouterr().out
    folder = tmp_path / "results/small" / FOLDER
    log = folder / read_json(folder / "41.json")["folder"] / "41_0_0_log.out"
    assert f"job 41_0: gone, not done: edm-s0; log: {log}" in told
    assert "1 pending, 5 queued" in " ".join(told.split())
    assert main(command(path)) == 3
    assert len(fake.scripts()) == 4
    fake.program("squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    capsys.readouterr()
    assert main(command(path, "--only", "ct-*-s0")) == 3  # it can't be told: better twice than not
    assert "squeue does not answer" in capsys.readouterr().out and len(fake.scripts()) == 5


def test_jobs_of_another_cluster_are_not_this_ones(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    results = tmp_path / "results"
    fake.program("scontrol", "echo 'ClusterName             = there'\n")
    assert main(command(path)) == 3
    records = sorted(p.name for p in (results / "small" / FOLDER).glob("*.json"))
    assert records == ["there-41.json", "there-42.json"]
    assert read_json(results / "small" / FOLDER / "there-41.json")["cluster"] == "there"
    queue = Queue(results / "small")
    for number in (41, 42):  # what this cluster gives next, and what it holds already
        (fake.folder / f"script.{number - 40}").unlink()
    (fake.folder / "queue").write_text("".join(f"41_{i} RUNNING\n" for i in range(4)))
    assert len(Queue(results / "small").held) == 4 and not queue.others
    fake.program("scontrol", "echo 'ClusterName             = here'\n")
    said = "2 arrays of cluster 'there' left out: this is cluster 'here'"
    capsys.readouterr()
    assert main([*command(path), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "6 runs to submit, 0 queued already" in told and said in told
    assert main(command(path)) == 3
    told = capsys.readouterr().out
    assert "6 runs to submit, 0 queued already" in told and said in told
    assert len(list((results / "small" / FOLDER).glob("*-41.json"))) == 2  # none is overwritten
    assert len(Queue(results / "small").held) == 4
    fake.program("scontrol", "exit 1\n")  # whose a record is can't be told, and none is left out
    assert not Queue(results / "small").others
    record = results / "small" / FOLDER / "here-41.json"
    write_json(record, {k: v for k, v in read_json(record).items() if k != "cluster"})
    fake.program("scontrol", "echo 'ClusterName             = here'\n")
    assert len(Queue(results / "small").held) == 4  # one without a name is taken for this one's


def full(*_: object, **__: object) -> None:
    """What writing to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place", ["study.pinned.TemporaryDirectory", "study.pinned.shutil.copyfile",
              "study.pinned.write_json", "study.pinned.os.rename",
              "submitit.core.utils.cloudpickle_dump", "study.cluster.mkdtemp",
              "study.cluster.write_json"],
)  # fmt: skip
def test_a_disk_that_is_full_is_told_and_the_same_command_goes_on(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], place: str
) -> None:  # fmt: skip
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        assert main(command(path)) == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "No space left on device" in told and str(folder) in told
    pinned = place.startswith("study.pinned")
    assert pinned or "array 1 of 3 was not submitted: " in told
    there = [p.name for p in folder.glob("*")] + [p.name for p in folder.glob(".*")]
    assert len(there) == (0 if pinned else 1)  # the copy, or nothing
    assert main(command(path)) == 3
    assert "submitted" in capsys.readouterr().out and len(Queue(folder.parent).job) == 6


def test_a_job_whose_payload_or_record_cannot_be_written_is_taken_back(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    sbatch = (fake.folder / "sbatch").read_text().removeprefix("#!/bin/sh\n")
    fake.program("squeue", f"""case "$*" in
*%o*) echo "40 /else/where/.submission_file_x.sh"; echo "41 $(cat {fake.folder}/given)";;
esac
""")
    fake.program("scancel", f'echo "$@" >> {fake.folder}/cancelled\n')
    for harm in ('rm -r "$(dirname "$1")"', f"mkdir {folder}/41.json"):
        fake.program("sbatch", f'echo "$1" > {fake.folder}/given\n{sbatch}\n{harm}\n')
        assert main(command(path)) == 2
        told = capsys.readouterr().err.replace("\n", " ")
        assert "array 1 of 3 was not submitted" in told and str(folder) in told
        assert sorted(p.name for p in folder.iterdir() if p.is_file() or "jobs" in p.name) == []
        (fake.folder / "script.1").unlink()
    (folder / "41.json").rmdir()
    assert (fake.folder / "cancelled").read_text() == "41\n41\n"
    fake.program("sbatch", sbatch)
    assert main(command(path)) == 3


@pytest.mark.parametrize("name", ["code.json", "study", "torch.py", "sitecustomize.py"])
def test_a_study_file_may_have_any_name(tmp_path: Path, fake: Fake, name: str) -> None:
    """Also one that something else of the copy has, or that Python would import."""
    path = write(tmp_path).rename(tmp_path / name)
    assert main(command(path)) == 3
    folder = tmp_path / "results" / path.stem / FOLDER
    home = folder / next(read_json(p) for p in folder.glob("*.json"))["home"]
    assert sorted(p.name for p in home.iterdir()) == ["code.json", "given", "study"]
    assert load(home / "given" / name).name == path.stem


class Harm:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_pickle_that_waits_under_a_jobs_number_is_not_loaded(tmp_path: Path, fake: Fake) -> None:
    """Slurm may start a job before sbatch has answered, and so before its payload is there."""
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    marker, done = tmp_path / "marker", fake.folder / "done"
    folder.mkdir(parents=True)
    for name in ("41_submitted.pkl", "41_0_submitted.pkl", "41_0_result.pkl"):
        for place in (folder, folder / "jobs-planted"):
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(pickle.dumps(Harm(marker)))
    sbatch = (fake.folder / "sbatch").read_text().removeprefix("#!/bin/sh\n")
    start = f"(SLURM_JOB_ID=41 bash script.1; touch {done}) > {fake.folder}/out 2>&1 &\nsleep 3"
    fake.program("srun", 'shift 3; exec "$@"\n')
    fake.program("sbatch", sbatch.replace("; echo", f"\n{start}\necho"))
    assert main(command(path, "--only", "ct-*-s0")) == 3
    until(done.exists)
    assert not marker.exists(), (fake.folder / "out").read_text()
    store = Store(tmp_path / "results", read(tmp_path))
    assert list(store.states().values()).count("done") == 1, (fake.folder / "out").read_text()
    pickle.loads((folder / "41_submitted.pkl").read_bytes())  # it would have done its harm
    assert marker.exists()


def test_short_runs_share_a_job(tmp_path: Path) -> None:
    study = read(tmp_path, replaced("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4]"))
    runs, queue = list(study.unique.values()), Queue(tmp_path)
    found = arrays(runs, {r.id: 50.0 for r in runs}, 3, 2, queue, ())
    sizes = [[len(job) for job in array.jobs] for array in found]
    assert sizes == [[3, 3], [3, 1], [3], [2]]  # three of 50 s in 3 minutes, two jobs an array
    assert [a.after for a in found] == [(), (), ("array1",), ("array2",)]
    assert sorted(r.id for a in found for job in a.jobs for r in job) == sorted(r.id for r in runs)
    found = arrays(runs, {r.id: 500.0 for r in runs}, 3, 99, queue, ())
    assert [[len(job) for job in array.jobs] for array in found] == [[1] * 10, [1] * 5]


def test_jobs_are_filled_by_the_speed_of_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    words = [str(path), "--results", str(tmp_path / "results")]
    assert main([*words, "--workers", "0", "--only", "ct-*-s0"]) == 0
    folder = next((tmp_path / "results").rglob("ct-small-s0-*"))
    trained = read_json(folder / "trained.json")
    spend = trained["spend"] | {"seconds": 90.0}
    write_json(folder / "trained.json", trained | {"spend": spend})
    capsys.readouterr()
    assert main([*words, "--on", "slurm", "--plan", "--minutes", "6", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "job 0, about 3.7 minutes: edm-s0, edm-s1" in told
    assert "job 1, about 2.8 minutes: ct-small-s1" in told
    assert "is not known: 20 s a measurement assumed" in " ".join(told.split())


def test_measurements_that_nobody_timed_take_their_time_and_wait_for_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    words = [str(path), "--results", str(tmp_path / "results")]
    assert main([*words, "--workers", "0", "--only", "ct-*", "--only", "edm-*"]) == 0
    for i, file in enumerate((tmp_path / "results/small/runs").glob("*/measures/*.json")):
        file.write_text("torn") if i % 2 else file.unlink()
    capsys.readouterr()
    plan = [*words, "--on", "slurm", "--plan", "--minutes", "3", "--device", "cpu"]
    assert main([*plan, "--only", "ct-*"]) == 0  # their sources are none; two of 4 x 20 s fit
    told = " ".join(capsys.readouterr().out.split())
    assert "job 0, about 2.7 minutes: ct-small-s0, ct-small-s1" in told
    assert main([*plan, "--minutes", "2", "--only", "ct-*"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "job 0, about 1.3 minutes: ct-small-s0" in told
    assert "job 1, about 1.3 minutes: ct-small-s1" in told
    assert main(plan) == 0  # cd is to be trained, and edm is only to be measured
    told = capsys.readouterr().out
    assert "array1: " in told and "array2: " not in told and "--dependency" not in told


def test_an_array_waits_only_for_sources_that_are_to_be_trained(tmp_path: Path) -> None:
    runs = list(read(tmp_path).unique.values())
    seconds, queue = {r.id: 1.0 for r in runs}, Queue(tmp_path)
    name = {r.id: f"{r.recipe.name}{r.seed}" for r in runs}
    edm0 = next(r.id for r in runs if name[r.id] == "edm0")

    def found(todo: list, queue: Queue) -> list[tuple[set[str], tuple[str, ...]]]:
        return [({name[r.id] for job in a.jobs for r in job}, a.after)
                for a in arrays(todo, seconds, 0, 99, queue, {edm0})]  # fmt: skip

    first = {"edm0", "edm1", "ct0", "ct1", "cd0"}
    assert found(runs, queue) == [(first, ()), ({"cd1"}, ("array1",))]
    ids = {name[r.id]: r.id for r in runs}
    queue.job = {ids["edm0"]: "7_0", ids["edm1"]: "8"}
    queue.held = dict.fromkeys(queue.job, "RUNNING")  # the one is measured, the other trained
    cd = [r for r in runs if r.recipe.name == "cd"]
    assert found(cd, queue) == [({"cd0"}, ()), ({"cd1"}, ("8",))]


def begun(fake: Fake, decoy: Path) -> subprocess.CompletedProcess:
    """The first job that was submitted, run here, where another checkout is on the path."""
    fake.program("srun", 'shift 3; exec "$@"\n')
    words = ["bash", str(fake.folder / "script.1")]
    return subprocess.run(words, text=True, check=False, stdout=subprocess.PIPE, env={
        **os.environ, "SLURM_JOB_ID": "41", "PYTHONPATH": str(decoy)},
        stderr=subprocess.STDOUT)  # fmt: skip


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A checkout that notes in its file `used` what of it is imported."""
    folder = tmp_path / "decoy"
    shutil.copytree(ROOT / "study", folder / "study")
    for file in folder.rglob("*.py"):
        note = f"open({str(folder / 'used')!r}, 'a').write(__file__ + '\\n')\n"
        text = file.read_text()  # after the line that has to be the first
        file.write_text(text.replace("annotations\n", f"annotations\n{note}", 1)
                        if "annotations\n" in text else note + text)
    return folder


@pytest.mark.parametrize("gone", ["", "study", "study/__init__.py", "study/jobs.py",
                                  "study/train.py", "study/presets.yaml", "given/small.yaml",
                                  "code.json"])  # fmt: skip
def test_a_job_whose_copy_is_not_whole_runs_nothing(
    tmp_path: Path, fake: Fake, decoy: Path, gone: str
) -> None:
    """As where a file system is cleaned of old files while the job waits."""
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    assert main(command(path, "--only", "ct-*-s0")) == 3
    lost = folder / read_json(folder / "41.json")["home"] / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    done = begun(fake, decoy)
    assert done.returncode == 1 and "the copy of the code that this job was" in done.stdout
    assert "the same command makes another" in done.stdout
    assert not (decoy / "used").exists() and "Traceback" not in done.stdout
    assert not (tmp_path / "results/small/runs").exists()


@pytest.mark.parametrize("left", [0, 512, 1024, -1])
def test_a_job_whose_first_file_was_cut_off_ends_with_an_error(
    tmp_path: Path, fake: Fake, decoy: Path, left: int
) -> None:
    """As by a full disk: Python runs an empty file, and one that ends early, without a word."""
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    assert main(command(path, "--only", "ct-*-s0")) == 3
    first = folder / read_json(folder / "41.json")["home"] / "study/sealed.py"
    first.write_bytes(first.read_bytes()[:left])
    done = begun(fake, decoy)
    assert done.returncode == 1 and done.stdout == (
        f"error: {first.parents[1]}: the copy of the code that this job was given is gone or "
        f"damaged; {sealed.AGAIN}\n")  # fmt: skip
    assert not (decoy / "used").exists()


def test_a_copy_that_changed_runs_nothing_and_a_whole_one_is_all_that_runs(
    tmp_path: Path, fake: Fake, decoy: Path
) -> None:
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    assert main(command(path, "--only", "ct-*-s0")) == 3
    more = folder / read_json(folder / "41.json")["home"] / "study/losses.so"
    more.touch()  # Python would load it before losses.py
    done = begun(fake, decoy)
    assert done.returncode == 1 and "were removed, changed or added since" in done.stdout
    more.unlink()
    done = begun(fake, decoy)
    assert done.returncode == 0, done.stdout
    assert not (decoy / "used").exists()
    store = Store(tmp_path / "results", read(tmp_path))
    assert list(store.states().values()).count("done") == 1


def test_what_leaves_the_copy_while_a_job_runs_is_not_found_elsewhere(
    tmp_path: Path, decoy: Path
) -> None:
    """The modules that are imported late. What submitit would call is a script of this test's."""
    home, late = tmp_path / "copy", "study/folder.py"
    pinned.pin(home, write(tmp_path))
    whole = sealed.digest(home)
    (tmp_path / "submitit/core").mkdir(parents=True)
    (tmp_path / "submitit/__init__.py").touch()
    (tmp_path / "submitit/core/__init__.py").touch()
    (tmp_path / "submitit/core/_submit.py").write_text(f"""
import os, sys
import study.cluster, study.extractors.names
there = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "study"]
assert len(there) > 20 and all(f.startswith({str(home)!r}) for f in there), there
os.unlink({str(home / late)!r})
try:
    import study.folder
except ModuleNotFoundError as error:
    print(sys.argv[1], error)
""")
    words = [sys.executable, "-u", str(home / "study/sealed.py"), whole, "-m", "x", "payload"]
    path = os.pathsep.join(map(str, (decoy, tmp_path)))
    done = subprocess.run(words, text=True, capture_output=True, check=False, cwd=tmp_path, env={
        **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    said = f"study.folder: not in {home} any more, the copy of the code that this job was given\n"
    assert done.stdout == f"payload {said}", done.stdout + done.stderr


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the signal handlers that a job changes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
def test_a_run_whose_source_is_not_there_leaves_at_once_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, study = write(tmp_path), read(tmp_path)
    ids = [next(r.id for r in study.runs if r.recipe.name == name) for name in ("cd", "ct")]
    Job()(str(path), [], str(tmp_path / "results"), "cpu", False, ids)
    told = capsys.readouterr().out
    assert "left: cd-small-s0: not trained: edm-s0" in told
    store = Store(tmp_path / "results", study)
    assert [store.folders[i].state(study.unique[i]) for i in ids] == ["pending", "done"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("how", ["failed", "diverged"])
def test_a_job_without_its_source_says_what_can_be_done_and_ends_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path, study = write(tmp_path), read(tmp_path)
    store = Store(tmp_path / "results", study)
    edm, cd = (next(r for r in study.runs if r.recipe.name == name) for name in ("edm", "cd"))
    source = store.folders[edm.id]
    source.path.mkdir(parents=True)
    append_line(source.file("attempts.jsonl"), {"event": "end", "reason": "no luck"})
    if how == "diverged":
        outcome = {"outcome": "diverged", "reason": "at 64 images"}
        write_json(source.file("trained.json"), trained(edm.id, **outcome))
    with pytest.raises(SystemExit, match="error: of 1 run: 1 blocked"):
        Job()(str(path), [], str(tmp_path / "results"), "cpu", False, [cd.id])
    told = capsys.readouterr().out
    then = {"failed": "--retry tries both again", "diverged": "it cannot be made"}
    assert f"left: cd-small-s0: its source edm {how}; {then[how]}\n" in told
    assert "the same command" not in told


@pytest.mark.usefixtures("handlers")
def test_a_jobs_log_says_why_a_run_failed_or_diverged_and_the_others_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TWO_MODES.replace("{score: single_sample}",
                             "{score: single_sample, optimizer: {lr: 1e30}}")  # fmt: skip
    path, study = write(tmp_path, text), read(tmp_path, text)
    store = Store(tmp_path / "results", study)
    names = ("edm", "cd", "ct")
    first, late, wild = (next(r for r in study.runs if r.recipe.name == name) for name in names)
    broken = store.folders[first.id].path
    broken.mkdir(parents=True)
    write_json(broken / "run.json", {"id": "another"})
    with pytest.raises(SystemExit, match="error: of 3 runs: 1 failed, 1 blocked"):
        Job()(str(path), [], str(tmp_path / "results"), "cpu", False,
              [first.id, late.id, wild.id])  # fmt: skip
    told = capsys.readouterr().out
    assert f"  {broken}: run.json belongs to run another\n  log: {broken / 'log.txt'}\n" in told
    line = next(x for x in told.splitlines() if x.startswith("diverged ct-small-s0"))
    after = told.split(line)[1].splitlines()[1]
    assert after == f"  {store.folders[wild.id].trained['reason']}"


@pytest.mark.usefixtures("handlers")
def test_a_job_that_cannot_begin_leaves_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^error: .*gone.yaml: "):
        Job()(str(tmp_path / "gone.yaml"), [], str(tmp_path), "cpu", False, [])


def failing(folder: Path, text: str = TWO_MODES) -> tuple[Path, Store, dict[str, str]]:
    """A study whose ct-s0 failed: file, store, and ids by NAME-sSEED."""
    path = write(folder, text)
    store = Store(folder / "results", read(folder, text))
    ids = {f"{r.recipe.name}-s{r.seed}": r.id for r in store.study.runs}
    place = store.folders[ids["ct-s0"]]
    place.path.mkdir(parents=True)
    append_line(place.file("attempts.jsonl"), {"event": "end", "reason": "no luck", "job": "7"})
    return path, store, ids


def test_a_retry_that_waits_is_queued_until_it_was_tried(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store, ids = failing(tmp_path)
    status = [str(path), "--results", str(tmp_path / "results"), "--only", "ct-*-s0", "--status"]
    place, first = store.folders[ids["ct-s0"]], command(path, "--only", "ct-*-s0")
    assert main(first) == 1 and not fake.scripts()  # failed, and it is not to be tried again
    assert main([*first, "--retry"]) == 1  # submitted, and gone at once
    (fake.folder / "queue").write_text("41 PENDING\n")
    capsys.readouterr()
    assert main(status) == 3
    told = capsys.readouterr().out
    log = store.path / FOLDER / read_json(store.path / FOLDER / "41.json")["folder"]
    assert "1 queued" in told and "failed" not in told
    assert f"job 41: pending, to do: ct-small-s0; log: {log / '41_0_log.out'}" in told
    assert main([*first, "--retry"]) == 3 and len(fake.scripts()) == 1
    append_line(place.file("attempts.jsonl"), {"event": "start", "job": "41"})
    append_line(place.file("attempts.jsonl"), {"event": "end", "reason": "again", "job": "41"})
    assert main(status) == 1  # it failed again, whatever else that job still does
    assert main([*first, "--retry"]) == 1 and len(fake.scripts()) == 2


def test_a_job_that_is_not_to_retry_does_not_keep_a_retry_away(
    tmp_path: Path, fake: Fake
) -> None:
    path, store, ids = failing(tmp_path)
    record = {"time": "2020-01-01T00:00:00Z", "jobs": [[ids["ct-s0"], ids["ct-s1"]]]}
    (store.path / FOLDER).mkdir()
    write_json(store.path / FOLDER / "7.json", record)
    (fake.folder / "queue").write_text("7 RUNNING\n")  # its other run
    assert main(command(path, "--retry", "--only", "ct-*")) == 1
    assert len(fake.scripts()) == 1 and "--array" not in fake.scripts()[0]


def test_a_retry_leaves_out_what_waits_for_a_diverged_source(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store, ids = failing(tmp_path)
    for seed, outcome in (("0", "diverged"), ("1", None)):
        source = store.folders[ids[f"edm-s{seed}"]]
        source.path.mkdir(parents=True)
        append_line(source.file("attempts.jsonl"), {"event": "end", "reason": "no luck"})
        if outcome:
            told = trained(ids[f"edm-s{seed}"], outcome=outcome, reason="at 64 images")
            write_json(source.file("trained.json"), told)
    assert main(command(path, "--retry", "--plan", "--only", "cd-*")) == 0
    told = capsys.readouterr().out
    assert "2 runs to submit" in told and ": edm-s1" in told and ": cd-small-s1" in told
    assert ": cd-small-s0" not in told


def test_variables_of_the_user_do_not_reach_slurm(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = fake.folder / "seen"
    for name in ("sbatch", "squeue", "scontrol"):
        text = (fake.folder / name).read_text().removeprefix("#!/bin/sh\n")
        fake.program(name, f"env | grep -E '^(SBATCH|SCONTROL|SLURM|SQUEUE|SRUN)_' >> {seen}\n"
                     f"{text}")  # fmt: skip
    kept = {"SLURM_CONF": "/x", "SLURM_JWT": "y"}
    told = ("SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "SLURM_CLUSTERS")
    for name in (*told, "SQUEUE_STATES", "SCONTROL_ALL", "SLURM_CPU_BIND", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "1")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert main(command(write(tmp_path), "--only", "ct-*-s0")) == 3
    said = capsys.readouterr().err
    assert said.count("SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SLURM_CLUSTERS of the environment") == 1
    assert set(seen.read_text().splitlines()) == {f"{k}={v}" for k, v in kept.items()}
    assert os.environ["SBATCH_ACCOUNT"] == "1"


def test_status_says_how_a_dead_jobs_log_ends_and_puts_many_jobs_together(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, replaced("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7]"))
    fake.program("scontrol", "echo 'MaxArraySize            = 99'\n")
    assert main(command(path)) == 3
    folder = tmp_path / "results/small" / FOLDER
    (fake.folder / "queue").write_text("".join(f"42_{i} PENDING\n" for i in range(8)))
    place = folder / read_json(folder / "41.json")["folder"]
    for i in range(3):
        (place / f"41_{i}_0_log.out").write_text(
            "python\nerror: no GPU \x1b[31mhere\n\nsrun: error: node1: task 0: Exited with exit "
            "code 1\n")  # fmt: skip
    capsys.readouterr()
    status = [str(path), "--results", str(tmp_path / "results"), "--status"]
    assert main(status) == 3
    told = capsys.readouterr().out
    later = folder / read_json(folder / "42.json")["folder"]
    assert f"16 jobs of 41: gone, not done: 16 runs; log: {place}/41_*_0_log.out\n" in told
    assert "  most end: error: no GPU \\x1b[31mhere\n" in told
    assert f"8 jobs of 42: pending, to do: 8 runs; log: {later}/42_*_0_log.out\n" in told
    (fake.folder / "queue").write_text("".join(f"41_{i} RUNNING\n" for i in range(1, 16)))
    assert main(status) == 3
    told = capsys.readouterr().out
    alone = f"job 41_0: gone, not done: edm-s0; log: {place}/41_0_0_log.out\n  it ends: error: no"
    assert alone in told
    assert main(command(path, "--only", "edm-s0")) == 3
    told = capsys.readouterr().out  # also where it is submitted again
    assert f"1 run to submit, 0 queued already, 0 running\n{alone}" in told


CLOSING = """\
submitit INFO (2026-01-02 03:04:05,678) - Job completed successfully
submitit INFO (2026-01-02 03:04:05,679) - Exiting after successful completion
"""
LEFT = "left: edm-s0: the job is completing; unless Slurm requeues it, give the same command again"
WAITED = "RuntimeError: Waited for 60 seconds but could not find submitted jobs in path:"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"slurmstepd: error: *** JOB 27 ON node1 CANCELLED ***\n{LEFT}\n{CLOSING}", LEFT),
        (f"Traceback:\n  x\n{WAITED}\n/jobs-x/41_submitted.pkl\nsrun: Terminating Step\n",
         f"{WAITED} /jobs-x/41_submitted.pkl"),
        ('  File "a.py", line 3, in f\n    x: list = [i for i in y:\nSyntaxError: invalid\n',
         "SyntaxError: invalid"),
        (f"error: {'x' * 500}; remove it\n", f"error: {'x' * 500}; remove it"),
        (f"left: {'x' * 500}; again\n", f"left: {'x' * 500}; again"),
        (f"ValueError: {'x' * 500}\n", f"ValueError: {'x' * (LETTERS - 12)}…"),
        ("x" * TAIL + "yz\n", f"…{'x' * (LETTERS - 1)}…"),
        ("submitit INFO (2026) - Job has timed out. Ran 9 minutes.\n",
         "submitit INFO (2026) - Job has timed out. Ran 9 minutes."),
        (CLOSING, ""),
    ],
    ids=["cancelled", "two lines", "code", "error", "left", "cut", "torn", "info", "closing"],
)  # fmt: skip
def test_a_log_ends_with_the_last_line_that_says_why(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").write_text(log)
    assert ending(tmp_path / "log") == said


def test_how_several_logs_end_is_said_once_and_a_log_that_is_gone_is_called_so(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, fold = write(tmp_path), tmp_path / "results/small" / FOLDER
    fake.program("scontrol", "echo 'MaxArraySize            = 99'\n")
    status = [str(path), "--results", str(tmp_path / "results"), "--status"]
    assert main(command(path)) == 3
    place, later = (fold / read_json(fold / f"{n}.json")["folder"] for n in (41, 42))
    for i in (0, 2):
        (place / f"41_{i}_0_log.out").write_text("error: no GPU here\n")
    (place / "41_1_0_log.out").write_text("error: another\n")
    capsys.readouterr()
    assert main(status) == 3
    told = capsys.readouterr().out
    first = [f"job 41_{i}: gone, not done: " for i in (0, 2, 1)]
    at = [told.index(line) for line in (first[0], first[1], "  each ends: error: no GPU here\n",
                                        first[2], "  it ends: error: another\n")]  # fmt: skip
    assert at == sorted(at) and told.count("no GPU here") == 1
    never = "(not there: it never began, or its log was removed)"
    assert f"log: {later}/42_1_0_log.out {never}\n" in told and told.count(never) == 3
    shutil.rmtree(place)
    shutil.rmtree(later)
    (fake.folder / "queue").write_text("42_0 PENDING\n42_1 RUNNING\n")
    assert main(status) == 3
    told = capsys.readouterr().out
    assert f"not done: edm-s0; log: gone, as all of {place}\n" in told
    gone = f"log: gone, as all of {later}"
    again = "; it cannot begin: scancel it, and give the same command again"
    assert "job 42_0: pending, to do: " in told and f"{gone}{again}\n" in told
    assert "job 42_1: running, to do: " in told and f"{gone}\n" in told
    assert "_log.out" not in told


def test_speeds_of_a_cpu_say_nothing_of_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    words = [str(path), "--results", str(tmp_path / "results"), "--only", "ct-*"]
    assert main([*words, "--workers", "0", "--only", "ct-*-s0", "--device", "cpu"]) == 0
    shutil.rmtree(next((tmp_path / "results").rglob("ct-small-s1-*")))
    told = {}
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        assert main([*words, "--on", "slurm", "--plan", "--device", device]) == 0
        told[device] = " ".join(capsys.readouterr().out.split())
    unknown = "how long training them takes on a GPU is not known"
    assert "by the speed of 1 finished runs" in told["cpu"] and unknown not in told["cpu"]
    assert unknown in told["cuda"] and "1,000 images a second" in told["cuda"]
    assert "finds out on a GPU" in told["cuda"]


@pytest.mark.usefixtures("handlers")
def test_a_requeued_job_tries_only_what_it_has_not_tried(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two runs that failed before, one failed again before the job was requeued."""
    path, study = write(tmp_path), read(tmp_path)
    store, ids = Store(tmp_path / "results", study), [r.id for r in study.runs if r.seed == 0][:2]
    for i, job in zip(ids, ("7_3", "6_3"), strict=True):
        store.folders[i].path.mkdir(parents=True)
        row = {"event": "end", "reason": "no luck", "job": job}
        append_line(store.folders[i].file("attempts.jsonl"), row)
    for key, value in (("JOB_ID", "9"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{key}", value)
    again = Job().checkpoint(str(path), [], str(tmp_path / "results"), "cpu", True, ids)
    with pytest.raises(SystemExit, match="error: of 2 runs: 1 failed"):
        again.function(*again.args)
    assert [store.folders[i].state(study.unique[i]) for i in ids] == ["failed", "done"]
    rows = read_lines(store.folders[ids[1]].file("attempts.jsonl"))
    assert [r["job"] for r in rows] == ["6_3", "7_3", "7_3"]


def test_a_job_of_an_array_asks_about_itself_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last job of an array has the array's own number, under which squeue lists them all."""
    fake.program("squeue", """case "$*" in
*--jobs=7\\ *) echo RUNNING; echo COMPLETING;;
*--jobs=7_3\\ *) echo RUNNING;;
*--jobs=9\\ *) echo COMPLETING;;
*) exit 1;;
esac
""")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert jobs._state() == "RUNNING"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert jobs._state() == "COMPLETING"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("state", "due"), [("RUNNING", True), ("SIGNALING", True), ("COMPLETING", False)]
)
def test_a_stopped_job_is_requeued_unless_slurm_has_taken_it(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, state: str, due: bool
) -> None:
    """A job is SIGNALING as long as Slurm has not heard that a preemption's SIGTERM arrived."""
    path, study, heard = write(tmp_path), read(tmp_path), []
    fake.program("squeue", f"echo {state}\n")
    for key, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(jobs.Launcher, "run", lambda self, *_, **__: self.stop())
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(state))
    try:
        Job()(str(path), [], str(tmp_path / "results"), "cpu", False, [study.runs[0].id])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [state] * due


def test_jobs_use_a_copy_of_code_and_study_file(tmp_path: Path, fake: Fake) -> None:
    path = write(tmp_path)
    assert main(command(path)) == 3
    record = read_json(tmp_path / "results/small" / FOLDER / "41.json")
    home = tmp_path / "results/small" / FOLDER / record["home"]
    assert (home / "given/small.yaml").read_text() == path.read_text()
    exports = [x for x in fake.scripts()[0].splitlines() if x.startswith("export PYTHON")]
    ask = "import study.pinned as p; print(p.__file__, p.code())"

    def imported() -> str:
        script = "\n".join([*exports, f'"{sys.executable}" -c "{ask}"'])
        return subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=True,
                              cwd=ROOT).stdout.strip()  # fmt: skip

    assert imported() == f"{home}/study/pinned.py {code()}"
    with (home / "study/errors.py").open("a") as file:  # a copy that was edited is not believed
        file.write("# edited\n")
    assert f"'code': '{code()['code']}'" not in imported()
    path.write_text(TWO_MODES.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    assert main(command(path)) == 3
    sent = (home / "given/small.yaml").read_text()
    assert "seeds: [0, 1]\n" in sent  # queued jobs read what was sent


# --- against a real Slurm ---


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Slurm of this machine alone."""
    if why := slurm.lacking():
        pytest.skip(f"no Slurm to test against: {why}")
    folder = tmp_path_factory.mktemp("slurm")
    with slurm.cluster(folder):
        yield folder


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Waits until condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, slurm.asked("squeue")
        time.sleep(0.02)


@dataclass
class Held:
    """A run that was stopped in its middle by SIGSTOP, and its job."""

    folder: Folder
    job: str
    pid: int

    def rows(self) -> list[dict]:
        return read_lines(self.folder.file("attempts.jsonl"))

    def log(self) -> str:
        return Queue(self.folder.path.parents[1]).logs[self.job].read_text()

    def warned(self) -> bool:
        """Whether SIGUSR2 waits for the process to go on, or it had it already."""
        if len(self.rows()) > 1:  # as where Slurm itself sent SIGCONT first
            return True
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except FileNotFoundError:  # it has just ended
            return len(self.rows()) > 1
        masks = [line.split()[1] for line in status.splitlines() if "Pnd:" in line]
        return any(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1 for mask in masks)


def hold(stores: list[Store], names: set[str]) -> dict[str, Held]:
    """Stops each of the runs STUDY/NAME-sSEED as soon as it has made some steps."""
    left, held = {}, {}
    for store in stores:
        for r in store.study.unique.values():
            left[f"{store.study.name}/{r.recipe.name}-s{r.seed}"] = (store, r.id)
    left = {name: left[name] for name in names}

    def look() -> bool:
        for name, (store, i) in list(left.items()):
            if store.folders[i].progress():
                pid = read_lines(store.folders[i].file("attempts.jsonl"))[-1]["pid"]
                os.kill(pid, signal.SIGSTOP)
                held[name] = Held(store.folders[i], Queue(store.path).job[i], pid)
                del left[name]
        return not left

    until(look)
    return held


def empty() -> bool:
    """Whether Slurm says that it holds no job; no answer is no such word."""
    done = subprocess.run(["squeue", "--noheader"], capture_output=True, check=False)
    return done.returncode == 0 and not done.stdout.strip()


def cli(path: Path, where: Path, *words: str) -> subprocess.CompletedProcess:
    """The command as a user gives it in a checkout."""
    python = [sys.executable, "-m", "study.run", *command(path), *words]
    return subprocess.run(python, cwd=where, text=True, capture_output=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(where)})  # fmt: skip


def test_a_storm_changes_no_bit(real: Path, tmp_path: Path) -> None:
    """One job is requeued in mid-run, one killed, one cancelled, one comes to its time limit; the
    code is edited meanwhile, and the study submitted again. Afterwards all is as a local run."""
    path = write(tmp_path, LONG)
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "study", checkout / "study")
    done = cli(path, checkout)
    assert done.returncode == 3 and "submitted" in done.stdout, done.stdout + done.stderr
    for file in (checkout / "study").glob("*.py"):
        file.write_text("raise SystemExit('edited')\n")
    store = Store(tmp_path / "results", read(tmp_path, LONG))
    names = [f"small/{name}" for name in ("edm-s0", "ct-s0", "edm-s1", "ct-s1")]
    held = hold([store], set(names))
    requeued, killed, cancelled, late = (held[name] for name in names)
    again = cli(path, ROOT)
    assert "0 runs to submit, 2 queued already, 4 running" in again.stdout, again.stdout
    limit = ["scontrol", "update", f"JobId={late.job}"]
    subprocess.run([*limit, "TimeLimit=1"], check=True)
    subprocess.run(["scontrol", "requeue", requeued.job], check=True)  # SIGCONT, then SIGTERM
    os.kill(killed.pid, signal.SIGKILL)
    subprocess.run(["scancel", cancelled.job], check=True)
    until(late.warned)
    with contextlib.suppress(ProcessLookupError):
        os.kill(late.pid, signal.SIGCONT)
    until(lambda: len(late.rows()) > 1)
    until(lambda: subprocess.run([*limit, "TimeLimit=240"], check=False).returncode == 0)
    until(empty)
    assert REQUEUES in late.log() and REQUEUES not in requeued.log()
    assert [r.get("reason") for r in requeued.rows()] == [None, "stopped", None, "done"]
    reasons = [r.get("reason") for r in late.rows()]  # on a busy machine it may be warned again
    assert reasons[:2] == [None, "stopped"] and reasons[-1] == "done" and None not in reasons[1::2]
    assert [r.get("reason") for r in cancelled.rows()] == [None, "stopped"]
    assert [r["event"] for r in killed.rows()] == ["start"]
    assert "CANCELLED" in cancelled.log()
    assert ending(Queue(store.path).logs[cancelled.job]).startswith("left: edm-s1: the job is ")
    left = {store.study.unique[i].folder.rpartition("-")[0]: s
            for i, s in store.states().items() if s != "done"}  # fmt: skip
    assert left == {"ct-small-s0": "interrupted", "edm-s1": "interrupted",
                    "cd-small-s1": "pending"}  # fmt: skip

    again = cli(path, ROOT)
    assert "submitted" in again.stdout, again.stderr
    until(empty)
    assert set(store.states().values()) == {"done"}
    starts = [r for f in store.folders.values()
              for r in read_lines(f.file("attempts.jsonl")) if r["event"] == "start"]  # fmt: skip
    assert len(starts) == 6 + 3 + len(reasons) // 2 - 1
    assert {r["code"] for r in starts} == {code()["code"]}
    local = tmp_path / "local"
    assert main([str(path), "--results", str(local), "--workers", "2"]) == 0
    assert content(tmp_path / "results") == content(local)


def test_two_studies_at_once_are_preempted_and_end_as_alone(real: Path, tmp_path: Path) -> None:
    paths = {n: write(tmp_path, LONG.replace("[0, 1]", "[0]"), n) for n in ("small", "other")}
    for path in paths.values():
        done = cli(path, ROOT, "--minutes", "30")  # the runs of one depth share a job
        assert done.returncode == 3 and "1 job, 2 runs" in done.stdout, done.stdout + done.stderr
    stores = {n: Store(tmp_path / "results", load(p)) for n, p in paths.items()}
    held = hold(list(stores.values()), {f"{name}/edm-s0" for name in stores})
    urgent = ["sbatch", "--partition=urgent", "--ntasks=4", "--output=/dev/null", "--wrap=true"]
    subprocess.run(urgent, check=True, stdout=subprocess.DEVNULL)
    for run in held.values():
        until(lambda run=run: run.rows()[-1].get("reason") == "stopped")  # SIGCONT, then SIGTERM
    until(empty)
    for name, store in stores.items():  # within the time of grace, so nothing had to be killed
        assert REQUEUES in held[f"{name}/edm-s0"].log()
        assert set(store.states().values()) == {"done"}
    found = content(tmp_path / "results", "other")
    found = {name.replace("-other-", "-small-"): value for name, value in found.items()}
    assert found == content(tmp_path / "results")
    assert main([str(paths["small"]), "--results", str(tmp_path / "local"), "--workers", "2"]) == 0
    assert content(tmp_path / "results") == content(tmp_path / "local")


def test_sbatch_itself_says_what_it_refuses(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(write(tmp_path), "--slurm", "partition=nowhere")) == 2
    told = capsys.readouterr().err.lower()
    assert told.count("invalid partition specified") == 1 and "the same command" not in told
    words = ["--device", "auto", "--only", "ct-*-s0"]
    assert main(command(tmp_path / "small.yaml", *words)) == 2
    assert "a job asks for a GPU unless --device cpu is given" in capsys.readouterr().err
    assert not list((tmp_path / "results/small" / FOLDER).glob("*.json"))


def test_failures_are_slurms_too_and_a_retry_waits_in_the_queue(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job of two runs, one of which fails, and its retry, whatever the user's variables."""
    path, study = write(tmp_path), read(tmp_path)
    store = Store(tmp_path / "results", study)
    bad, good = (store.folders[r.id] for r in study.runs if r.recipe.name == "ct")
    bad.path.mkdir(parents=True)
    write_json(bad.file("run.json"), {"id": "another"})
    only = command(path, "--only", "ct-*", "--minutes", "30")
    assert main(only) == 3
    until(empty)
    ran = next(r.id for r in study.runs if r.recipe.name == "ct")
    first = Queue(store.path).job[ran]
    told = slurm.asked("scontrol", "show", "job", first)
    assert "JobState=FAILED" in told and "ExitCode=1:0" in told and "Restarts=0" in told
    assert good.trained and {r["job"] for r in read_lines(good.file("attempts.jsonl"))} == {first}
    log = Queue(store.path).logs[first].read_text()
    assert "run.json belongs to run another" in log and "error: of 2 runs: 1 failed" in log
    assert "Traceback" not in log
    bad.file("run.json").unlink()
    capsys.readouterr()
    assert main([*only, "--status"]) == 1
    held = ["--retry", "--slurm", "additional_parameters={hold: true}"]
    theirs = {"SQUEUE_STATES": "RUNNING", "SQUEUE_PARTITION": "urgent", "SBATCH_NO_REQUEUE": "1",
              "SBATCH_TIMELIMIT": "7", "SBATCH_PARTITION": "urgent"}  # fmt: skip
    with monkeypatch.context() as patch:
        for key, value in theirs.items():
            patch.setenv(key, value)
        assert main([*only, *held]) == 3
        told = " ".join(capsys.readouterr().out.split())
        assert "1 run to submit" in told and "1 queued" in told and "pending, to do: ct" in told
        assert main([*only, *held]) == 3
        assert "0 runs to submit, 1 queued already" in capsys.readouterr().out
    second = Queue(store.path).job[ran]
    told = slurm.asked("scontrol", "show", "job", second)
    for word in ("Requeue=1", "TimeLimit=04:00:00", "Partition=main"):
        assert word in told, told
    subprocess.run(["scontrol", "release", second], check=True)
    until(empty)
    assert main([*only, "--status"]) == 0
    assert [r["job"] for r in read_lines(bad.file("attempts.jsonl"))] == [first, second, second]


def test_a_job_that_lost_what_it_needs_while_it_waited_failed(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    folder, status = tmp_path / "results/small" / FOLDER, [str(path), "--status", "--results"]
    held = ["--slurm", "additional_parameters={hold: true}"]
    for name, said, all_memory in (("", "log: gone, as all of ", "mem=0"),
                                   ("study/sealed.py", "it ends: error: ", "mem_per_cpu=0")):
        assert main(command(path, "--only", "ct-*-s0", *held, "--slurm", all_memory)) == 3
        record = next(p for p in folder.glob("*.json"))
        number, told = record.stem.rpartition("-")[2], read_json(record)
        place = folder / told["folder"]
        (folder / told["home"] / name).write_text("") if name else shutil.rmtree(place)
        subprocess.run(["scontrol", "release", number], check=True)
        until(empty)
        job = slurm.asked("scontrol", "show", "job", number)
        assert "JobState=FAILED" in job and ("ExitCode=1:0" in job or not name), job
        assert "mem=4000M" in job, job  # the node's
        capsys.readouterr()
        assert main([*status, str(tmp_path / "results")]) == 3
        assert said in capsys.readouterr().out
        record.unlink()


def test_what_slurm_took_and_nothing_records_is_taken_back(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "write_json", full)
        assert main(command(path)) == 2
    assert "array 1 of 2 was not submitted" in capsys.readouterr().err.replace("\n", " ")
    until(empty)
    assert len(list(folder.iterdir())) == 1  # the copy of the code
    store = Store(tmp_path / "results", read(tmp_path))
    assert "done" not in store.states().values()
    assert main(command(path, "--only", "ct-*-s0")) == 3
    until(empty)
    assert list(store.states().values()).count("done") == 1
    assert [p.name.split("-")[0] for p in folder.glob("*.json")] == ["test"]  # the cluster's name


def test_a_copy_that_somebody_edited_is_not_given_to_jobs(tmp_path: Path) -> None:
    study = write(tmp_path)
    home = tmp_path / "copy"
    pinned.pin(home, study)
    pinned.pin(home, study)
    for change in (
        lambda: (home / "study" / "run.py").write_text("1"),
        lambda: (home / "study" / "more.so").write_bytes(b"x"),
        lambda: (home / "sitecustomize.py").write_text("1"),
        lambda: (home / "study" / "__init__.py").unlink(),
        lambda: (home / "given" / study.name).write_text("question: another"),
        lambda: (home / "study" / "link").symlink_to(tmp_path),
    ):
        shutil.rmtree(home)
        pinned.pin(home, study)
        change()
        with pytest.raises(StudyError, match="not the copy that was made for jobs; remove it"):
            pinned.pin(home, study)


def test_whoever_looks_at_the_copy_adds_no_bytecode_to_it(tmp_path: Path) -> None:
    home, study = tmp_path / "copy", write(tmp_path)
    pinned.pin(home, study)
    whole = sealed.digest(home)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    code = ("import sys, study.queued, study.extractors.names as n; "
            "print(sys.dont_write_bytecode, n.__file__)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, check=True,
                          capture_output=True, env=env | {"PYTHONPATH": str(home)})  # fmt: skip
    assert done.stdout == f"False {home}/study/extractors/names.py\n" and not done.stderr
    assert sealed.digest(home) == whole
    pinned.pin(home, study)  # still what is given to jobs
    (home / "study" / "__pycache__").unlink()
    with pytest.raises(StudyError, match="not the copy that was made for jobs"):
        pinned.pin(home, study)


def test_the_codes_digest_is_of_the_packages_files_alone(tmp_path: Path) -> None:
    for name in "a.py", "b/c.yaml", "b/c.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    before = pinned.digest(tmp_path), sealed.digest(tmp_path)
    (tmp_path / "b/c.txt").write_text("y")
    assert pinned.digest(tmp_path) == before[0] and sealed.digest(tmp_path) != before[1]
    (tmp_path / "b/c.yaml").write_text("y")
    assert pinned.digest(tmp_path) != before[0]


def test_a_damaged_record_says_what_may_still_be_queued(tmp_path: Path, fake: Fake) -> None:
    path, folder = write(tmp_path), tmp_path / "results/small" / FOLDER
    assert main(command(path)) == 3
    (folder / "41.json").write_text('{"time": ')
    with pytest.raises(StudyError, match="41.json: cannot be read") as error:
        Queue(folder.parent)
    assert "`squeue -j 41`" in str(error.value) and "then remove the file" in str(error.value)
    assert "made again" not in str(error.value)  # nothing does
    (folder / "41.json").unlink()
    assert not Queue(folder.parent).held


def test_what_squeue_says_beside_its_jobs_is_no_job(tmp_path: Path, fake: Fake) -> None:
    assert main(command(write(tmp_path))) == 3
    (fake.folder / "queue").write_text(
        "41_0 PENDING\nNotice: maintenance on Friday\n\nNotice\n41_1 RUNNING \n")
    assert sorted(Queue(tmp_path / "results/small").held.values()) == ["PENDING", "RUNNING"]


@pytest.mark.parametrize(("given", "said"), [
    ("n: 4", "n: sbatch gets --n, which is no option; give the option's long name"),
    ("N: 2", "N: sbatch gets --N"), ("nod: 2", "nod: --on slurm stands on"),
    *((f"{key}: 1", f"{key}: --on slurm stands on") for key in (
        "dependency", "time", "ntasks_per_node", "chdir", "signal", "clusters")),
    ("no_requeue: true", "no_requeue: --on slurm stands on"),
    ("requeue: false", "requeue: sbatch would get it as --requeue=False; allowed: a value, or"),
    ("hold: null", "hold: sbatch would get it as --hold=None")])  # fmt: skip
def test_what_sbatch_must_not_get_is_refused_by_name(given: str, said: str) -> None:
    with pytest.raises(StudyError, match=f"additional_parameters: {said}"):
        parameters([f"additional_parameters={{{given}}}"], "cpu", "mine")


def test_other_options_of_sbatch_pass() -> None:
    given = {"requeue": True, "hold": True, "mail-user": "me", "time-min": 30, "nice": 0}
    for key, value in given.items():
        said = parameters([f"additional_parameters={{{key}: {str(value).lower()}}}"], "cpu", "x")
        assert said["additional_parameters"] == {"requeue": True, key: value}


def test_code_that_changes_while_it_is_copied_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "code", lambda: {"code": "what was imported"})
    with pytest.raises(StudyError, match="changed while it was copied"):
        pinned.pin(tmp_path / "copy", write(tmp_path))
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".pinned*"))
