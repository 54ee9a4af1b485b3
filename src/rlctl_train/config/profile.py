"""What a profiled run records: in which steps, of which workers, with which tool."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlctl_train.config.base import Choices, Config

Tool = Literal["auto", "ranges", "torch", "memory", "nsys", "rocprof"]
TOOLS = Choices(
    {
        "auto": "nsys on CUDA and rocprof on ROCm where the program is on PATH, torch elsewhere",
        "ranges": "nothing but phases and the ranges inside them, which costs next to nothing",
        "torch": "torch.profiler: every operation and kernel, as a trace for Perfetto",
        "memory": "torch.profiler with allocations; on CUDA the allocator's own history too",
        "nsys": "NVIDIA Nsight Systems around each worker",
        "rocprof": "AMD's rocprofv3 around each worker",
    }
)
Profiled = Literal["actor", "reference", "critic", "reward_model", "teacher", "rollout", "score"]
WORKERS = Choices(
    {
        "actor": "the policy's trainer",
        "reference": "the reference model",
        "critic": "the critic's trainer",
        "reward_model": "the reward model's trainer",
        "teacher": "the teacher",
        "rollout": "the rollout engines",
        "score": "the score worker",
    }
)
NsysTrace = Literal["cuda", "cuda-hw", "nvtx", "cublas", "cublas-verbose", "cudnn", "cusparse", "osrt", "mpi", "ucx"]
RocprofTrace = Literal["kernel", "marker", "memory-copy", "rccl", "hip", "hsa", "sys"]


NSYS_TRACES = Choices(
    {
        "cuda": "calls, kernels and copies",
        "cuda-hw": "kernels and copies, by the hardware; cheaper, on new devices",
        "nvtx": "ranges",
        "cublas": "matrix products",
        "cublas-verbose": "matrix products, with what they call",
        "cudnn": "cuDNN",
        "cusparse": "sparse matrices",
        "osrt": "waits in the operating system",
        "mpi": "MPI",
        "ucx": "UCX",
    }
)
ROCPROF_TRACES = Choices(
    {
        "kernel": "kernels",
        "marker": "ranges",
        "memory-copy": "copies",
        "rccl": "collectives",
        "hip": "calls of HIP",
        "hsa": "calls of HSA",
        "sys": "all of these",
    }
)


class NsysConfig(Config):
    """Options of `nsys profile`, by its own names."""

    trace: Annotated[tuple[NsysTrace, ...], NSYS_TRACES] = ("cuda", "nvtx", "cublas", "cudnn")
    """What is traced."""
    cuda_memory_usage: bool = True
    """Track the memory that CUDA hands out."""
    cuda_graph_trace: Annotated[
        Literal["graph", "node"], Choices({"graph": "a graph is one event", "node": "every kernel in it; costs more"})
    ] = "graph"
    """How CUDA graphs, in which rollout engines run, are shown."""
    sample: Annotated[
        Literal["none", "process-tree"], Choices({"none": "not at all", "process-tree": "this worker and its children"})
    ] = "none"
    """Sampling of the host's stacks."""
    python_sampling: bool = False
    """Sample Python's stacks too."""
    delay_s: PositiveFloat | None = None
    """Seconds after the worker's start before which nothing is recorded; unset records whenever a step says so."""


class RocprofConfig(Config):
    """Options of `rocprofv3`, by its own names."""

    trace: Annotated[tuple[RocprofTrace, ...], ROCPROF_TRACES] = ("kernel", "marker", "memory-copy", "rccl")
    """What is traced, each `--NAME-trace`."""


class ProfileConfig(Config):
    """A bounded profile."""

    tool: Annotated[Tool, TOOLS] = "auto"
    """What records, beside the ranges of phases, which are always kept."""
    first_step: PositiveInt = 3
    """First step that is recorded; earlier ones warm up."""
    last_step: PositiveInt = 3
    """Last step that is recorded."""
    roles: Annotated[tuple[Profiled, ...], WORKERS] = ()
    """Roles whose workers are recorded by the tool; empty means all."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks of each role that are recorded by the tool; empty means all."""
    shapes: bool = False
    """Record the shapes of every operation's arguments (torch.profiler)."""
    stacks: bool = False
    """Record the Python stack of every operation (torch.profiler); traces grow several times."""
    nsys: NsysConfig = NsysConfig()
    """Options of Nsight Systems."""
    rocprof: RocprofConfig = RocprofConfig()
    """Options of rocprofv3."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step={self.last_step} lies before first_step={self.first_step}")
        return self
