"""What a run needs before its first worker: the model folder, the tokenizer, and the data files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.config import RunConfig
from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import RandomModel


@dataclass(frozen=True)
class Teacher:
    """The model that a student learns from."""

    path: str
    num_ids: int
    """Tokens that have a number with the student too: the rows of its output projection."""


@dataclass(frozen=True)
class Materials:
    """Paths that every stage of a run reads, and the tokenizer."""

    model_path: str
    tokenizer_path: str
    tokenizer: Any
    train_path: Path
    val_path: Path | None
    teacher: Teacher | None = None


def prepare(files: RunFiles, config: RunConfig) -> Materials:
    """Make the random model and the arithmetic data in the run folder where asked for; load the tokenizer."""
    model_path, tokenizer_path = _model(files, config)
    trust = config.model.type == "pretrained" and config.model.trust_remote_code
    tokenizer = _tokenizer(tokenizer_path, made_here=isinstance(config.model, RandomModel), trust_remote_code=trust)
    if config.model.lora is not None:
        from rlctl_train.engines.models import check_targets

        check_targets(model_path, config.model.lora, trust_remote_code=trust)
    train, val = _data(files, config)
    teacher = None
    if isinstance(config.algo, DistillConfig):
        teacher = _teacher(config.algo.teacher_path, model_path, tokenizer, trust_remote_code=trust)
    return Materials(model_path, tokenizer_path, tokenizer, train, val, teacher)


def _model(files: RunFiles, config: RunConfig) -> tuple[str, str]:
    model = config.model
    if isinstance(model, RandomModel):
        if not files.model.exists():
            from rlctl_train.model_factory import make_random_model

            half_made = files.model.with_name(".model.tmp")
            shutil.rmtree(half_made, ignore_errors=True)
            make_random_model(model, half_made, config.seed)
            half_made.rename(files.model)
        return str(files.model), str(files.model)
    path = model.path
    if model.revision is not None and not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=model.revision)
    return path, model.tokenizer or path


def _tokenizer(path: str, *, made_here: bool, trust_remote_code: bool) -> Any:
    if made_here:  # its class is known; `AutoTokenizer` imports the model classes, five seconds of a processor
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer can be loaded from {path!r}: {str(error).splitlines()[0]}",
            "set model.tokenizer to a folder or hub id that has one",
            exit_code=PREFLIGHT,
        ) from error


def _teacher(path: str, student: str, tokenizer: Any, *, trust_remote_code: bool) -> Teacher:
    """Refuse a teacher that does not load, or for whom a token's number means another token."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no teacher can be loaded from {path!r}: {str(error).splitlines()[0]}",
            "set algo.teacher_path to a folder or hub id of a whole model, such as RUN/hf of a run that has ended",
            exit_code=PREFLIGHT,
        ) from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the teacher {path!r} numbers its tokens otherwise than the student: it cannot judge what that one wrote",
            "choose a teacher and a model of one family, with the same tokenizer",
            exit_code=PREFLIGHT,
        )
    config = AutoConfig.from_pretrained(student, trust_remote_code=trust_remote_code)
    return Teacher(path, config.get_text_config().vocab_size)


def _data(files: RunFiles, config: RunConfig) -> tuple[Path, Path | None]:
    data = config.data
    if isinstance(data, ArithmeticData):
        from rlctl_train.data.arithmetic import write_arithmetic

        if not files.data.exists():
            write_arithmetic(data, files.data, config.seed)
        return files.data / "train.parquet", files.data / "val.parquet" if data.num_val else None
    return Path(data.train), None if data.val is None else Path(data.val)
