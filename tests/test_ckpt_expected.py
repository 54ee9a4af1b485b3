"""What a model needs by its config alone is what transformers builds; of unusual configs nothing is claimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlctl_train.checkpoint.expected_built import built
from rlctl_train.checkpoint.expected_dense import FAMILIES, dense_decoder

NOWHERE = Path("nowhere")


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    settings = {"model_type": model_type, "architectures": [f"{FAMILIES[model_type].name}ForCausalLM"], **shape}
    return {key: value for key, value in (settings | changes).items() if value != "absent"}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}],
    ids=["plain", "tied", "biases", "wide heads"],
)
def test_a_plain_decoder_needs_what_transformers_builds(model_type: str, changes: dict[str, Any]) -> None:
    settings = config(model_type, **changes)
    own, theirs = dense_decoder(settings), built(settings, NOWHERE, trust_remote_code=False)
    assert own is not None and own == theirs and not isinstance(theirs, str)
    assert list(own.shapes) == list(theirs.shapes)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_config_without_head_dim_means_what_transformers_takes_it_for(model_type: str) -> None:
    settings = config(model_type, head_dim="absent")
    own = dense_decoder(settings)
    assert own is not None and own == built(settings, NOWHERE, trust_remote_code=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Qwen3ForSequenceClassification"]}, {"architectures": "absent"}, {"head_dim": "absent"},
        {"num_key_value_heads": None}, {"hidden_size": 33}, {"tie_word_embeddings": None}, {"auto_map": {}},
    ],
    ids=str,
)  # fmt: skip
def test_of_an_unusual_config_nothing_is_claimed(changes: dict[str, Any]) -> None:
    assert dense_decoder(config("qwen3", **changes)) is None


def test_a_merge_is_imported_without_transformers() -> None:
    code = "import sys, rlctl_train.checkpoint.merge; sys.exit(any('transformers' == name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
