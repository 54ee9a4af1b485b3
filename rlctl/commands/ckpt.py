"""`rlctl ckpt ls|inspect|merge|convert|reshard|verify|diff|prune`: what can be done with checkpoints that exist."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlctl import render
from rlctl.commands import _ckpt_find, _ckpt_view
from rlctl.commands._ckpt_find import Found, checkpoint_path
from rlctl.commands._group import HelpfulGroup
from rlctl.commands._workshop import train_extra
from rlctl.render import OutputOption
from rlctl.spelling import unknown
from rlctl_train.config.errors import DOES_NOT_FIT, FAILED, INTERRUPTED, OK, USAGE, UserError

if TYPE_CHECKING:
    from rlctl_train.checkpoint.agreement import Agreement
    from rlctl_train.checkpoint.compare import Comparison
    from rlctl_train.checkpoint.merge_types import MergeOptions
    from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor

app = typer.Typer(
    cls=HelpfulGroup,
    rich_markup_mode=None,
    help="What can be done with checkpoints that exist.",
)

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or a run: then its newest complete one.")
]
StepOption = Annotated[int | None, typer.Option("--step", min=0, help="Of a run or folder of steps: this one.")]
KindOption = Annotated[str | None, typer.Option("--kind", help="Take it for this kind of checkpoint, without looking.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist.")]
BaseOption = Annotated[
    Path | None, typer.Option("--base", metavar="DIR", help="Weights below an adapter that comes alone.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="DIR", help="Config and tokenizer, if not the checkpoint's own.")
]
DtypeOption = Annotated[
    Literal["keep", "bfloat16", "float16", "float32"], typer.Option("--dtype", help="Of the weights; keep: as stored.")
]
ShardOption = Annotated[float, typer.Option("--shard-size", min=0.001, help="Largest weight file, in GB (10^9 bytes).")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run and copy the code files that come with the config.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the target, once the new one is whole.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


@app.command(name="ls")
def list_checkpoints(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Run or folder; default all runs.")] = None,
    output: OutputOption = "text",
) -> None:
    """List checkpoints: step, kind, size, age, whether complete, the best and the last.

    Best is the one of the highest held-out accuracy.
    """
    found = _ckpt_find.listing(name)
    if render.document(output, checkpoints=[asdict(one) | {"path": str(one.path)} for one in found]):
        return
    if not found:
        render.say(f"no checkpoints in {name or _ckpt_find.runs_root()}")
        return
    render.table(("RUN", "STEP", "KIND", "SIZE", "AGE", "COMPLETE", "", "PATH"), map(_row, found))


def _row(found: Found) -> tuple[object, ...]:
    marks = " ".join(word for word, is_so in (("best", found.best), ("last", found.last)) if is_so)
    age = render.duration(max(0.0, time.time() - found.modified))
    step = None if found.step < 0 else found.step
    return found.run, step, found.kind, render.size(found.num_bytes), age, found.complete, marks, str(found.path)


@app.command()
def inspect(
    path: PathArgument, step: StepOption = None, kind: KindOption = None, output: OutputOption = "text"
) -> None:
    """Say what a checkpoint is and holds: kind and why, facts, tensors, adapter, optimizer."""
    checkpoint, reason = _read(checkpoint_path(path, step), kind)
    content = _ckpt_view.contents(checkpoint, reason)
    if not render.document(output, **json.loads(json.dumps(content, default=str))):
        _ckpt_view.show_contents(content)


@app.command()
def merge(
    path: PathArgument,
    out: OutOption,
    step: StepOption = None,
    kind: KindOption = None,
    dtype: DtypeOption = "keep",
    shard_size: ShardOption = 5.0,
    adapter: Annotated[
        Literal["fold", "keep", "only"],
        typer.Option(help="A LoRA adapter: added into the weights, kept in adapter/ beside them, or written alone."),
    ] = "fold",
    value_head: Annotated[
        Literal["keep", "drop"] | None,
        typer.Option(help="A value or reward head; default: kept where the config's class has it, else refused."),
    ] = None,
    base: BaseOption = None,
    config: ConfigOption = None,
    trust_remote_code: TrustOption = False,
    allow_extra: Annotated[bool, typer.Option("--allow-extra", help="Write tensors the model does not know.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Write tied embeddings that differ as two.")] = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Then upload it to this hub repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default private.")] = False,
    yes: YesOption = False,
    output: OutputOption = "text",
) -> None:
    """Write a checkpoint as a Hugging Face folder that transformers and vLLM load.

    Memory stays near the largest tensor. A merge that was broken off goes on where it ended; the folder appears when
    all of it is there.
    """
    with train_extra():
        from rlctl_train.checkpoint.merge_types import MergeOptions
    options = MergeOptions(
        dtype, shard_size, adapter, value_head, base, config, trust_remote_code, allow_extra, untie
    )  # fmt: skip
    if push is not None and not _may_push(push, public=public, yes=yes):
        raise typer.Exit(OK)
    checkpoint, _ = _read(checkpoint_path(path, step), kind)
    _merge(checkpoint, options, out, overwrite=overwrite, dry_run=dry_run, output=output)
    if push is not None and not dry_run:
        from rlctl_train.checkpoint import hub

        render.say(f"pushed to {hub.push(out, push, private=not public)}")


@app.command()
def convert(
    path: PathArgument,
    to: Annotated[str, typer.Option("--to", help="Kind to write: huggingface, peft.")],
    out: OutOption,
    step: StepOption = None,
    kind: KindOption = None,
    dtype: DtypeOption = "keep",
    base: BaseOption = None,
    config: ConfigOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    output: OutputOption = "text",
) -> None:
    """Write a checkpoint as one of another kind; `merge` has more choices for Hugging Face folders."""
    if to not in CONVERSIONS:
        raise unknown("kind to write", to, CONVERSIONS, f"choose one of {', '.join(CONVERSIONS)}")
    with train_extra():
        from rlctl_train.checkpoint.merge_types import MergeOptions
    options = MergeOptions(
        dtype, base=base, config=config, trust_remote_code=trust_remote_code, adapter=CONVERSIONS[to]
    )  # fmt: skip
    checkpoint, _ = _read(checkpoint_path(path, step), kind)
    _merge(checkpoint, options, out, overwrite=overwrite, dry_run=False, output=output)


CONVERSIONS: dict[str, Literal["fold", "only"]] = {"huggingface": "fold", "peft": "only"}
"""Kind to write -> what becomes of an adapter."""


def _merge(
    checkpoint: Checkpoint,
    options: MergeOptions,
    out: Path,
    *,
    overwrite: bool,
    dry_run: bool,
    output: render.Output,
) -> None:
    with train_extra():
        from rlctl_train.checkpoint.merge import merge as write
        from rlctl_train.checkpoint.merge import plan_merge
    plan = plan_merge(checkpoint, options)
    _ckpt_view.say_plan(plan)
    if plan.problems or dry_run:
        for problem in plan.problems:
            render.error(problem.what, problem.remedy)
        render.document(output, out=str(out), written=False, **_ckpt_view.plan_content(plan))
        if not plan.problems:
            render.say(f"would write {sum(1 for _ in plan.outputs())} tensors, {render.size(plan.nbytes)}, to {out}")
        raise typer.Exit(USAGE if plan.problems else OK)
    began = time.monotonic()
    with _interruptible(out), render.progress("merging") as tell:
        write(plan, out, overwrite=overwrite, on_progress=tell)
    seconds = time.monotonic() - began
    render.document(output, out=str(out), written=True, seconds=seconds, **_ckpt_view.plan_content(plan))
    dtype = str(plan.dtype).removeprefix("torch.")
    number = sum(1 for _ in plan.outputs())
    render.say(f"wrote {number} tensors, {render.size(plan.nbytes)}, {dtype}, to {out} in {render.duration(seconds)}")


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does, and say how the work goes on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        remedy = "give the same command again: it goes on where it ended"
        raise UserError(f"merging into {out} was interrupted", remedy, exit_code=INTERRUPTED) from interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def _may_push(repo: str, *, public: bool, yes: bool) -> bool:
    """See that the hub can be reached, and ask; before the work, so that nobody waits for a refusal."""
    with train_extra():
        from rlctl_train.checkpoint import hub
    user = hub.check(repo)
    return yes or render.ask(f"Push to {repo} as {user}, {'public' if public else 'private'}?", costs=True)


@app.command()
def reshard(
    path: PathArgument,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Number of trainer ranks to write for.")],
    out: OutOption,
    step: StepOption = None,
) -> None:
    """Rewrite a checkpoint of ours for another number of ranks, optimizer included, a file a rank.

    Training resumes from any number of ranks as it is; this is for moving a checkpoint in parts.
    """
    with train_extra():
        from rlctl_train.checkpoint.reshard import reshard as rewrite
    folder = checkpoint_path(path, step)
    rewrite(folder, out, ranks)
    render.say(f"wrote {folder} for {ranks} rank(s) to {out}, each piece held against its checksum")


@app.command()
def verify(
    path: PathArgument,
    step: StepOption = None,
    kind: KindOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="PATH", help="Also compare with this checkpoint, tensor by tensor.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also load the folder and compare log-probs with the trainer's.")
    ] = False,
    probe: Annotated[Path | None, typer.Option(metavar="FILE", help="Recorded log-probs; default probe.json.")] = None,
    trust_remote_code: TrustOption = False,
    output: OutputOption = "text",
) -> None:
    """Look for flipped bits, cut or missing files and swapped contents. Exit code 3 where anything is wrong.

    Checksums come from the manifest; without one, form and readability are all that can be looked at.
    """
    with train_extra():
        from rlctl_train.checkpoint.verify import verify as look
    folder = checkpoint_path(path, step)
    with render.progress("verifying") as tell:
        verdict = look(folder, kind, on_progress=tell)
    content = _ckpt_view.verdict_content(verdict)
    comparison = agreement = None
    if against is not None and not verdict.findings:
        comparison = _compare(folder, checkpoint_path(against), kind)
        content["comparison"] = _ckpt_view.comparison_content(comparison)
    if (generate or probe is not None) and not verdict.findings:
        agreement = _generate(folder, probe, trust_remote_code=trust_remote_code)
        content["generate"] = asdict(agreement) | {
            "within": agreement.within, "probe": str(agreement.probe), "dtype": str(agreement.dtype),
        }  # fmt: skip
    if not render.document(output, **content):
        _ckpt_view.show_verdict(verdict)
        if comparison is not None:
            _ckpt_view.show_comparison(comparison)
        if agreement is not None:
            _say_agreement(agreement)
    good = not verdict.findings and all(one is None or one.within for one in (comparison, agreement))
    raise typer.Exit(OK if good else DOES_NOT_FIT)


def _generate(folder: Path, probe: Path | None, *, trust_remote_code: bool) -> Agreement:
    with train_extra():
        from rlctl_train.checkpoint.agreement import agreement, find_probe
    return agreement(folder, probe or find_probe([folder, folder.parent]), trust_remote_code=trust_remote_code)


def _say_agreement(found: Agreement) -> None:
    word = "agree" if found.within else "do not agree"
    render.say(
        f"log-probs of {found.num_tokens} tokens in {found.num_sequences} sequences {word} with {found.probe}: "
        f"mean difference {found.mean_abs:.3g} (at most {found.tolerance:g}), largest {found.max_abs:.3g}"
    )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint or run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    atol: Annotated[float, typer.Option(min=0, help="Absolute difference that is no difference.")] = 0.0,
    rtol: Annotated[float, typer.Option(min=0, help="The same as a share of B's number.")] = 0.0,
    kind: KindOption = None,
    output: OutputOption = "text",
) -> None:
    """Compare two checkpoints tensor by tensor, the worst first. Exit code 1 where they differ beyond the tolerance."""
    found = _compare(checkpoint_path(a), checkpoint_path(b), kind, atol=atol, rtol=rtol)
    if not render.document(output, a=a, b=b, **_ckpt_view.comparison_content(found)):
        _ckpt_view.show_comparison(found)
    raise typer.Exit(OK if found.within else FAILED)


def _compare(a: Path, b: Path, kind: str | None, *, atol: float = 0.0, rtol: float = 0.0) -> Comparison:
    with train_extra():
        from rlctl_train.checkpoint.compare import compare
    left, right = (_all_tensors(_read(path, kind)[0]) for path in (a, b))
    with render.progress("comparing") as tell:
        return compare(left, right, atol=atol, rtol=rtol, on_progress=tell)


def _all_tensors(checkpoint: Checkpoint) -> dict[str, NamedTensor]:
    """Return weights and adapter together: their names never meet."""
    return {**checkpoint.tensors, **(checkpoint.adapter.tensors if checkpoint.adapter else {})}


@app.command()
def prune(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a folder of checkpoints by step.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="Newest complete ones that stay.")],
    keep: Annotated[list[int] | None, typer.Option("--keep", metavar="STEP", help="One more; may be repeated.")] = None,
    yes: YesOption = False,
    output: OutputOption = "text",
) -> None:
    """Remove old checkpoints. The last complete one always stays."""
    run = _ckpt_find.find_run(name)
    if run is not None and run.is_live():
        remedy = f"it prunes by itself (checkpoint.keep_last); or end it with `rlctl runs stop {run.name}`"
        raise UserError(f"run {run.name!r} is running", remedy)
    found = _ckpt_find.listing(name)
    removed = _ckpt_find.to_prune(found, keep_last, keep or ())
    freed = sum(one.num_bytes for one in removed)
    if removed:
        steps = ", ".join(str(one.step) for one in removed)
        question = f"Remove {len(removed)} of {len(found)} checkpoints (steps {steps}), {render.size(freed)}?"
        if not yes and not render.ask(question, costs=True):
            raise typer.Exit(OK)
    for one in removed:
        _remove(one.path)
    kept = [one.step for one in found if one not in removed]
    if not render.document(output, removed=[one.step for one in removed], kept=kept, freed_bytes=freed):
        render.say(f"removed {len(removed)} checkpoints, {render.size(freed)}; kept steps {', '.join(map(str, kept))}")


def _remove(path: Path) -> None:
    """Take the name away first: a removal that is broken off leaves nothing that looks whole."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error}", "mend the permissions", exit_code=FAILED) from error


def _read(path: Path, kind: str | None) -> tuple[Checkpoint, str]:
    """Return a checkpoint and why it is taken for its kind."""
    with train_extra():
        from rlctl_train.checkpoint import kinds
    if kind is not None and kind not in kinds.KINDS:
        raise unknown("kind of checkpoint", kind, kinds.KINDS, f"name one of {', '.join(kinds.KINDS)}")
    known, reason = (kind, "as --kind says") if kind is not None else kinds.recognise(path)
    return kinds.read(path, known), reason
