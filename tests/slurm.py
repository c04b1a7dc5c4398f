"""A Slurm of one node for tests: munged, slurmctld and slurmd in a scratch folder, on loopback.

Nothing of it outlives the fixture, and no other Slurm or munge of the machine is touched: socket,
key, ports, logs and spool are its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
SBIN = "/usr/sbin"  # where daemons are, which is not on everybody's PATH
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=defer_batch,batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=20
MaxArraySize={array}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} CoresPerSocket={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120 DefMemPerCPU=400
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9 DefMemPerCPU=400
"""  # noqa: E501


def lacking() -> str:
    """Why there can be no Slurm here, or ''."""
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [p for p in PROGRAMS if not shutil.which(p, path=path)]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "slurmd wants root"


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 4, array: int = 1001) -> Iterator[Path]:
    """Starts it, sets SLURM_CONF, and stops it with all its jobs; yields slurm.conf's path."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(folder=folder, host=host, ctld=free_port(), slurmd=free_port(),
                                cpus=cpus, array=array))  # fmt: skip
    path = f"{os.environ['PATH']}:{SBIN}"
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(conf)
    munge = [f"--{k}-file={folder}/munge.{k}" for k in ("key", "pid", "log", "seed")]
    daemons = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", host],
    )
    started: list[subprocess.Popen] = []
    try:
        for words in daemons:
            program = shutil.which(words[0], path=path)
            with (folder / f"{words[0]}.out").open("w") as out:
                started.append(subprocess.Popen([program, *words[1:]], stdout=out, stderr=out))
            if words[0] == "munged":
                wait((folder / "munge.socket").exists, folder)
        wait(lambda: "idle" in asked("sinfo", "-h", "-o", "%T"), folder)
        try:
            yield conf
        finally:
            for state in ("PENDING", "RUNNING"):
                asked("scancel", f"--state={state}", "--me")
            wait(lambda: not asked("squeue", "-h"), folder)
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def asked(*words: str) -> str:
    """What a Slurm command prints; '' where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def wait(condition: object, folder: Path, seconds: float = 60) -> None:
    """Waits until condition() holds; what the daemons said goes into the failure."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            said = [f"{p.name}: {p.read_text()[-1500:]}"
                    for p in sorted((*folder.glob("*.out"), *folder.glob("*.log")))]  # fmt: skip
            raise TimeoutError("Slurm does not answer\n" + "\n".join(said))
        time.sleep(0.1)
