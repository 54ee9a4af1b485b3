"""`python -m rlctl_train.courier run|kill|stacks FOLDER`: a driver on a cluster that shares no folder with who asked.

`run` lays the run's files, which came along in `run/`, into FOLDER, has the doctor compare the cluster's nodes with the
plan, starts the driver, and sends the small files that it writes home within its output; at the end also what a profile
left, as far as there is room. Checkpoints and exported weights stay in FOLDER. A driver that is killed is started
again, `launch.max_restarts` times; the last one's exit code is the job's.
`kill` ends the driver at once and for good. `stacks` asks it where everyone is; the answer comes home like any file.
`lines FOLDER PATTERN...` prints files as lines of a job that somebody else runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rlctl_train.config.errors import LAUNCH, USAGE
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.parcel import LINE_MARK, MARK, NAME, pack
from rlctl_train.config.trainer import CLUSTER_VARIABLE

ARRIVED = Path("run")
"""Where the run's files lie in the folder that was uploaded."""
EVERY_S = 1.0
LARGEST_BYTES = 16 * 2**20
"""Of a file that is sent while the run goes."""
PROFILE = "profile/**/*"
PROFILE_BYTES = 64 * 2**20
"""Of all files that a profile left and that are sent at the end."""
PIECE_BYTES = 4 * 2**20
LINES_BYTES, LINE_BYTES = 16 * 2**20, 24 * 2**10
"""The same where lines are what is kept, all together and each."""
SENT = (
    "status.json", "metrics.jsonl", "summary.json", "report.html", "curves.png", "samples/*", "logs/*", "doctor/*",
    "profile/*.json", "profile/*/*.ranges.json",
)  # fmt: skip
DOCTOR_LIMIT_S = 300.0
GROWING = (".jsonl", ".log")


def main() -> int:
    """Do what the command line asks; return the exit code."""
    verbs = {"run": run, "kill": kill, "stacks": ask_for_stacks, "lines": lines}
    verb, folder, *patterns = [*sys.argv[1:], "", ""][: max(2, len(sys.argv) - 1)]
    if verb not in verbs or not folder or bool(patterns) != (verb == "lines"):
        usage = "usage: python -m rlctl_train.courier run|kill|stacks FOLDER, or lines FOLDER PATTERN..."
        print(usage, file=sys.stderr)
        return USAGE
    return verbs[verb](Path(folder).expanduser(), *patterns)


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
    outbox.send_within(PROFILE_BYTES, PROFILE)
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


def ask_for_stacks(root: Path) -> int:
    """Have the driver of a folder write down where everyone is."""
    RunFiles(root).stacks_wanted.touch()
    return 0


def lines(root: Path, *patterns: str) -> int:
    """Print the files of a folder that match, as lines."""
    Outbox(root, mark=LINE_MARK, piece_bytes=LINE_BYTES).send_within(LINES_BYTES, *patterns)
    return 0


class Outbox:
    """Prints what is new in a run folder: whole files when they were replaced, else what was added."""

    def __init__(self, root: Path, *, mark: str = MARK, piece_bytes: int = PIECE_BYTES) -> None:
        self._root, self._mark, self._piece_bytes = root, mark, piece_bytes
        self._known: dict[Path, tuple[int, int, float]] = {}
        """Inode, size and time of each file as it was last sent."""
        status = RunFiles(root).status
        if status.exists():  # that of an earlier driver is news to nobody, and would say that the run has ended
            self._known[status] = _stand(status)

    def send(self) -> None:
        """Print what was written since the last call."""
        for file in self._files(*SENT):
            now, before = _stand(file), self._known.get(file)
            if now == before or now[1] > LARGEST_BYTES:
                continue
            # The next file may get the number of the one it replaced: only what is written line by line can grow.
            grows = before is not None and file.suffix in GROWING and now[0] == before[0] and now[1] > before[1]
            self._print(file, before[1] if before is not None and grows else 0, now[1])
            self._known[file] = now

    def send_within(self, most_bytes: int, *patterns: str) -> None:
        """Print files that were not sent yet, small ones first; `profile/left.json` names what there is no room for."""
        room, left = most_bytes, dict[str, int]()
        for file in sorted(self._files(*patterns), key=lambda file: file.stat().st_size):
            size = file.stat().st_size
            if file in self._known or file == RunFiles(self._root).left:
                continue
            if size <= room:
                self._print(file, 0, size)
                room -= size
            else:
                left[str(file.relative_to(self._root))] = size
        if left:
            file = RunFiles(self._root).left
            write_json(file, {"host": socket.gethostname(), "folder": str(self._root), "files": left})
            self._print(file, 0, file.stat().st_size)

    def _print(self, file: Path, start: int, end: int) -> None:
        """Print the bytes of a file from `start` to `end`; of an empty file, that it is there."""
        with file.open("rb") as opened:
            opened.seek(start)
            for at in range(start, max(end, start + 1), self._piece_bytes):
                data = opened.read(min(self._piece_bytes, end - at))
                sys.stdout.write(pack(str(file.relative_to(self._root)), at, data, self._mark))
        sys.stdout.flush()

    def _files(self, *patterns: str) -> Iterator[Path]:
        for pattern in patterns:
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
