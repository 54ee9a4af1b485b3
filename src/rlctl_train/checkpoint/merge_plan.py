"""What a merge will write, worked out in steps over named parts; each step says what it changed or what is wrong."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlctl_train.checkpoint import fold, kinds
from rlctl_train.checkpoint.compare import is_equal
from rlctl_train.checkpoint.expected import Expected, expected
from rlctl_train.checkpoint.merge_types import MergeOptions, MergePlan, Problem
from rlctl_train.checkpoint.parts import cut
from rlctl_train.checkpoint.probe import PROBE
from rlctl_train.checkpoint.safetensors_writer import DTYPES, Output, WeightFile, arrange
from rlctl_train.checkpoint.stored import Adapter, Checkpoint, NamedTensor, StoredTensor
from rlctl_train.config.errors import UserError

NUM_NAMED = 10
HEAD = re.compile(r"(v_head|value_head|reward_head|score|classifier|summary)\..+")
"""Names of layers that answer with values or rewards in place of tokens."""
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", PROBE,
)  # fmt: skip
"""What else belongs to a model, beside its config."""
CODE = "*.py"
ADAPTER_BYTES = 10**15
"""An adapter is one file."""


@dataclass(frozen=True)
class Part:
    """A tensor on its way, and the dtype that it keeps if none is chosen."""

    tensor: NamedTensor
    dtype: torch.dtype


@dataclass
class Draft:
    """A plan in the making."""

    options: MergeOptions
    parts: dict[str, Part]
    config: dict[str, Any]
    expected: Expected | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    heads: set[str] = field(default_factory=set)
    """Names of head tensors that the model's class does not know, kept on purpose."""

    def refuse(self, what: str, remedy: str) -> None:
        """Put down a problem."""
        self.problems.append(Problem(what, remedy))


def plan_merge(checkpoint: Checkpoint, options: MergeOptions) -> MergePlan:
    """Work out what a merge would write; reads names and shapes, and of weights only what may be tied."""
    if options.adapter == "only":
        return _plan_adapter(checkpoint, options)
    base = _base(checkpoint, options)
    folder = options.config or checkpoint.hf_folder or base.hf_folder
    draft = Draft(options, _parts(base.tensors), _config(folder, checkpoint.path), notes=list(checkpoint.notes))
    assert folder is not None
    _settle_architecture(draft)
    _know(draft, folder)
    if checkpoint.adapter is not None and options.adapter == "fold":
        _fold(draft, checkpoint.adapter)
    _to_file_names(draft)
    _settle_heads(draft)
    _trim(draft)
    _tie(draft)
    _check(draft)
    dtype = _settle_dtype(draft)
    files = arrange(_outputs(draft), "model", int(options.shard_gb * 1e9))
    texts = {"config.json": json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n", **_index(files)}
    if checkpoint.adapter is not None and options.adapter == "keep":
        files += _adapter_files(checkpoint.adapter, options, "adapter/")
        texts["adapter/adapter_config.json"] = _json(checkpoint.adapter.settings)
    copies = _copies(folder, trust_remote_code=options.trust_remote_code)
    if (checkpoint.path / PROBE).is_file():
        copies[PROBE] = checkpoint.path / PROBE
    if not options.trust_remote_code and any(folder.glob(CODE)):
        draft.notes.append(f"the code files of {folder} are not copied without --trust-remote-code")
    inputs = _inputs((*checkpoint.files, *base.files, *copies.values()), files)
    return MergePlan(
        checkpoint.kind, checkpoint.path, options, files, texts, copies, inputs, dtype, tuple(draft.folded),
        tuple(draft.tied), tuple(draft.trimmed), tuple(draft.dropped), tuple(draft.notes), tuple(draft.problems),
    )  # fmt: skip


def _plan_adapter(checkpoint: Checkpoint, options: MergeOptions) -> MergePlan:
    """Plan a folder in PEFT's form."""
    if checkpoint.adapter is None:
        raise UserError(f"{checkpoint.path} has no adapter", "leave --adapter only out")
    files = _adapter_files(checkpoint.adapter, options, "")
    folder = options.config or checkpoint.hf_folder
    copies = {} if folder is None else _copies(folder, trust_remote_code=False)
    texts = {"adapter_config.json": _json(checkpoint.adapter.settings)}
    dtype = _most_of([output for file in files for _, output in file.outputs])
    return MergePlan(
        checkpoint.kind, checkpoint.path, options, files, texts, copies,
        _inputs((*checkpoint.files, *copies.values()), files), dtype, notes=checkpoint.notes,
    )  # fmt: skip


def _base(checkpoint: Checkpoint, options: MergeOptions) -> Checkpoint:
    """Return the checkpoint that holds the weights."""
    if checkpoint.tensors:
        if options.base is not None:
            raise UserError(f"{checkpoint.path} has weights of its own", "leave --base out: it is for adapters alone")
        return checkpoint
    if checkpoint.adapter is None:
        raise UserError(f"{checkpoint.path} has no weights", "name a checkpoint that has")
    if options.base is None:
        named = checkpoint.adapter.settings.get("base_model_name_or_path")
        raise UserError(
            f"{checkpoint.path} is an adapter alone, trained on {named}",
            "name the folder of its base with --base DIR, or copy it with --adapter only",
        )
    return kinds.read(options.base)


def _parts(tensors: Mapping[str, NamedTensor]) -> dict[str, Part]:
    return {name: Part(tensor, tensor.dtype) for name, tensor in tensors.items()}


def _config(folder: Path | None, path: Path) -> dict[str, Any]:
    if folder is None or not (folder / "config.json").is_file():
        where = path if folder is None else folder
        raise UserError(
            f"{where} has no config.json", "name the folder of the model's config and tokenizer with --config"
        )
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{folder / 'config.json'} is no JSON: {error}", "mend it, or name another folder with --config"
        ) from error


def _settle_architecture(draft: Draft) -> None:
    """Name the class of a critic whose config is still that of the language model it began as."""
    names, architecture = set(draft.parts), next(iter(draft.config.get("architectures") or ()), "")
    if "score.weight" not in names or "lm_head.weight" in names or not architecture.endswith("ForCausalLM"):
        return
    task = "ForTokenClassification" if "score.bias" in names else "ForSequenceClassification"
    num_labels = draft.parts["score.weight"].tensor.shape[0]
    draft.config |= {
        "architectures": [architecture.removesuffix("ForCausalLM") + task],
        "id2label": {str(label): f"LABEL_{label}" for label in range(num_labels)},
        "label2id": {f"LABEL_{label}": label for label in range(num_labels)},
    }
    draft.notes.append(
        f"the config says {architecture}, the weights end in `score`: written as {task.removeprefix('For')}"
    )


def _know(draft: Draft, folder: Path) -> None:
    found = expected(draft.config, folder, trust_remote_code=draft.options.trust_remote_code)
    if isinstance(found, str):
        draft.notes.append(f"names and shapes were not checked: {found}")
    else:
        draft.expected = found


def _fold(draft: Draft, adapter: Adapter) -> None:
    content = fold.contents(adapter)
    for name, tensor in content.replaced.items():
        found = _find(draft, name) or name
        dtype = draft.parts[found].dtype if found in draft.parts else tensor.dtype
        draft.parts[found] = Part(tensor, dtype)
    lacking: list[str] = []
    for pair in content.pairs:
        name = _find(draft, f"{pair.layer}.weight")
        if name is None:
            lacking.append(pair.layer)
            continue
        part = draft.parts[name]
        if tuple(part.tensor.shape) != pair.shape():
            shapes = f"{list(part.tensor.shape)}, its adapter {list(pair.shape())}"
            draft.refuse(f"{name} is {shapes}", "name the base that the adapter was trained on")
            continue
        draft.parts[name] = Part(fold.FoldedTensor(part.tensor, pair), part.dtype)
        draft.folded.append(name)
    if lacking:
        draft.refuse(
            f"the adapter has {len(lacking)} layers that the weights lack: {_named(lacking)}",
            "name the base that the adapter was trained on, or keep it beside the base with --adapter keep",
        )


def _find(draft: Draft, name: str) -> str | None:
    """Return the part that a name of the model in memory stands for; a tied one gets a part of its own."""
    if name in draft.parts:
        return name
    if draft.expected is None:
        return None
    blocks = draft.expected.inner.get(name, ())
    if len(blocks) == 1 and blocks[0].name in draft.parts:
        return blocks[0].name
    source = draft.expected.tied.get(name)
    if source is None or source not in draft.parts:
        return None
    draft.parts[name] = draft.parts[source]
    return name


def _to_file_names(draft: Draft) -> None:
    """Give parts that have the names of the model in memory those that files have, cut apart where need be."""
    for name, blocks in (draft.expected.inner if draft.expected else {}).items():
        if name not in draft.parts or not blocks:
            continue
        part = draft.parts.pop(name)
        for block in blocks:
            draft.parts[block.name] = Part(cut(part.tensor, block.first, block.shape), part.dtype)


def _settle_heads(draft: Draft) -> None:
    heads = [name for name in draft.parts if HEAD.fullmatch(name)]
    known = set() if draft.expected is None else set(draft.expected.shapes)
    if not heads:
        if draft.options.value_head is not None:
            draft.notes.append("there is no value head: --value-head changes nothing")
        return
    if draft.options.value_head == "drop":
        _drop_heads(draft, heads)
    elif draft.options.value_head == "keep":
        draft.heads = set(heads) - known
        draft.notes.append(f"the value head is kept: {_named(heads)}")
    elif set(heads) - known:
        draft.refuse(
            f"there is a value head that the model's class does not know: {_named(heads)}",
            "say --value-head keep or --value-head drop",
        )
        draft.heads = set(heads) - known


def _drop_heads(draft: Draft, heads: list[str]) -> None:
    for name in heads:
        del draft.parts[name]
    draft.dropped += heads
    model = draft.expected
    if model is None or not set(heads) & set(model.shapes):
        return
    shapes = {name: shape for name, shape in model.shapes.items() if not HEAD.fullmatch(name)}
    draft.expected = Expected(shapes, model.tied, model.inner, model.vocabulary, None, model.ignored)
    draft.config["architectures"] = [model.base]
    draft.notes.append(f"without its head the model is a {model.base}")


def _trim(draft: Draft) -> None:
    """Cut off the rows beyond the vocabulary, which some trainers add to divide it evenly."""
    if draft.expected is None:
        return
    for name in draft.expected.vocabulary:
        part, shape = draft.parts.get(name), draft.expected.shapes.get(name)
        if part is None or shape is None or part.tensor.shape[1:] != shape[1:] or part.tensor.shape[0] <= shape[0]:
            continue
        draft.trimmed.append(f"{name}: {part.tensor.shape[0]} rows to {shape[0]}")
        draft.parts[name] = Part(cut(part.tensor, 0, shape), part.dtype)


def _tie(draft: Draft) -> None:
    tied = {} if draft.expected is None else draft.expected.tied
    parted = False
    for target, source in tied.items():
        if target not in draft.parts:
            continue
        if source not in draft.parts:
            draft.parts[source] = draft.parts.pop(target)
            draft.tied.append(target)
        elif is_equal(draft.parts[target].tensor, draft.parts[source].tensor):
            del draft.parts[target]
            draft.tied.append(target)
        elif draft.options.untie:
            parted = True
        else:
            draft.refuse(
                f"the config ties {target} to {source}, and they differ",
                "write both with --untie, which sets tie_word_embeddings to false; or fix the config",
            )
    if parted:
        draft.config["tie_word_embeddings"] = False
        draft.notes.append("the embeddings are untied: tie_word_embeddings is false now")
    elif draft.options.untie:
        draft.notes.append("nothing is tied that differs: --untie changes nothing")


def _check(draft: Draft) -> None:
    """Hold names and shapes against what the model needs."""
    model = draft.expected
    if model is None:
        return
    passed_over = [name for name in draft.parts if name not in model.shapes and model.is_ignored(name)]
    for name in passed_over:
        del draft.parts[name]
    draft.dropped += passed_over
    present = set(draft.parts)
    missing = [name for name in model.shapes if name not in present and model.tied.get(name) not in present]
    extra = [name for name in draft.parts if name not in model.shapes and name not in draft.heads]
    wrong = [
        f"{name} {list(draft.parts[name].tensor.shape)} for {list(shape)}"
        for name, shape in model.shapes.items()
        if name in present and tuple(draft.parts[name].tensor.shape) != shape
    ]
    if missing:
        draft.refuse(
            f"{len(missing)} tensors are missing: {_named(missing)}", "see that config and weights belong together"
        )
    if wrong:
        draft.refuse(
            f"{len(wrong)} tensors have another shape: {_named(wrong)}", "see that config and weights belong together"
        )
    if extra and draft.options.allow_extra:
        draft.notes.append(f"{len(extra)} tensors that the model does not know are written along: {_named(extra)}")
    elif extra:
        draft.refuse(
            f"the model does not know {len(extra)} tensors: {_named(extra)}", "write them along with --allow-extra"
        )


def _settle_dtype(draft: Draft) -> torch.dtype:
    """Choose the dtype of the weights and have the config say it."""
    if draft.options.dtype != "keep" and "quantization_config" in draft.config:
        draft.refuse("a quantised model cannot be cast", "leave --dtype out")
    dtype = _most_of(_outputs(draft))
    name = str(dtype).removeprefix("torch.")
    for section in (draft.config, *(value for value in draft.config.values() if isinstance(value, dict))):
        keys = [key for key in ("dtype", "torch_dtype") if key in section]
        for key in keys or (["dtype"] if section is draft.config else []):
            section[key] = name
    return dtype


def _outputs(draft: Draft) -> list[Output]:
    """Return the parts in the model's order, each with the dtype it is written in."""
    order = {name: rank for rank, name in enumerate(draft.expected.shapes)} if draft.expected else {}
    names = sorted(draft.parts, key=lambda name: order.get(name, len(order)))
    return [_output(name, draft.parts[name], draft.options) for name in names]


def _output(name: str, part: Part, options: MergeOptions) -> Output:
    if part.dtype not in DTYPES:
        raise UserError(f"{name} is {part.dtype}, which safetensors files have not", "choose --dtype float32")
    casts = options.dtype != "keep" and part.dtype.is_floating_point
    return Output(name, getattr(torch, options.dtype) if casts else part.dtype, part.tensor)


def _most_of(outputs: Iterable[Output]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for output in outputs:
        if output.dtype.is_floating_point:
            sizes[output.dtype] = sizes.get(output.dtype, 0) + output.nbytes // output.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _index(files: tuple[WeightFile, ...]) -> dict[str, str]:
    if len(files) == 1:
        return {}
    where = {output.name: file.name for file in files for _, output in file.outputs}
    total = sum(output.nbytes for file in files for _, output in file.outputs)
    return {"model.safetensors.index.json": _json({"metadata": {"total_size": total}, "weight_map": where})}


def _adapter_files(adapter: Adapter, options: MergeOptions, place: str) -> tuple[WeightFile, ...]:
    outputs = [_output(name, part, options) for name, part in _parts(adapter.tensors).items()]
    return arrange(outputs, f"{place}adapter_model", ADAPTER_BYTES)


def _inputs(read: Iterable[Path], files: tuple[WeightFile, ...]) -> tuple[Path, ...]:
    """Return every file that the merge reads, each once."""
    found = dict.fromkeys(read)
    for file in files:
        for _, output in file.outputs:
            found |= dict.fromkeys(_files_of(output.tensor))
    return tuple(path for path in found if path.is_file())


def _files_of(tensor: NamedTensor) -> Iterator[Path]:
    """Yield the files a tensor lies in; one that a reader derives from others is in the checkpoint's own list."""
    if isinstance(tensor, StoredTensor):
        yield from (piece.file for piece in tensor.pieces)
    elif isinstance(tensor, fold.FoldedTensor):
        for one in (tensor.base, tensor.pair.down, tensor.pair.up):
            yield from _files_of(one)


def _copies(folder: Path, *, trust_remote_code: bool) -> dict[str, Path]:
    patterns = (*COPIED, CODE) if trust_remote_code else COPIED
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    return {str(path.relative_to(folder)): path for path in found}


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(copy.deepcopy(dict(content)), indent=2, ensure_ascii=False) + "\n"


def _named(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
