"""A SLURM cluster of two nodes on this machine, started for the tests and stopped after them.

The daemons are SLURM's own; the two nodes are two `slurmd` processes. Nothing outside the given
folder is written, and no service of the system is used.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge postgresql"
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=32000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=32000 Gres=gpu:1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=0
PartitionName=grace Nodes=n1,n2 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def missing() -> str | None:
    """Return what has to be installed for a cluster; None if all is there."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(absent)}: {INSTALL}" if absent else None


class Slurm:
    """The cluster; `with Slurm(folder) as slurm` starts and stops it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel_all()
        for file in (*self.folder.glob("*.pid"), self.folder / "munge" / "pid"):
            if file.exists():
                stop(int(file.read_text()))

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir()
        munge.chmod(0o755)
        (self.folder / "state").mkdir()
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        call("munged", "--force", *(f"--{flag}={munge / name}" for flag, name in files.items()))
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, user=getpass.getuser(), folder=self.folder, ports=free_ports(3)
            )
        )
        (self.folder / "gres.conf").write_text("NodeName=n2 Name=gpu File=/dev/null\n")
        self("slurmctld")
        for node in NODES:
            self.start_node(node)
        until(self._idle, 60)

    def _idle(self) -> bool:
        lines = self("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return set(lines) == {f"{node} idle" for node in NODES}

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        (self.folder / node).mkdir(exist_ok=True)
        self("slurmd", "-N", node)

    def fail(self, node: str) -> None:
        """Let a node fail: kill its daemon and all processes of its jobs, and mark it as down."""
        own = {"SLURM_CONF": self.environment["SLURM_CONF"], "SLURMD_NODENAME": node}
        daemon = psutil.Process(int((self.folder / f"{node}.pid").read_text()))
        tasks = [one for one in psutil.process_iter() if own.items() <= variables(one).items()]
        steps = [up for one in tasks for up in one.parents() if up.name() == "slurmstepd"]
        for process in {daemon, *steps, *tasks}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self("scontrol", "update", f"NodeName={node}", "State=down", "Reason=failed")

    def __call__(self, *words: str, folder: Path | None = None) -> str:
        """Run a command of SLURM in a folder; return its output."""
        return call(*words, environment=self.environment, folder=folder)

    def cancel_all(self) -> None:
        """Cancel the jobs that a failed test has left behind."""
        with suppress(RuntimeError):  # the controller did not start
            self("scancel", f"--user={getpass.getuser()}")
            until(lambda: not self("squeue", "--noheader").strip(), 60)

    def submit(self, script: str, folder: Path, *words: str) -> str:
        """Submit a batch script; return the job's number."""
        (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
        return self("sbatch", "--parsable", *words, "job.sh", folder=folder).strip()

    def preempt(self, node: str, seconds: int = 5) -> str:
        """Submit a job of higher priority that wants a whole node; return its number."""
        words = ["--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
        return self("sbatch", "--parsable", *words, f"--wrap=sleep {seconds}").strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        pairs = (word.partition("=") for word in self("scontrol", "show", "job", number).split())
        return {name: value for name, _, value in pairs}

    def state(self, number: str) -> str:
        """Return the state of a job, as in RUNNING."""
        return self.job(number)["JobState"]

    def spare_delays(self) -> None:
        """Let jobs that are queued again start soon; SLURM holds them back for two minutes.

        Not at once: a node refuses a job that it is still clearing up (credential revoked).
        """
        for line in self("squeue", "--noheader", "--array", "--format=%i|%r|%V").splitlines():
            number, reason, queued = line.strip().split("|")
            waited = datetime.now() - datetime.fromisoformat(queued)
            if reason == "BeginTime" and waited > timedelta(seconds=5):
                self("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait_for(self, number: str, *states: str, seconds: float = 180) -> str:
        """Wait until a job is in one of these states, without delays; return the one."""

        def there() -> bool:
            self.spare_delays()
            return self.state(number) in states

        until(there, seconds)
        return self.state(number)

    def restarts(self, number: str) -> int:
        """Return how often a job has been queued again."""
        return int(self.job(number)["Restarts"])

    def ended(self, process: subprocess.Popen[bytes], seconds: float = 300) -> int:
        """Wait until a command that waits for jobs ends, without delays; return its exit code."""

        def over() -> bool:
            self.spare_delays()
            return process.poll() is not None

        until(over, seconds)
        return int(process.returncode)


def call(*words: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a command; return its output.

    Raises:
        RuntimeError: It failed.
    """
    done = subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: It is not, after some seconds.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} seconds")
        time.sleep(0.3)


def free_ports(number: int) -> list[int]:
    """Return numbers of free ports."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def variables(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process; empty if it has ended or is somebody else's."""
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def stop(pid: int) -> None:
    """End a process of this machine, and wait for that."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            until(lambda: not Path(f"/proc/{pid}").exists(), 10)
        except ProcessLookupError:
            return
        except TimeoutError:
            continue
