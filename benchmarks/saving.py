"""How long training stands still for a checkpoint: written at once, against copied and written beside training.

One process, one engine, states of about `--mib`. In turns, so that both see the same machine; the first round fills
caches and is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rlctl_hw.types import Savings

from rlctl_train.checkpoint.shares import HostCopies, seal
from rlctl_train.config.engine import Fsdp2Config
from rlctl_train.config.model import RandomModel
from rlctl_train.config.optim import OptimConfig
from rlctl_train.engines.fsdp2 import Fsdp2Engine
from rlctl_train.model_factory import make_random_model

ROUNDS = 5
BYTES_PER_PARAMETER = 12
HIDDEN, LAYERS = 512, 8


def main() -> None:
    """Print medians in seconds, and the ratio round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=400, help="size of the state, in MiB")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), asked.mib), indent=2))


def measure(folder: Path, mib: int) -> dict[str, float]:
    """Save in turns both ways; return what each took."""
    engine, copies = make_engine(folder / "model", mib), HostCopies()
    at_once: list[float] = []
    pause: list[float] = []
    write: list[float] = []
    for round_number in range(ROUNDS + 1):
        start = time.perf_counter()
        written = engine.write_share(folder / "saved" / "actor")
        seal(folder / "saved" / "actor", [written])
        synchronous = time.perf_counter() - start
        shutil.rmtree(folder / "saved")
        start = time.perf_counter()
        share = engine.copy_share(folder / "saved" / "actor", copies)
        copied = time.perf_counter() - start
        written = share.write()
        seal(folder / "saved" / "actor", [written])
        shutil.rmtree(folder / "saved")
        if round_number:
            at_once.append(synchronous)
            pause.append(copied)
            write.append(written.seconds)
    ratios = [a / b for a, b in zip(at_once, pause, strict=True)]
    return {
        "state_mib": round(engine.state_bytes() / 2**20, 1),
        "synchronous_pause_s": round(statistics.median(at_once), 3),
        "asynchronous_pause_s": round(statistics.median(pause), 3),
        "background_write_s": round(statistics.median(write), 3),
        "pause_ratio": round(statistics.median(ratios), 1),
        "lowest_ratio": round(min(ratios), 1),
    }


def make_engine(folder: Path, mib: int) -> Fsdp2Engine:
    """Make an engine whose weights and moments are about that large."""
    torch.set_num_threads(1)
    wide = max(1, (mib * 2**20 // BYTES_PER_PARAMETER - LAYERS * 3 * HIDDEN**2) // (LAYERS * 3 * HIDDEN))
    shape = RandomModel(hidden_size=HIDDEN, num_layers=LAYERS, intermediate_size=wide, max_position=64)
    make_random_model(shape, folder, seed=0)
    return Fsdp2Engine(
        model_path=str(folder),
        role="actor",
        config=Fsdp2Config(),
        lora=None,
        savings=Savings(),
        optim=OptimConfig(),
        num_updates=1,
        compute_dtype="float32",
        device="cpu",
        max_tokens_per_micro_batch=256,
        seed=0,
        trust_remote_code=False,
    )


if __name__ == "__main__":
    main()
