"""vLLM's CPU worker as one of several ranks. Refuses nothing; only a CPU engine over several processes names it."""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own)

from __future__ import annotations

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class CpuRank(CPUWorker):
    """A CPU worker that meets its peers at a spelt-out address.

    vLLM names the shared memory of a group of ranks by the end of that address. The usual `env://` ends alike for
    every engine, and the second engine of a machine would find its name taken.
    """

    def __init__(self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, **rest: Any) -> None:
        assert distributed_init_method == "env://", "ranks are launched from outside"
        address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        super().__init__(vllm_config, local_rank, rank, address, **rest)
