"""What every test relies on: quiet, offline, one thread a process, and property tests that repeat."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from rlctl_train.config.model import RandomModel

# Set before torch, ray or transformers are imported, and inherited by every process a test starts.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
# `nohup` and a shell's background have every process below ignore these, which tests send and the kernel does.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer model of random weights and its tokenizer."""
    from rlctl_train.model_factory import make_random_model

    folder = tmp_path_factory.mktemp("tiny_model")
    shape = RandomModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64)
    make_random_model(shape, folder, seed=0)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of whole runs: two processes that share the tests end together then."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine or environment cannot run, and say so."""
    if item.get_closest_marker("vllm") is not None and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: nox -s vllm")
    for marker in ("sky", "cloud"):
        if item.get_closest_marker(marker) is not None and "RLCTL_SKY" not in os.environ:
            pytest.skip(f"SkyPilot is not here: nox -s {marker}")
    if item.get_closest_marker("megatron") is not None and "RLCTL_MEGATRON" not in os.environ:
        pytest.skip("Megatron-core is not here: nox -s megatron")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
