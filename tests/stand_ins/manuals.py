"""Options that the profilers' manuals know, with their values: None takes any, an empty set takes none."""

from __future__ import annotations

Manual = dict[str, set[str] | None]
SWITCH = {"true", "false"}
NSYS_PROFILE: Manual = {
    "trace": {"cuda", "cuda-hw", "nvtx", "cublas", "cublas-verbose", "cudnn", "cusparse", "osrt", "mpi", "ucx", "none"},
    "capture-range": {"none", "cudaProfilerApi", "hotkey", "nvtx"},
    "capture-range-end": {"none", "stop", "stop-shutdown", "repeat", "repeat-shutdown"},
    "cuda-memory-usage": SWITCH,
    "cuda-graph-trace": {"graph", "node"},
    "sample": {"process-tree", "system-wide", "none"},
    "python-sampling": SWITCH,
    "wait": {"primary", "all"},
    "kill": {"none", "sigkill", "sigterm"},
    "stop-on-exit": SWITCH,
    "force-overwrite": SWITCH,
    "output": None,
    "delay": None,
    "duration": None,
}
"""`nsys profile`, by the user guide of Nsight Systems; what follows a colon is a number."""
NSYS_EXPORT: Manual = {
    "type": {"arrow", "hdf", "info", "json", "jsonlines", "parquetdir", "sqlite", "text"},
    "force-overwrite": SWITCH,
    "output": None,
}
ROCPROFV3: Manual = {
    **{f"{name}-trace": set() for name in ("sys", "runtime", "hip", "hip-runtime", "hip-compiler", "hsa", "hsa-core")},
    **{f"{name}-trace": set() for name in ("marker", "kernel", "memory-copy", "memory-allocation", "scratch-memory")},
    **{f"{name}-trace": set() for name in ("rccl", "kokkos", "rocdecode", "rocjpeg")},
    "output-format": {"csv", "json", "pftrace", "otf2", "rocpd"},
    "output-directory": None,
    "output-file": None,
}
"""rocprofv3, by the quick reference of ROCprofiler-SDK."""


def parse(words: list[str], manual: Manual) -> tuple[dict[str, str], list[str]]:
    """Return the options and the command behind them; ends the process at what the manual does not know."""
    words, given = list(words), dict[str, str]()
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).removeprefix("--").partition("=")
        if not name:
            break
        if name not in manual:
            raise SystemExit(f"no option --{name}")
        known = manual[name]
        if known == set():
            continue
        value = value or words.pop(0)
        if known is not None and not {part.partition(":")[0] for part in value.split(",")} <= known:
            raise SystemExit(f"--{name} takes no {value}")
        given[name] = value
    return given, words
