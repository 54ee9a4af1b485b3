"""What a run needs before its first worker: the model folder, the tokenizer, and the data files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.config import RunConfig
from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import RandomModel


@dataclass(frozen=True)
class Materials:
    """Paths that every stage of a run reads, and the tokenizer."""

    model_path: str
    tokenizer_path: str
    tokenizer: Any
    train_path: Path
    val_path: Path | None


def prepare(files: RunFiles, config: RunConfig) -> Materials:
    """Make the random model and the arithmetic data in the run folder where asked for; load the tokenizer."""
    from transformers import AutoTokenizer

    model_path, tokenizer_path = _model(files, config)
    trust = config.model.type == "pretrained" and config.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer can be loaded from {tokenizer_path!r}: {str(error).splitlines()[0]}",
            "set model.tokenizer to a folder or hub id that has one",
            exit_code=PREFLIGHT,
        ) from error
    if config.model.lora is not None:
        from rlctl_train.engines.models import check_targets

        check_targets(model_path, config.model.lora, trust_remote_code=trust)
    train, val = _data(files, config)
    return Materials(model_path, tokenizer_path, tokenizer, train, val)


def _model(files: RunFiles, config: RunConfig) -> tuple[str, str]:
    model = config.model
    if isinstance(model, RandomModel):
        from rlctl_train.model_factory import make_random_model

        if not files.model.exists():
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


def _data(files: RunFiles, config: RunConfig) -> tuple[Path, Path | None]:
    data = config.data
    if isinstance(data, ArithmeticData):
        from rlctl_train.data.arithmetic import write_arithmetic

        if not files.data.exists():
            write_arithmetic(data, files.data, config.seed)
        return files.data / "train.parquet", files.data / "val.parquet" if data.num_val else None
    return Path(data.train), None if data.val is None else Path(data.val)
