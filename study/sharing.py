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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from study.errors import StudyError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
TEMPORARY = "/tmp"  # not TMPDIR, which may be longer than the path of a socket can be
USUAL = Path(TEMPORARY, "nvidia-mps")  # where a daemon is that was started without PIPES
MOST = 48  # clients of one GPU; 60 since CUDA 13.1
START, TRY, STOP = 10.0, 60.0, 10.0  # seconds that the daemon may take; TRY starts its server

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
    start inside. A daemon that is in use already is left to its owner. Where there can be none,
    `say` is told why."""
    most = max(Counter(d for d in devices if d.startswith("cuda")).values(), default=0)
    with ExitStack() as ends:
        if most > 1 and PIPES not in os.environ and not (USUAL / "control").exists():
            try:
                ends.enter_context(_daemon(most))
            except (OSError, StudyError) as error:
                say(f"{most} runs take turns on a GPU: {error}")
        yield


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
    before = {name: os.environ.get(name) for name in ours}
    try:
        _wait(watch)
        os.environ.update(ours)
        _try()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        watch.stdin.close()
        watch.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # then it goes on by itself, until it is done
            watch.wait(STOP)


def _wait(watch: subprocess.Popen[str]) -> None:
    """Until the daemon is up. Raises StudyError if it is not."""
    if not select.select([watch.stdout], [], [], START)[0]:
        raise StudyError(f"{CONTROL} -d did not return within {START:.0f} seconds")
    said = watch.stdout.readline().strip()
    if said != "up":
        raise StudyError(f"{CONTROL} -d failed{said and ': '}{said}")


def _try() -> None:
    """One client, which has the daemon start its server. Raises StudyError if that fails."""
    try:
        done = subprocess.run([sys.executable, "-I", "-c", CLIENT], stderr=subprocess.PIPE,
                              text=True, check=False, timeout=TRY,
                              start_new_session=True)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StudyError(f"the MPS server did not start within {TRY:.0f} seconds") from None
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise StudyError(f"the MPS server does not take clients: {why[-1]}")
