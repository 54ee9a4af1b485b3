"""A checkpoint of any kind as a Hugging Face folder: first a plan, with all that stands against it; then the files.

Nothing is dropped, renamed or cut without being said: the plan names it. Weights stream from the files they lie in;
config, tokenizer and template are copied. The folder has its name only when it is whole (`workplace`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.merge_plan import plan_merge
from rlctl_train.checkpoint.merge_types import MergeOptions, MergePlan, Problem
from rlctl_train.checkpoint.safetensors_writer import ALGORITHM, DTYPES, Finished, write
from rlctl_train.checkpoint.store import MANIFEST
from rlctl_train.checkpoint.workplace import Workplace, claimed
from rlctl_train.config.errors import DOES_NOT_FIT, FAILED, UserError
from rlctl_train.config.layout import write_json

__all__ = ["MergeOptions", "MergePlan", "Problem", "fingerprint", "merge", "plan_merge"]

HASHED_BYTES = 2**26
"""Files beside the weights up to this size are listed with their SHA-256."""
SPARE_BYTES = 2**26
"""Room for config, tokenizer and journal beside the weights."""


def merge(
    plan: MergePlan,
    target: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the folder; goes on where an earlier try with the same input and options ended.

    `on_progress` hears of the bytes of weights that are written, and of all. Raises UserError for what is in the way.
    """
    for first in plan.problems[:1]:
        more = f" (and {len(plan.problems) - 1} more problems)" if len(plan.problems) > 1 else ""
        raise UserError(first.what + more, first.remedy)
    target = target.absolute()
    try:
        with claimed(target) as place:
            _merge_in(place, plan, overwrite=overwrite, on_progress=on_progress)
    except OSError as error:
        raise _failed(error, target) from error
    except EOFError as error:
        raise UserError(
            str(error), f"the checkpoint is damaged: `rlctl ckpt verify {plan.source}`", exit_code=FAILED
        ) from error
    except OverflowError as error:
        raise UserError(str(error), "choose --dtype bfloat16 or float32", exit_code=FAILED) from error
    return target


def fingerprint(plan: MergePlan) -> str:
    """Return a hash of all that the output follows from: input files with sizes and times, options, layout."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in plan.inputs]
    headers = [(file.name, hashlib.sha256(file.header).hexdigest()) for file in plan.files]
    content = [
        stats,
        headers,
        {key: str(value) for key, value in asdict(plan.options).items()},
        plan.texts,
        plan.folded,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _merge_in(place: Workplace, plan: MergePlan, *, overwrite: bool, on_progress: Callable[[int, int], None]) -> None:
    mark = fingerprint(plan)
    if not place.is_done(mark):
        if place.target.exists() and not overwrite:
            remedy = "choose another --out, or replace it with --overwrite"
            _clean_if_new(place)
            raise UserError(f"{place.target} exists already", remedy)
        done = place.resume(mark)
        sizes = {output.name: output.nbytes for output in plan.outputs()}
        before, total = sum(sizes[name] for name in done), sum(sizes.values())
        _check_space(place, plan)
        finished = dict(done)

        def note(batch: Sequence[Finished]) -> None:
            place.note(batch)
            finished.update((one.name, one.checksum) for one in batch)

        write(
            place.out, plan.files, done=done, on_finished=note,
            on_progress=lambda written: on_progress(min(before + written, total), total),
        )  # fmt: skip
        _write_small(place.out, plan)
        write_json(place.out / MANIFEST, _manifest(place.out, plan, finished, mark))
        place.publish()
    place.clean()


def _clean_if_new(place: Workplace) -> None:
    if not place.out.exists():
        place.clean()


def _check_space(place: Workplace, plan: MergePlan) -> None:
    there = sum(path.stat().st_blocks * 512 for path in place.out.rglob("*") if path.is_file())
    needed, free = max(plan.nbytes - there, 0) + SPARE_BYTES, shutil.disk_usage(place.root).free
    if free < needed:
        raise UserError(
            f"the merge needs {needed / 1e9:.2f} GB more on the disk of {place.target.parent}, "
            f"and {free / 1e9:.2f} GB are free",
            "free some space, choose another --out, or a smaller --dtype",
            exit_code=DOES_NOT_FIT,
        )


def _write_small(out: Path, plan: MergePlan) -> None:
    """Write all but the weights, in place of what a broken off try may have left of it."""
    weights = {out / file.name for file in plan.files}
    for path in out.rglob("*"):
        if path.is_file() and path not in weights:
            path.unlink()
    for name, path in plan.copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    for name, text in plan.texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")


def _manifest(out: Path, plan: MergePlan, checksums: dict[str, str], mark: str) -> dict[str, Any]:
    headers = {file.name: file.header for file in plan.files}
    listed: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(out)), path.stat().st_size
        listed[name] = {"bytes": size, "sha256": None}
        if name in headers:
            listed[name]["header_sha256"] = hashlib.sha256(headers[name]).hexdigest()
        elif size <= HASHED_BYTES:
            listed[name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = {
        output.name: {
            "dtype": DTYPES[output.dtype], "shape": list(output.tensor.shape), "bytes": output.nbytes,
            "checksum": checksums[output.name], "file": file.name, "offset": offset,
        }
        for file in plan.files
        for offset, output in file.outputs
    }  # fmt: skip
    return {
        "schema_version": 1,
        "kind": "peft" if plan.options.adapter == "only" else "huggingface",
        "checksum": ALGORITHM,
        "tensors": tensors,
        "files": listed,
        "source": {
            "path": str(plan.source), "kind": plan.kind, "fingerprint": mark,
            "options": {key: value if value is None else str(value) for key, value in asdict(plan.options).items()},
        },
        "folded": list(plan.folded), "tied": list(plan.tied), "trimmed": list(plan.trimmed),
        "dropped": list(plan.dropped), "notes": list(plan.notes),
    }  # fmt: skip


def _failed(error: OSError, target: Path) -> UserError:
    remedies = {
        errno.ENOSPC: "free some space on that disk and give the same command again: it goes on where it ended",
        errno.EDQUOT: "make room in your quota and give the same command again: it goes on where it ended",
        errno.EROFS: "choose an --out on a disk that can be written",
        errno.EACCES: "mend the permissions and give the same command again: it goes on where it ended",
        errno.EPERM: "mend the permissions and give the same command again: it goes on where it ended",
        errno.ENOENT: "a file went away while it was read: see that nothing else cleans up there, and try again",
    }
    remedy = remedies.get(error.errno or 0, "mend it and give the same command again: it goes on where it ended")
    return UserError(f"merging into {target} failed: {error}", remedy, exit_code=FAILED)
