"""Runs that share a GPU compute at the same time, through NVIDIA's multi-process service (MPS).

Processes of their own take turns on a GPU, so that sixteen small runs do no more than one; as
clients of one MPS server their kernels run side by side, each in its own address space, and what
a run computes is the same. The service is one daemon, which is started where it is installed and
nobody runs one, and ends with the launcher, however that dies.

The risk: a fatal fault of one process (an illegal access; being killed amid a kernel may do it)
ends all that share its GPU. They go on from their last state at the next command with --retry.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from study.errors import StudyError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
TEMPORARY = "/tmp"  # not TMPDIR, which may be longer than the path of a socket can be
USUAL = Path(TEMPORARY, "nvidia-mps")  # where a daemon is that was started without PIPES
MOST = 48  # clients of one GPU; 60 since CUDA 13.1
START, TRY, STOP = 10.0, 60.0, 10.0  # seconds that the daemon may take; TRY starts its server
GIVE_UP, POLL = 1.0, 0.05  # seconds for the end of one that never was of use; between looks

# The launcher alone holds the other end of stdin, so its death, of whatever cause, ends `cat`.
# `quit` returns once the clients are gone: workers that outlive the launcher finish first.
WATCH = f"""
trap '' PIPE
trap 'rm -rf "${PIPES}"' EXIT
{CONTROL} -d </dev/null >"${PIPES}/said" 2>&1 || {{ cat "${PIPES}/said"; exit 1; }}
echo up
cat >/dev/null
echo quit | {CONTROL} >/dev/null
"""

# Where a daemon is up whose server does not start, every program that uses CUDA fails.
CLIENT = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit()  # no driver: the workers will say so themselves
if status := cuda.cuInit(0):
    sys.exit(f"CUDA error {status} under MPS")
"""


@contextmanager
def sharing(devices: Sequence[str], say: Callable[[str], None]) -> Iterator[None]:
    """Lets processes started meanwhile share GPUs, where `devices` (one per worker) names a GPU
    more than once. They inherit the daemon's address from os.environ, so a fork server has to
    start inside. A daemon that answers already is left to its owner. Where there can be none,
    `say` is told why. A signal while one starts or ends ends the wait for it, once its handler
    has run. In the main thread only."""
    most = max(Counter(d for d in devices if d.startswith("cuda")).values(), default=0)
    with ExitStack() as ends:
        if most > 1:
            try:
                if named := os.environ.get(PIPES):  # theirs: no other is put in its place
                    if why := refusal(Path(named)):
                        raise StudyError(f"no daemon to use at {PIPES}={named}: {why}")
                elif refusal(USUAL):  # what a killed one left there, too: PIPES comes before it
                    ends.enter_context(_daemon(most))
            except (OSError, StudyError) as error:
                say(f"{most} runs take turns on a GPU: {error}")
        yield


def refusal(folder: Path) -> str:
    """Why this process can't be a client of a daemon there, or "". It knocks as libcuda does: the
    socket of a daemon that was killed stays, and refuses; another user's may be closed to us."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.setblocking(False)
        try:
            door.connect(str(folder / "control"))
        except BlockingIOError:  # others stand in line
            return ""
        except OSError as error:  # a path too long for a socket has no strerror
            return error.strerror or str(error)
    return ""


@contextmanager
def _daemon(clients: int) -> Iterator[None]:
    """A daemon of our own, named in os.environ. Raises StudyError saying why there is none."""
    if not shutil.which(CONTROL):
        raise StudyError(f"no {CONTROL} on PATH; with it, a part of NVIDIA's driver, they would "
                         "compute at once")  # fmt: skip
    if clients > MOST:
        raise StudyError(f"MPS lets {MOST} at most compute at once; use fewer --workers")
    folder = tempfile.mkdtemp(prefix="mps-", dir=TEMPORARY)
    ours = {PIPES: folder, LOGS: folder}
    # What the daemon's CUDA_VISIBLE_DEVICES selects is numbered anew for its clients, and theirs
    # would then select among these: "2,3" on both sides names GPUs that aren't there. So the
    # daemon sees all, and each client what it would see without it.
    seen = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    # A session of its own, since Ctrl-C ends the launcher only after the workers have saved.
    watch = subprocess.Popen(
        ["sh", "-c", WATCH], env=seen | ours, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    before = {name: value for name, value in os.environ.items() if name in ours}
    patience = GIVE_UP
    try:
        with _signals() as signals:
            _wait(watch, signals)
            os.environ.update(ours)
            _try(signals)
        patience = STOP
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
        os.environ.update(before)
        watch.stdin.close()
        watch.stdout.close()
        with _signals() as signals:  # what is late goes on by itself, until it is done
            _until(lambda: watch.poll() is not None, signals, patience)


@contextmanager
def _signals() -> Iterator[int]:
    """A file descriptor that can be read once a signal came that Python handles. Handlers of the
    launcher's only take note, so a wait would not end by them."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told)
    try:
        yield heard
    finally:
        signal.set_wakeup_fd(before)
        os.close(heard)
        os.close(told)


def _until(done: Callable[[], object], signals: int, seconds: float) -> str:
    """Waits until `done`. Returns "", or the end of a sentence that says it did not happen."""
    end = time.monotonic() + seconds
    while not done():
        if select.select([signals], [], [], POLL)[0]:
            return "before a signal came"
        if time.monotonic() > end:
            return f"within {seconds:.0f} seconds"
    return ""


def _wait(watch: subprocess.Popen[str], signals: int) -> None:
    """Until the daemon is up. Raises StudyError if it is not."""
    if why := _until(lambda: select.select([watch.stdout], [], [], 0)[0], signals, START):
        raise StudyError(f"{CONTROL} -d did not return {why}")
    said = watch.stdout.readline().strip()
    if said != "up":
        raise StudyError(f"{CONTROL} -d failed{said and ': '}{said}")


def _try(signals: int) -> None:
    """One client, which has the daemon start its server. Raises StudyError if that fails."""
    with subprocess.Popen([sys.executable, "-I", "-c", CLIENT], stderr=subprocess.PIPE,
                          text=True, start_new_session=True) as client:  # fmt: skip
        try:
            if why := _until(lambda: client.poll() is not None, signals, TRY):
                raise StudyError(f"the MPS server did not start {why}")
        finally:
            client.kill()
        said = client.stderr.read().strip().splitlines()
    if client.returncode:
        why = said[-1] if said else f"exit status {client.returncode}"
        raise StudyError(f"the MPS server does not take clients: {why}")
