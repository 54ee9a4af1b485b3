"""Merging a verl FSDP checkpoint: `rlctl ckpt merge` against verl's own merger and a plain copy; write `merging.md`.

    python benchmarks/merging.py --verl-python PATH [--gb 4 1] [--rounds 3] [--folder DIR] [--append]

In turns, each in a process of its own, timed from its start, with the input dropped from the page cache before. Peak
memory is that of the command's largest process. Needs about 3.5 times the size on the disk of `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "merging.json"
RLCTL = str(Path(sys.executable).with_name("rlctl"))
HEADER = """# Merging a checkpoint

A synthetic checkpoint as verl's FSDP2 trainer writes it (Qwen2, float32, four ranks' files), merged in turns by
`rlctl ckpt merge` and by the merger of verl {verl}, whose output is always bfloat16, and copied with `cp` and `sync`.
Seconds are those of the whole command, the start of Python included. rlctl and the copy end when all is on the disk;
verl does not wait for that, and the column beside says when its output was there. A bfloat16 output is half the bytes
that the copy writes. Peak memory is that of the largest process. Inputs were dropped from the page cache before every
command, programs and libraries were not. Medians over rounds, {date}, {cores} CPU cores, of whose time other processes
took {low:.0%} to {high:.0%} meanwhile.

rlctl's bfloat16 output equals verl's bit for bit, tensor by tensor, and its unchanged output the input; both were
compared once at each size.

"""
TABLE = """## {gigabytes:.2f} GB, {rounds} rounds

| | seconds | on the disk after | the merge alone | CPU seconds | peak memory, MiB |
|---|---|---|---|---|---|
"""
WORDS = {
    "copy": "copy",
    "keep": "rlctl, `--dtype keep`",
    "bfloat16": "rlctl, `--dtype bfloat16`",
    "verl": "verl",
}


@dataclass(frozen=True)
class Run:
    """What one command took."""

    seconds: float
    """From its start to its end."""
    on_disk_s: float
    """From its start until its output is on the disk."""
    alone_s: float | None
    """Of the merge without start and plan, as the command says; None of others."""
    cpu_s: float
    peak_mib: float
    others: float
    """Share of all cores' time that other processes took meanwhile."""


@dataclass(frozen=True)
class Case:
    """All runs over one checkpoint, by way, in rounds."""

    num_bytes: int
    runs: dict[str, list[Run]]

    def median(self, way: str, field: str) -> float:
        """Return the median of one field."""
        return statistics.median(getattr(run, field) for run in self.runs[way])

    def ratios(self) -> dict[str, float]:
        """Return medians of ratios, round by round; above 1 is in favour of rlctl."""

        def ratio(one: str, other: str, field: str, other_field: str | None = None) -> float:
            pairs = zip(self.runs[one], self.runs[other], strict=True)
            return round(statistics.median(getattr(a, field) / getattr(b, other_field or field) for a, b in pairs), 2)

        return {
            "verl_to_rlctl_seconds": ratio("verl", "bfloat16", "seconds"),
            "verl_to_rlctl_seconds_on_disk": ratio("verl", "bfloat16", "on_disk_s"),
            "verl_to_rlctl_cpu_seconds": ratio("verl", "bfloat16", "cpu_s"),
            "verl_to_rlctl_memory": ratio("verl", "bfloat16", "peak_mib"),
            "rlctl_keep_to_copy_rate": ratio("copy", "keep", "seconds"),
            "rlctl_keep_alone_to_copy_rate": ratio("copy", "keep", "seconds", "alone_s"),
            "rlctl_bfloat16_to_copy_rate_read": ratio("copy", "bfloat16", "seconds"),
            "rlctl_bfloat16_to_copy_rate_written": round(ratio("copy", "bfloat16", "seconds") / 2, 2),
        }


def main() -> None:
    """Measure every size, print and write the page and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl-python", required=True, help="python of an environment that has verl")
    parser.add_argument("--gb", nargs="+", type=float, default=[4.0, 1.0], help="sizes, in GB (10^9 bytes)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made and removed; default the temporary one")
    parser.add_argument("--append", action="store_true", help="add rounds to those of the same size in the results")
    asked = parser.parse_args()
    cases = earlier() if asked.append else {}
    for gigabytes in asked.gb:
        with tempfile.TemporaryDirectory(prefix="rlctl-merging-", dir=asked.folder) as folder:
            case = measure(Path(folder), gigabytes, asked.rounds, asked.verl_python)
        before = cases.get(case.num_bytes, Case(case.num_bytes, {way: [] for way in WORDS}))
        cases[case.num_bytes] = Case(case.num_bytes, {way: before.runs[way] + case.runs[way] for way in WORDS})
    page = report(list(cases.values()), verl_version(asked.verl_python))
    print(page)
    (HERE / "merging.md").write_text(page, encoding="utf-8")
    content = [asdict(case) | {"ratios": case.ratios()} for case in cases.values()]
    record = {"date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), "cases": content}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def earlier() -> dict[int, Case]:
    """Return what the results hold, by size in bytes."""
    cases = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    return {
        case["num_bytes"]: Case(
            case["num_bytes"], {way: [Run(**run) for run in runs] for way, runs in case["runs"].items()}
        )
        for case in cases
    }


def measure(folder: Path, gigabytes: float, rounds: int, verl_python: str) -> Case:
    """Make a checkpoint, merge it every way in turns, and compare the outputs of the first round."""
    source = folder / "global_step_1" / "actor"
    make = [sys.executable, "-m", "benchmarks.merging_checkpoint", str(source), str(gigabytes)]
    subprocess.run(make, cwd=HERE.parent, check=True)  # not in this process: its memory would count as the commands'
    files = sorted(source.glob("*.pt"))
    sync(files)
    runs: dict[str, list[Run]] = {way: [] for way in WORDS}
    for number in range(rounds):
        for way in WORDS:
            forget(files)
            runs[way].append(run(command(way, source, folder / way, verl_python), folder / way))
            print(f"{gigabytes} GB, round {number + 1}, {way}: {runs[way][-1]}", file=sys.stderr, flush=True)
        if number == 0:
            expect_equal(folder / "verl", folder / "bfloat16")
            expect_equal(source, folder / "keep")
        for way in WORDS:
            shutil.rmtree(folder / way)
    return Case(sum(file.stat().st_size for file in files), runs)


def command(way: str, source: Path, out: Path, verl_python: str) -> Sequence[str]:
    """Return what is run."""
    if way == "copy":
        return ["sh", "-c", 'mkdir "$2" && cp "$1"/*.pt "$2" && sync "$2"/*.pt', "copy", str(source), str(out)]
    if way == "verl":
        asked = ["--backend", "fsdp", "--local_dir", str(source), "--target_dir", str(out)]
        return [verl_python, "-m", "verl.model_merger", "merge", *asked]
    return [RLCTL, "ckpt", "merge", str(source), "--out", str(out), "--dtype", way, "--output", "json"]


def run(words: Sequence[str], out: Path) -> Run:
    """Run a command to its end, and wait until what it wrote is on the disk."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        busy, start = busy_s(), time.perf_counter()
        process = subprocess.Popen(words, stdout=told, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        all_busy = busy_s() - busy
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)}\n{errors.read()[-4000:]}")
        sync(path for path in out.rglob("*") if path.is_file())
        on_disk = time.perf_counter() - start
        told.seek(0)
        alone = json.load(told)["seconds"] if words[0] == RLCTL else None
    cpu = used.ru_utime + used.ru_stime
    others = max(0.0, all_busy - cpu) / (seconds * (os.cpu_count() or 1))
    return Run(seconds, on_disk, alone, cpu, used.ru_maxrss / 1024, others)


def busy_s() -> float:
    """Return the seconds that all cores together have worked since the machine began."""
    user, nice, system, _idle, _wait, *others = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    irq, softirq, steal = others[:3]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def sync(files: Iterable[Path]) -> None:
    """Have files reach the disk."""
    for file in files:
        _with_descriptor(file, os.fsync)


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache; those alone, because others use this machine too."""
    for file in files:
        _with_descriptor(file, lambda descriptor: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED))


def expect_equal(one: Path, other: Path) -> None:
    """End with what differs, if anything does."""
    done = subprocess.run([RLCTL, "ckpt", "diff", str(one), str(other)], capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"{one} and {other} differ")


def verl_version(python: str) -> str:
    """Return the version of the peer."""
    code = "from importlib.metadata import version; print(version('verl'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def report(cases: Sequence[Case], verl: str) -> str:
    """Return the page: a table and the ratios for each size."""
    others = [run.others for case in cases for runs in case.runs.values() for run in runs]
    page = HEADER.format(
        verl=verl, date=time.strftime("%Y-%m-%d"), cores=len(os.sched_getaffinity(0)),
        low=min(others), high=max(others),
    )  # fmt: skip
    for case in cases:
        page += TABLE.format(gigabytes=case.num_bytes / 1e9, rounds=len(case.runs["copy"]))
        for way, words in WORDS.items():
            alone = "" if case.runs[way][0].alone_s is None else f"{case.median(way, 'alone_s'):.1f}"
            times = f"{case.median(way, 'seconds'):.1f} | {case.median(way, 'on_disk_s'):.1f} | {alone}"
            peak = "" if way == "copy" else f"{case.median(way, 'peak_mib'):,.0f}"
            page += f"| {words} | {times} | {case.median(way, 'cpu_s'):.1f} | {peak} |\n"
        page += "\nRatios, as medians over rounds:\n\n| ratio | |\n|---|---|\n"
        page += "".join(f"| {name.replace('_', ' ')} | {value:.2f} |\n" for name, value in case.ratios().items()) + "\n"
    return page + "Written by `nox -s bench`.\n"


def _with_descriptor(file: Path, call: Callable[[int], None]) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        call(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
