"""NVIDIA's MPS is started where runs share a GPU, ends with the launcher, and is never in the way.

The daemon is a script that notes how it is called; everything else is as on a machine with a GPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from studies import write

from study import sharing
from study.sharing import CONTROL, LOGS, PIPES

ROOT = Path(__file__).parents[1]
DAEMON = """\
#!/bin/sh
told=$*$([ $# = 0 ] && cat)
echo "$told $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY ${CUDA_VISIBLE_DEVICES-all}" >>CALLS
"""
BODY = """
import os, sys, time
from study.sharing import sharing
with sharing(["cuda:0", "cuda:0", "cuda:1"], print):
    print("inside", os.environ.get("CUDA_MPS_PIPE_DIRECTORY"), flush=True)
    time.sleep(float(sys.argv[1]))
print("after", os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))
"""


class Machine:
    """A PATH that begins with the daemon, and what it was called with."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.log, self.file = folder / "calls", folder / "bin" / CONTROL
        self.file.parent.mkdir()
        patch.setenv("PATH", f"{self.file.parent}{os.pathsep}{os.environ['PATH']}")
        patch.delenv(PIPES, raising=False)
        patch.delenv(LOGS, raising=False)
        patch.setattr(sharing, "USUAL", folder / "usual")
        self.is_a()

    def is_a(self, more: str = "") -> None:
        self.file.write_text(DAEMON.replace("CALLS", str(self.log)) + more)
        self.file.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """[what it was told, pipes, logs, visible GPUs] of each call."""
        return [line.split() for line in self.log.read_text().splitlines()
                ] if self.log.exists() else []  # fmt: skip

    def told(self) -> list[str]:
        return [call[0] for call in self.calls()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if not sharing.refusal(sharing.USUAL):
        pytest.skip("a daemon is in use here")
    return Machine(tmp_path, monkeypatch)


def started(seconds: float) -> subprocess.Popen[str]:
    """Another process that shares a GPU for so long."""
    return subprocess.Popen([sys.executable, "-c", BODY, str(seconds)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE)  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_one_daemon_sees_all_gpus_and_ends_with_the_block(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv(LOGS, "elsewhere")
    before, said = dict(os.environ), []
    with sharing.sharing(["cuda:0", "cuda:1", "cuda:0"], said.append):
        folder = os.environ[PIPES]
        assert machine.calls() == [["-d", folder, folder, "all"]]
        assert os.environ[LOGS] == folder and os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
        assert Path(folder).stat().st_mode & 0o77 == 0 and len(folder) < 40
    assert machine.calls() == [["-d", folder, folder, "all"], ["quit", folder, folder, "all"]]
    assert not Path(folder).exists() and dict(os.environ) == before and not said


def test_it_ends_and_the_environment_is_restored_where_the_launcher_fails(
    machine: Machine,
) -> None:
    with pytest.raises(ZeroDivisionError), sharing.sharing(["cuda:0"] * 2, print):
        raise ZeroDivisionError
    assert machine.told() == ["-d", "quit"] and PIPES not in os.environ


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:1"], ["cpu"] * 4, []])
def test_nothing_is_started_where_nothing_is_shared(machine: Machine, devices: list[str]) -> None:
    said = []
    for _ in "with it", "without it":
        with sharing.sharing(devices, said.append):
            assert PIPES not in os.environ
        machine.file.unlink(missing_ok=True)
    assert not machine.calls() and not said


def listening(folder: Path) -> socket.socket:
    """Another's daemon, as far as a program that knocks can tell; its socket is of this kind."""
    folder.mkdir(exist_ok=True)
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon.bind(str(folder / "control"))
    daemon.listen(0)
    return daemon


def test_a_daemon_in_use_is_left_to_its_owner(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = []
    with listening(sharing.USUAL):
        for _ in range(3):  # a line of one place: the later ones find it full
            with sharing.sharing(["cuda:0"] * 2, said.append):
                assert PIPES not in os.environ
    theirs = str(tmp_path / "theirs")
    monkeypatch.setenv(PIPES, theirs)
    with listening(Path(theirs)), sharing.sharing(["cuda:0"] * 2, said.append):
        assert os.environ[PIPES] == theirs
    assert os.environ[PIPES] == theirs and not machine.calls() and not said


def test_what_a_killed_daemon_left_is_not_taken_for_one(machine: Machine) -> None:
    said = []
    for leave in (lambda at: listening(at.parent).close(), os.mkfifo, Path.touch):
        sharing.USUAL.mkdir(exist_ok=True)
        leave(sharing.USUAL / "control")
        with sharing.sharing(["cuda:0"] * 2, said.append):
            assert machine.calls()[-1][:2] == ["-d", os.environ[PIPES]]
        (sharing.USUAL / "control").unlink()
    assert machine.told() == ["-d", "quit"] * 3 and not said


def test_an_address_of_nobody_is_told_of_and_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listening(tmp_path / "stale").close()
    said = []
    for name, why in (("stale", "Connection refused"), ("nowhere", "No such file or directory"),
                      ("long" * 40, "AF_UNIX path too long")):  # fmt: skip
        monkeypatch.setenv(PIPES, str(tmp_path / name))
        with sharing.sharing(["cuda:0"] * 2, said.append):
            assert os.environ[PIPES] == str(tmp_path / name)
        assert said.pop() == (f"2 runs take turns on a GPU: no daemon to use at {PIPES}="
                              f"{tmp_path / name}: {why}")  # fmt: skip
    assert not machine.calls() and not said


def test_a_closed_folder_of_another_user_is_no_daemon(tmp_path: Path) -> None:
    """In a process of its own, which stops being root, as no folder is closed to that."""
    (tmp_path / "closed").mkdir(0)
    body = """
import os, sys
from pathlib import Path
from study import sharing
sharing.USUAL = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
for variable in {}, {sharing.PIPES: sys.argv[1]}:
    os.environ.update(variable)
    with sharing.sharing(["cuda:0"] * 2, print):
        print("inside")
"""
    seen = {k: v for k, v in os.environ.items() if k not in (PIPES, "PATH")} | {"PATH": "/nowhere"}
    words = [sys.executable, "-c", body, str(tmp_path / "closed")]
    done = subprocess.run(words, cwd=ROOT, env=seen, text=True, capture_output=True, check=False)
    lines = done.stdout.splitlines()
    assert not done.stderr and lines[1::2] == ["inside"] * 2
    assert f"a GPU: no {CONTROL} on PATH" in lines[0] and lines[2].endswith(": Permission denied")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*Popen:Warning")
def test_a_daemon_that_fails_or_hangs_is_told_of_in_one_line(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "START", 0.5)
    said = []
    for more, left in (("echo no permission >&2; echo more; exit 1", ["-d"]), ("exit 3", ["-d"]),
                       ("[ $# = 0 ] || sleep 2", ["-d", "quit"])):  # fmt: skip
        machine.is_a(more)
        with sharing.sharing(["cuda:0"] * 3, said.append):
            assert PIPES not in os.environ
        wait_for(lambda left=left: machine.told() == left)  # one that is late isn't left behind
        machine.log.unlink()
    machine.file.unlink()
    with sharing.sharing(["cuda:0"] * 3, said.append):
        pass
    machine.is_a()
    with sharing.sharing(["cuda:0"] * 49, said.append):
        pass
    assert not machine.calls()
    begin = f"3 runs take turns on a GPU: {CONTROL} -d "
    assert said[:3] == [f"{begin}failed: no permission", f"{begin}failed",
                        f"{begin}did not return within 0 seconds"]  # fmt: skip
    assert f"a GPU: no {CONTROL} on PATH" in said[3] and "compute at once" in said[3]
    assert said[4].startswith("49 runs take turns") and "48 at most" in said[4]


@pytest.mark.skipif(not shutil.which("cc"), reason="the driver that refuses has to be compiled")
def test_a_server_that_takes_no_clients_is_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's answer is made up: a library of that name that refuses, as the driver does
    where the daemon is up and its server is not."""
    library = machine.file.parent / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"], text=True,
                   input="int cuInit(unsigned flags) { return 805; }", check=True)  # fmt: skip
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    said = []
    with sharing.sharing(["cuda:0"] * 2, said.append):
        assert PIPES not in os.environ
    assert said == ["2 runs take turns on a GPU: the MPS server does not take clients: "
                    "CUDA error 805 under MPS"]  # fmt: skip
    assert machine.told() == ["-d", "quit"]


def test_the_daemon_ends_when_the_launcher_is_killed(machine: Machine) -> None:
    with started(60) as process:
        folder = Path(process.stdout.readline().split()[1])
        process.kill()
    wait_for(lambda: machine.told() == ["-d", "quit"] and not folder.exists())


def test_also_when_it_is_killed_while_the_daemon_starts(machine: Machine) -> None:
    machine.is_a("[ $# = 0 ] || sleep 1")
    with started(60) as process:
        wait_for(machine.told)
        process.kill()
    wait_for(lambda: machine.told() == ["-d", "quit"])


def test_ctrl_c_is_the_launchers(machine: Machine) -> None:
    """A terminal sends it to the whole group; the daemon lives until the launcher is done."""
    handler = "import signal; signal.signal(2, lambda *_: print('saving', flush=True))"
    words = [sys.executable, "-c", handler + BODY, "3"]
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          start_new_session=True) as process:  # fmt: skip
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.5)
        assert machine.told() == ["-d"]
        assert process.stdout.read() == "after None\n"
    assert machine.told() == ["-d", "quit"]


SLOW_DRIVER = "#include <unistd.h>\nint cuInit(unsigned flags) { return sleep(50); }"


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("hangs", ["daemon", "server"])
def test_ctrl_c_is_not_kept_waiting_by_a_start_that_hangs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, hangs: str, raises: bool
) -> None:
    """Neither where it is only taken note of, as by the launcher, nor where it is an exception."""
    if hangs == "daemon":
        machine.is_a("[ $# = 0 ] || sleep 6")
    elif not shutil.which("cc"):
        pytest.skip("the driver that hangs has to be compiled")
    else:
        library = machine.file.parent / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"], text=True,
                       input=SLOW_DRIVER, check=True)  # fmt: skip
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    handler = "import signal; signal.signal(2, lambda *_: print('noted', flush=True))\n"
    words = [sys.executable, "-c", ("" if raises else handler) + BODY, "0"]
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        wait_for(machine.told)
        time.sleep(1)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
        assert time.monotonic() - start < 3
    what = f"{CONTROL} -d did not return" if hangs == "daemon" else "the MPS server did not start"
    assert out.splitlines() == ([] if raises else [
        "noted", f"2 runs take turns on a GPU: {what} before a signal came", "inside None",
        "after None"])  # fmt: skip
    assert ("KeyboardInterrupt" in error) == raises
    wait_for(lambda: machine.told() == ["-d", "quit"])


def test_a_second_ctrl_c_ends_the_wait_for_the_daemons_end(machine: Machine) -> None:
    machine.is_a("[ $# = 1 ] || sleep 6")
    handler = "import signal; signal.signal(2, lambda *_: print('noted', flush=True))\n"
    with subprocess.Popen([sys.executable, "-c", handler + BODY, "0"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        folder = Path(process.stdout.readline().split()[1])
        wait_for(lambda: machine.told() == ["-d", "quit"])
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "noted\nafter None\n"
        assert time.monotonic() - start < 3 and folder.exists()
    wait_for(lambda: not folder.exists())  # also without the launcher


@pytest.mark.filterwarnings("ignore:Exception ignored in.*Popen:Warning")
def test_a_quit_that_waits_for_clients_holds_nobody_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "STOP", 0.2)
    machine.is_a("[ $# = 1 ] || sleep 2")
    start = time.monotonic()
    with sharing.sharing(["cuda:0"] * 2, print):
        folder = Path(os.environ[PIPES])
    assert time.monotonic() - start < 1.9 and folder.exists()
    wait_for(lambda: not folder.exists())


def inherited(pids: Path = Path("/proc")) -> dict[str, str]:
    """The address of the daemon in each fork server's environment, by its launcher's pid."""
    found = {}
    for place in pids.glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if b"multiprocessing.forkserver" in words:
            found[parent] = next((v.decode().partition("=")[2] for v in variables
                                  if v.startswith(PIPES.encode())), "")  # fmt: skip
    return found


@pytest.mark.parametrize(("workers", "number"), [(2, 0), (2, signal.SIGKILL),
                                                 (2, signal.SIGTERM), (1, 0)])  # fmt: skip
def test_the_launchers_workers_are_clients(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: int
) -> None:
    """Where there is no GPU the runs fail, each in a process of its own, and say so."""
    if number == signal.SIGTERM:  # a daemon that takes its time, which the launcher waits for
        machine.is_a("[ $# = 1 ] || sleep 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    words = [sys.executable, "-m", "study.run", str(write(tmp_path)), "--device", "cuda",
             "--results", str(tmp_path / "results"), "--workers", str(workers)]  # fmt: skip
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        wait_for(lambda: str(process.pid) in inherited())
        assert [inherited()[str(process.pid)]] == ([c[1] for c in machine.calls()] or [""])
        if number:
            process.send_signal(number)
        if number != signal.SIGKILL:
            out, _ = process.communicate(timeout=240)
            assert "6 runs to work on" in out and "take turns" not in out
            if workers > 1:
                assert machine.told() == ["-d", "quit"]
                assert not Path(machine.calls()[0][1]).exists()
    wait_for(lambda: machine.told() == (["-d", "quit"] if workers > 1 else []))
