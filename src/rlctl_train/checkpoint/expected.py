"""What tensors a Hugging Face folder must hold, by its config: names, shapes, ties, without any weights.

Plain decoders are known by their config alone; for all others transformers, which takes seconds to import, builds the
model. Code beside the config is run only when trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.expected_dense import dense_decoder
from rlctl_train.checkpoint.expected_types import Block, Expected

__all__ = ["Block", "Expected", "expected"]


def expected(config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> Expected | str:
    """Return what a model of this config needs, or why that cannot be known. `folder` is where its code may lie."""
    if "quantization_config" in config:
        return "the model is quantised: how its tensors are stored is up to the quantiser"
    if "auto_map" in config and not trust_remote_code:
        return "the model comes with code of its own, which is not run without --trust-remote-code"
    if (dense := dense_decoder(config)) is not None:
        return dense
    from rlctl_train.checkpoint.expected_built import built

    return built(config, folder, trust_remote_code=trust_remote_code)
