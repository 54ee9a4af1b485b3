"""What a checkpoint holds, what a merge does and what differs, as tables and as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlctl import render

if TYPE_CHECKING:
    from rlctl_train.checkpoint.compare import Comparison
    from rlctl_train.checkpoint.merge_types import MergePlan
    from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor
    from rlctl_train.checkpoint.verify import Verdict

NUM_DIFFERENCES = 20
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def contents(checkpoint: Checkpoint, reason: str) -> dict[str, Any]:
    """Return everything `inspect` knows, as plain values."""
    from rlctl_train.checkpoint.stored import Part  # by now torch is there

    adapter = checkpoint.adapter
    beside = [part.contents for part in checkpoint.others.values() if isinstance(part, Part)]
    return {
        "kind": checkpoint.kind,
        "reason": reason,
        "path": str(checkpoint.path),
        "config": None if checkpoint.hf_folder is None else str(checkpoint.hf_folder),
        "facts": {**checkpoint.facts, **{name: value for part in beside for name, value in part.facts.items()}},
        "notes": [*checkpoint.notes, *(line for part in beside for line in part.notes)],
        "totals": _totals(checkpoint.tensors),
        "tensors": _tensors(checkpoint.tensors),
        "adapter": None if adapter is None else {
            "settings": dict(adapter.settings), "totals": _totals(adapter.tensors),
            "tensors": _tensors(adapter.tensors),
        },
        "others": {part: {"totals": _totals(of), "tensors": _tensors(of)} for part, of in checkpoint.others.items()},
        "files": [str(file) for file in checkpoint.files],
    }  # fmt: skip


def show_contents(content: Mapping[str, Any]) -> None:
    """Print a checkpoint as tables: what it is, and its tensors by layer pattern."""
    facts = [("kind", f"{content['kind']} ({content['reason']})"), ("path", content["path"])]
    facts += [("config", content["config"]), *((name, render.cell(value)) for name, value in content["facts"].items())]
    facts.append(("weights", _say(content["totals"])))
    if (adapter := content["adapter"]) is not None:
        told = ", ".join(f"{key} {adapter['settings'].get(key)}" for key in ("r", "lora_alpha"))
        facts.append(("adapter", f"{told}: {_say(adapter['totals'])}"))
    facts += [(part, _say(of["totals"])) for part, of in content["others"].items()]
    render.table(("", ""), facts)
    render.text("")
    render.table(("TENSORS", "NUMBER", "SHAPE", "DTYPE", "SIZE"), _patterns(content["tensors"]))
    for line in content["notes"]:
        render.note(line)


def _patterns(tensors: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(NUMBER.sub("*", name), []).append(tensor)
    rows = []
    for pattern, group in groups.items():
        shapes = {"x".join(map(str, tensor["shape"])) or "()": None for tensor in group}
        dtypes = {tensor["dtype"]: None for tensor in group}
        num_bytes = render.size(sum(tensor["bytes"] for tensor in group))
        rows.append((pattern, len(group), " or ".join(shapes), " and ".join(dtypes), num_bytes))
    return rows


def _totals(tensors: Mapping[str, NamedTensor]) -> dict[str, Any]:
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        by_dtype[_name(tensor)] = by_dtype.get(_name(tensor), 0) + math.prod(tensor.shape)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {"tensors": len(tensors), "elements": by_dtype, "bytes": num_bytes}


def _say(totals: Mapping[str, Any]) -> str:
    elements = ", ".join(f"{number:,} {dtype}" for dtype, number in totals["elements"].items())
    return f"{totals['tensors']} tensors, {elements or 'no'} elements, {render.size(totals['bytes'])}"


def _tensors(tensors: Mapping[str, NamedTensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": _name(tensor), "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for name, tensor in tensors.items()
    }


def _name(tensor: NamedTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def plan_content(plan: MergePlan) -> dict[str, Any]:
    """Return what a merge will do, as plain values."""
    return {
        "source": str(plan.source), "kind": plan.kind, "dtype": str(plan.dtype).removeprefix("torch."),
        "bytes": plan.nbytes, "tensors": sum(1 for _ in plan.outputs()),
        "files": [{"name": file.name, "bytes": file.nbytes, "tensors": len(file.outputs)} for file in plan.files],
        "copied": sorted(plan.copies), "folded": list(plan.folded), "tied": list(plan.tied),
        "trimmed": list(plan.trimmed), "dropped": list(plan.dropped), "notes": list(plan.notes),
        "problems": [{"what": one.what, "remedy": one.remedy} for one in plan.problems],
    }  # fmt: skip


def say_plan(plan: MergePlan) -> None:
    """Tell what a merge changes beside copying."""
    if plan.folded:
        render.say(f"the adapter is folded into {len(plan.folded)} weights")
    for word, names in (("written once, tied", plan.tied), ("trimmed", plan.trimmed), ("dropped", plan.dropped)):
        if names:
            render.say(f"{word}: {', '.join(names)}")
    for line in plan.notes:
        render.note(line)


def verdict_content(verdict: Verdict) -> dict[str, Any]:
    """Return what a verification found, as plain values."""
    return {
        "path": str(verdict.path), "manifest": None if verdict.manifest is None else str(verdict.manifest),
        "files": verdict.num_files, "tensors": verdict.num_tensors, "bytes": verdict.num_bytes,
        "findings": [{"fault": one.fault, "where": one.where, "what": one.what} for one in verdict.findings],
    }  # fmt: skip


def show_verdict(verdict: Verdict) -> None:
    """Print what a verification found."""
    if verdict.findings:
        rows = [(one.fault, one.where, one.what) for one in verdict.findings]
        render.table(("FAULT", "WHERE", "WHAT"), rows)
    how = "against its manifest" if verdict.manifest else "without a manifest: its form and every byte's being there"
    looked = f"{verdict.num_files} files, {verdict.num_tensors} tensors, {render.size(verdict.num_bytes)} read"
    render.say(f"{looked}, {how}: {'damaged' if verdict.findings else 'clean'}")


def comparison_content(found: Comparison) -> dict[str, Any]:
    """Return what differs, as plain values; infinite differences are written as text."""
    return {
        "equal": all(one.bit_equal for one in found.tensors) and not found.only_a and not found.only_b,
        "within": found.within, "atol": found.atol, "rtol": found.rtol,
        "only_a": list(found.only_a), "only_b": list(found.only_b),
        "tensors": [
            {
                "name": one.name, "bit_equal": one.bit_equal,
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in one.dtypes],
                "shapes": [list(shape) for shape in one.shapes],
                "max_abs": _number(one.max_abs), "max_rel": _number(one.max_rel), "mean_abs": _number(one.mean_abs),
                "beyond": one.num_beyond,
            }
            for one in found.tensors
        ],
    }  # fmt: skip


def show_comparison(found: Comparison) -> None:
    """Print what differs, the worst first."""
    for side, names in (("a", found.only_a), ("b", found.only_b)):
        for name in names:
            render.text(f"only in {side}: {name}")
    differing = [one for one in found.tensors if not one.bit_equal]
    rows = [
        (
            one.name, _both(*("x".join(map(str, shape)) or "()" for shape in one.shapes)),
            _both(*(str(dtype).removeprefix("torch.") for dtype in one.dtypes)),
            *((one.max_abs, one.max_rel, one.mean_abs) if one.same_shape else (None, None, None)),
        )
        for one in differing[:NUM_DIFFERENCES]
    ]  # fmt: skip
    if rows:
        render.table(("TENSOR", "SHAPE", "DTYPE", "MAX ABS", "MAX REL", "MEAN ABS"), rows)
    if len(differing) > NUM_DIFFERENCES:
        render.say(f"and {len(differing) - NUM_DIFFERENCES} more; -o json has all")
    equal = len(found.tensors) - len(differing)
    render.say(f"{equal} tensors are equal to the bit, {len(differing)} differ")


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} and {b}"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
