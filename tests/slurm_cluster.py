"""A real Slurm on this one machine: several nodes of made-up size, with made-up accelerators; everything in one folder.

Needs root and Debian; `python -m tests.slurm_cluster FOLDER` starts one to play with, until Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
START_LIMIT_S = 60.0
CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# A job's number names its Ray's port and folder: of two such clusters on one machine no jobs may share one.
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is sent back waits this long before it may start again.
AuthInfo=socket={root}/munge/socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
InactiveLimit=0
Waittime=0
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory_mib}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
IN_OWN_NAMES = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def why_not() -> str | None:
    """Return why no Slurm can be set up here, or None."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root: it makes device files and namespaces"
    if any(shutil.which(name) is None for name in PROGRAMS) and shutil.which("apt-get") is None:
        return f"{', '.join(PACKAGES)} are not installed, and there is no apt-get"
    return None


def install() -> None:
    """Install what is missing, by apt-get."""
    if any(shutil.which(name) is None for name in PROGRAMS):
        apt_install(*PACKAGES)


def apt_install(*packages: str) -> None:
    """Install packages of Debian."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update", "-qq"), ("install", "-qq", "-y", "--no-install-recommends", *packages)):
        subprocess.run(["apt-get", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


@dataclass
class SlurmCluster:
    """A running Slurm; `environment` leads the client commands to it."""

    root: Path
    num_nodes: int = 2
    cpus: int = 4
    gpus: int = 4
    memory_mib: int = 16000

    @property
    def environment(self) -> dict[str, str]:
        """Return what must be in the environment of every client."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """Run a client command and return what it printed."""
        done = subprocess.run(
            words, env=os.environ | self.environment, check=True, capture_output=True, text=True, timeout=20
        )
        return done.stdout

    def start(self) -> None:
        """Start munge, the controller and every node, and wait until the nodes are idle."""
        self._write()
        munge = self.root / "munge"
        self._run(
            "munged", f"--socket={munge / 'socket'}", f"--key-file={munge / 'key'}", f"--log-file={munge / 'log'}",
            f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}", "--force",
        )  # fmt: skip
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self._until(
            lambda: (
                len(self.ask("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N").split()) == self.num_nodes
            )
        )

    @property
    def nodes(self) -> list[str]:
        """Return the names of the nodes."""
        return [f"n{number + 1}" for number in range(self.num_nodes)]

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        hosts = str(self.root / "hosts")
        self._run(
            "unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", IN_OWN_NAMES, hosts, name,
            "slurmd", "-N", name,
        )  # fmt: skip

    def lose_node(self, name: str) -> None:
        """Kill all that runs on a node, and have the controller find it gone, as its ping would minutes later."""
        names = _namespace(int((self.root / f"slurmd.{name}.pid").read_text()))
        for process in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                if _namespace(process.pid) == names:
                    process.kill()
        self.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=no answer")

    def start_controller(self) -> None:
        """Start the controller, and wait until it answers."""
        self._run("slurmctld", "-i")
        self._until(lambda: "UP" in self.ask("scontrol", "ping").split())

    def stop_controller(self) -> None:
        """End the controller; it keeps what it knows, and jobs go on."""
        self._end(self.root / "slurmctld.pid", signal.SIGTERM)

    def stop(self) -> None:
        """Cancel all jobs and end everything that was started, by its process id."""
        with suppress(subprocess.SubprocessError):
            self.ask("scancel", "--full", "--user=root")
            self._until(lambda: self.ask("squeue", "-h") == "")
        for file in [*self.root.glob("slurmd.*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]:
            self._end(file, signal.SIGTERM)

    def _write(self) -> None:
        for name in ("munge", "state", "log", "dev", *(f"spool.{name}" for name in self.nodes)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for number in range(self.gpus):  # only character devices count as GPUs; these lead where /dev/null does
            os.mknod(self.root / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        host, (port, *ports) = socket.gethostname(), _free_ports(1 + self.num_nodes)
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Gres=gpu:h100:{self.gpus}"
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        (self.root / "slurm.conf").write_text(
            CONF.format(
                host=host, port=port, root=self.root, cpus=self.cpus, memory_mib=self.memory_mib, nodes="\n".join(lines)
            )
        )
        (self.root / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.root}/dev/nvidia[0-{self.gpus - 1}]\n")
        # In its own namespaces each node has a name of its own, and all names lead to this machine.
        address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
        names = "".join(f"{address} {name}\n" for name in self.nodes)
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _run(self, *words: str) -> None:
        with (self.root / "log" / "daemons.log").open("ab") as log:
            subprocess.run(words, env=os.environ | self.environment, check=True, stdout=log, stderr=log, timeout=30)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            with suppress(subprocess.SubprocessError):
                if condition():
                    return
            time.sleep(0.1)
        raise AssertionError(f"Slurm did not come as far in time; see {self.root / 'log'}")

    @staticmethod
    def _end(file: Path, number: int) -> None:
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(file.read_text())
            os.kill(pid, number)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)


def _namespace(pid: int) -> Path:
    """Return the namespace of host names that a process is in: that of its node."""
    return Path(f"/proc/{pid}/ns/uts").readlink()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running(root: Path) -> Iterator[SlurmCluster]:
    """Install what is missing, and have a cluster for a while."""
    install()
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    with running(Path(sys.argv[1]).resolve()) as slurm, suppress(KeyboardInterrupt):
        print(*(f"export {name}={value}" for name, value in slurm.environment.items()), sep="\n", flush=True)
        signal.pause()
