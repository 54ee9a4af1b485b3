"""`python -m rlctl_train.courier run|kill FOLDER`: a driver on a cluster that shares no folder with the one who asked.

`run` lays the run's files, which came along in `run/`, into FOLDER, has the doctor compare the cluster's nodes with the
plan, starts the driver, and sends the small files that it writes home within its output; checkpoints and exported
weights stay in FOLDER. A driver that is killed is started again, `launch.max_restarts` times; the last one's exit code
is the job's.
`kill` ends the driver at once and for good.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rlctl_train.config.errors import LAUNCH, USAGE
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.parcel import NAME, pack
from rlctl_train.config.trainer import CLUSTER_VARIABLE

ARRIVED = Path("run")
"""Where the run's files lie in the folder that was uploaded."""
EVERY_S = 1.0
LARGEST_BYTES = 16 * 2**20
SENT = (
    "status.json", "metrics.jsonl", "summary.json", "report.html", "curves.png", "samples/*", "logs/*", "doctor/*",
    "profile/*.json", "profile/*/*.ranges.json",
)  # fmt: skip
DOCTOR_LIMIT_S = 300.0
GROWING = (".jsonl", ".log")


def main() -> int:
    """Do what the command line asks; return the exit code."""
    verb, folder = (*sys.argv[1:], "", "")[:2]
    if verb not in ("run", "kill") or not folder:
        print("usage: python -m rlctl_train.courier run|kill FOLDER", file=sys.stderr)
        return USAGE
    root = Path(folder).expanduser()
    return run(root) if verb == "run" else kill(root)


def run(root: Path) -> int:
    """Examine the cluster and run the driver in a folder, sending home what both write."""
    # Ray's stop signals every process of the job: the driver saves, and this one waits for it.
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    shutil.copytree(ARRIVED, root, dirs_exist_ok=True)
    files = RunFiles(root)
    if not files.status.exists():
        write_json(files.status, {"schema_version": 1, "state": "pending", "phase": "setup", "step": 0})
    outbox = Outbox(root)
    code = _examine(files) or _train(files, outbox, stopped)
    outbox.send()
    return code if code >= 0 else 128 - code


def _examine(files: RunFiles) -> int:
    """Have the doctor compare every node of the cluster with the plan; return its exit code."""
    shutil.rmtree(files.doctor, ignore_errors=True)
    words = ("doctor", "--run", str(files.root), "--cluster", os.environ["RAY_ADDRESS"])
    try:
        return subprocess.run([sys.executable, "-m", "rlctl.app", *words], timeout=DOCTOR_LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        print(f"error: the nodes were not examined within {DOCTOR_LIMIT_S:g} s", file=sys.stderr)
        return LAUNCH


def _train(files: RunFiles, outbox: Outbox, stopped: threading.Event) -> int:
    """Run the driver, and again as often as the run allows when something kills it; return the last exit code."""
    most = json.loads(files.config.read_text())["launch"]["max_restarts"]
    environment = os.environ | {CLUSTER_VARIABLE: os.environ["RAY_ADDRESS"]}
    pid_file = _pid_file(files.root)
    spent = 0
    while not stopped.is_set():
        driver = subprocess.Popen([sys.executable, "-m", "rlctl_train", str(files.root)], env=environment)
        pid_file.write_text(str(driver.pid))
        while driver.poll() is None:
            time.sleep(EVERY_S)
            outbox.send()
        if driver.returncode >= 0 or stopped.is_set() or not pid_file.exists() or spent == most:
            return driver.returncode
        spent += 1
        print(f"signal {-driver.returncode} ended the driver; started again ({spent} of {most})", file=sys.stderr)
    return -signal.SIGTERM


def kill(root: Path) -> int:
    """End the driver of a folder, if it is still that one, for good."""
    try:
        pid = int(_pid_file(root).read_text())
        _pid_file(root).unlink()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return 0
    if str(root).encode() in words:
        os.kill(pid, signal.SIGKILL)
    return 0


class Outbox:
    """Prints what is new in a run folder: whole files when they were replaced, else what was added."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, tuple[int, int, float]] = {}
        """Inode, size and time of each file as it was last sent."""
        status = RunFiles(root).status
        if status.exists():  # that of an earlier driver is news to nobody, and would say that the run has ended
            self._known[status] = _stand(status)

    def send(self) -> None:
        """Print what was written since the last call."""
        for file in self._files():
            now, before = _stand(file), self._known.get(file)
            if now == before or now[1] > LARGEST_BYTES:
                continue
            # The next file may get the number of the one it replaced: only what is written line by line can grow.
            grows = before is not None and file.suffix in GROWING and now[0] == before[0] and now[1] > before[1]
            offset = before[1] if before is not None and grows else 0
            with file.open("rb") as opened:
                opened.seek(offset)
                data = opened.read(now[1] - offset)
            sys.stdout.write(pack(str(file.relative_to(self._root)), offset, data))
            sys.stdout.flush()
            self._known[file] = now

    def _files(self) -> Iterator[Path]:
        for pattern in SENT:
            for file in sorted(self._root.glob(pattern)):
                if file.is_file() and file.name[0] != "." and NAME.fullmatch(file.name):
                    yield file


def _stand(file: Path) -> tuple[int, int, float]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime


def _pid_file(root: Path) -> Path:
    return root / ".driver.pid"


if __name__ == "__main__":
    sys.exit(main())
