"""SkyPilot's Slurm cloud on this one machine: a real SkyPilot, a real Slurm, between them an ssh server on loopback.

Needs root, Debian and SkyPilot's command. Everything lies below one folder: SkyPilot's home, the home that it sees on
the "login node", the keys. The `uv` beside SkyPilot and its Python serve the nodes too, which would download their own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import slurm_cluster

NAME, USER = "onebox", "0123abcd"
"""Of the Slurm cluster, and of the person, as SkyPilot knows them."""
SSHD = Path("/usr/sbin/sshd")
PACKAGES = ("openssh-server", "rsync")
SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {root}/host_key
PidFile {root}/sshd.pid
AuthorizedKeysFile {root}/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
SetEnv HOME={login} SLURM_CONF={slurm_conf} PATH={login}/.local/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
"""
SSH_CONFIG = """\
Host {name}
    HostName 127.0.0.1
    Port {port}
    User root
    IdentityFile {root}/key
    IdentitiesOnly yes
"""
SKY_CONFIG = f"""\
allowed_clouds: [slurm]
slurm:
  allowed_clusters: [{NAME}]
  provision_timeout: 120
"""


def why_not() -> str | None:
    """Return why it cannot be set up here, or None."""
    return slurm_cluster.why_not()


@dataclass(frozen=True)
class SkyOnSlurm:
    """A running set-up; `environment` leads `sky` and `rlctl` to it."""

    root: Path
    sky: Path
    slurm: slurm_cluster.SlurmCluster

    @property
    def home(self) -> Path:
        """Return the home of SkyPilot's client and server."""
        return self.root / "home"

    @property
    def login(self) -> Path:
        """Return the home on the login node and on the nodes."""
        return self.root / "login"

    @property
    def environment(self) -> dict[str, str]:
        """Return what must be in the environment of every client."""
        return {
            "HOME": str(self.home), "RLCTL_SKY": str(self.sky), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "PATH": f"{self.sky.parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def call(self, *words: str, limit_s: float = 300) -> str:
        """Run `sky` and return what it printed."""
        done = subprocess.run(
            [str(self.sky), *words], env=os.environ | self.environment, capture_output=True, text=True, timeout=limit_s
        )
        assert done.returncode == 0, f"sky {' '.join(words)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Write every file, and start the ssh server."""
        # SkyPilot compares what a node's name leads to with the address that Slurm gives; the file is in use as it is.
        hosts = self.slurm.root / "hosts"
        hosts.write_text(re.sub(r"(?m)^\S+ (n\d+)$", r"127.0.0.1 \1", hosts.read_text()))
        port = _free_port()
        self._write_home(port)
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / key)], check=True)
        shutil.copy(self.root / "key.pub", self.root / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        config = self.root / "sshd_config"
        conf = self.slurm.environment["SLURM_CONF"]
        config.write_text(SSHD_CONFIG.format(port=port, root=self.root, login=self.login, slurm_conf=conf))
        subprocess.run([str(SSHD), "-f", str(config), "-E", str(self.root / "sshd.log")], check=True)

    def prepare(self, cluster: str) -> None:
        """Put what SkyPilot would download for its nodes where it looks for it: uv, an environment with a Python."""
        known_as = f"{cluster}-{USER}"
        home = self.login / ".sky_clusters" / known_as
        for folder in (".local/bin", ".config/uv"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / ".config" / "uv" / "uv.toml").write_text("system-certs = true\n")
        shutil.copy(self.sky.with_name("uv"), home / ".local" / "bin" / "uv")
        runtime = Path("/tmp") / known_as / "skypilot-runtime"
        subprocess.run([str(self.sky.with_name("python")), "-m", "venv", str(runtime)], check=True)

    def stop(self) -> None:
        """End SkyPilot's server and the ssh server."""
        subprocess.run(
            [str(self.sky), "api", "stop"], env=os.environ | self.environment, capture_output=True, timeout=60
        )
        pid = self.root / "sshd.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)

    def _write_home(self, port: int) -> None:
        catalog = self.home / ".sky" / "catalogs" / "v8" / "common"
        for folder in (catalog, self.home / ".slurm", self.login / ".local" / "bin"):
            folder.mkdir(parents=True)
        (self.home / ".sky" / "config.yaml").write_text(SKY_CONFIG)
        (self.home / ".sky" / "user_hash").write_text(USER)
        (self.home / ".slurm" / "config").write_text(SSH_CONFIG.format(name=NAME, port=port, root=self.root))
        # A price list that is there is not downloaded.
        (catalog / "accelerators.csv").write_text("AcceleratorName,Clouds\nH100,\"['Slurm', 'Kubernetes']\"\n")
        (catalog / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\n")


@contextmanager
def running(root: Path, sky: Path) -> Iterator[SkyOnSlurm]:
    """Install what is missing, and have all of it for a while."""
    if not SSHD.exists() or shutil.which("rsync") is None:
        slurm_cluster.apt_install(*PACKAGES)
    root.mkdir(parents=True, exist_ok=True)
    with slurm_cluster.running(root / "slurm") as slurm:
        made = SkyOnSlurm(root, sky, slurm)
        try:
            made.start()
            yield made
        finally:
            made.stop()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
