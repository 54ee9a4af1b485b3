"""Checkpoints by name: which folder a run, a number of steps or a path stands for, and what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlctl import rundir, settings
from rlctl.commands._workshop import train_extra
from rlctl.follow import accuracy, metric_rows
from rlctl.rundir import Run
from rlctl_train.config.errors import UserError

STEP_FOLDER = re.compile(r"(?:step|global_step|checkpoint|iter)[_-](\d+)")
"""Names that trainers give the folder of one step."""


@dataclass(frozen=True)
class Found:
    """One checkpoint of a run or folder."""

    run: str | None
    step: int
    path: Path
    kind: str | None
    """None where it is of no known kind."""
    num_bytes: int
    modified: float
    complete: bool | None
    """Whether every file of its manifest is there in its size; None without a manifest."""
    best: bool = False
    last: bool = False


def runs_root() -> Path:
    """Return the folder of the runs."""
    return settings.load().runs_root()


def find_run(name: str) -> Run | None:
    """Return the run of a name or folder; None where the name is the path of something else."""
    path = Path(name)
    is_run = (path / "config.json").is_file() and (path / "status.json").is_file()
    if path.exists() and not is_run and not (runs_root() / name / "status.json").is_file():
        return None
    return rundir.find(runs_root(), name)


def checkpoint_path(name: str, step: int | None = None) -> Path:
    """Return the folder of a checkpoint: the path itself, or of a run or folder of steps the newest complete one."""
    run = find_run(name)
    folder = Path(name) if run is None else run.files.checkpoints
    steps = dict(step_folders(folder))
    if run is None and not steps:
        if step is not None:
            raise UserError(f"{folder} has no folders of steps", "leave --step out, or name a run")
        return folder
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"{name} has no checkpoint of step {step}", f"it has: {known}")
        return steps[step]
    for number in sorted(steps, reverse=True):
        if is_complete(steps[number]) is not False:
            return steps[number]
    raise UserError(f"{name} has no complete checkpoint", "`rlctl ckpt ls` lists what there is")


def listing(name: str | None) -> list[Found]:
    """Return the checkpoints of a run or folder, or of all runs; the newest of each last."""
    if name is None:
        return [found for run in rundir.every(runs_root()) for found in _of_run(run)]
    run = find_run(name)
    return _of_run(run) if run is not None else _of_folder(Path(name), None)


def to_prune(found: Sequence[Found], keep_last: int, keep: Iterable[int]) -> list[Found]:
    """Return the checkpoints that go: all but the newest complete ones, those of steps to keep, and the last complete.

    Where no manifest tells which are complete, all count as such.
    """
    if any(one.step < 0 for one in found):
        raise UserError(f"{found[0].path} is no folder of checkpoints by step", "name the folder above them, or a run")
    unknown_steps = set(keep) - {one.step for one in found}
    if unknown_steps:
        raise UserError(
            f"there is no checkpoint of step {', '.join(map(str, sorted(unknown_steps)))}", "`rlctl ckpt ls` lists them"
        )
    whole = [one for one in found if one.complete is not False]
    if found and not whole:
        raise UserError("none of the checkpoints is complete: nothing is removed", "look at them with `rlctl ckpt ls`")
    staying = {one.step for one in whole[-max(keep_last, 1) :]}
    return [one for one in found if one.step not in staying | set(keep)]


def step_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of steps in a folder, by their number."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def is_complete(folder: Path) -> bool | None:
    """Say whether a checkpoint is whole by its manifest; None where it has none."""
    with train_extra():
        from rlctl_train.checkpoint import store
    return store.is_complete(folder) if (folder / store.MANIFEST).is_file() else None


def _of_run(run: Run) -> list[Found]:
    return _of_folder(run.files.checkpoints, run.name, _best_step(run))


def _of_folder(folder: Path, run: str | None, best: int | None = None) -> list[Found]:
    steps = sorted(step_folders(folder)) or ([(-1, folder)] if run is None and folder.is_dir() else [])
    if run is None and not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name a run or a folder of checkpoints")
    done = {number: is_complete(path) for number, path in steps}
    last = max((number for number, whole in done.items() if whole is not False), default=None)
    return [_found(run, number, path, done[number], best=number == best, last=number == last) for number, path in steps]


def _found(run: str | None, step: int, path: Path, complete: bool | None, *, best: bool, last: bool) -> Found:
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    num_bytes, modified = sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=0.0)
    return Found(run, step, path, _kind(path), num_bytes, modified, complete, best, last)


def _kind(path: Path) -> str | None:
    with train_extra():
        from rlctl_train.checkpoint import kinds
    try:
        return kinds.recognise(path)[0]
    except UserError:
        return None


def _best_step(run: Run) -> int | None:
    """Return the step with the highest held-out accuracy among those that have a checkpoint."""
    steps = dict(step_folders(run.files.checkpoints))
    scores = {row["step"]: value for row in metric_rows(run) if (value := accuracy(row)) is not None}
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)
