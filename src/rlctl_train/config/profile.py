"""What a profiled run records: in which steps, of which workers, with which tool."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlctl_train.config.base import Choices, Config

Tool = Literal["auto", "ranges", "torch", "memory", "nsys", "rocprof", "msprof"]
TOOLS = Choices(
    {
        "auto": "nsys on CUDA, rocprof on ROCm and msprof on Ascend where it is installed, torch elsewhere",
        "ranges": "nothing but phases and the ranges inside them, which costs next to nothing",
        "torch": "torch.profiler: every operation and kernel, as a trace for Perfetto",
        "memory": "torch.profiler with allocations; on CUDA the allocator's own history too",
        "nsys": "NVIDIA Nsight Systems around each worker",
        "rocprof": "AMD's rocprofv3 around each worker",
        "msprof": "CANN's collector, by torch_npu's profiler inside each worker",
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
ProfilerLevel = Literal["Level0", "Level1", "Level2"]
PROFILER_LEVELS = Choices(
    {
        "Level0": "kernels and collectives with their times",
        "Level1": "also their types, AscendCL's calls and what collectives transfer",
        "Level2": "also the runtime's calls and operators on the device's CPU",
    }
)
AicMetrics = Literal[
    "AiCoreNone", "PipeUtilization", "ArithmeticUtilization", "Memory", "MemoryL0", "MemoryUB",
    "ResourceConflictRatio", "L2Cache", "MemoryAccess",
]  # fmt: skip
AIC_METRICS = Choices(
    {
        "AiCoreNone": "none",
        "PipeUtilization": "time of computing and of moving data",
        "ArithmeticUtilization": "shares of the kinds of arithmetic",
        "Memory": "instructions to memory outside the core",
        "MemoryL0": "instructions to the core's L0 buffers",
        "MemoryUB": "instructions to the unified buffer",
        "ResourceConflictRatio": "waits of the pipelines for each other",
        "L2Cache": "hits and misses of the L2 cache",
        "MemoryAccess": "bandwidth of memory accesses on the core",
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


class MsprofConfig(Config):
    """Options of `torch_npu.profiler`, by its own names: it drives CANN's msprof from inside a worker."""

    profiler_level: Annotated[ProfilerLevel, PROFILER_LEVELS] = "Level1"
    """How much is collected."""
    aic_metrics: Annotated[AicMetrics, AIC_METRICS] = "AiCoreNone"
    """Counters of the AI cores, a column each in `kernel_details.csv`; from Level1 on."""
    l2_cache: bool = False
    """Collect the L2 cache's hit rates."""
    data_simplification: bool = True
    """Delete what the analysis was made of but the raw data."""
    analyse_flag: bool = True
    """Analyse each step at its end, for which the run waits; without it there is nothing to report until it is done by
    hand."""

    @model_validator(mode="after")
    def _check(self) -> MsprofConfig:
        if self.profiler_level == "Level0" and self.aic_metrics != "AiCoreNone":
            raise ValueError(f"aic_metrics={self.aic_metrics} wants profiler_level=Level1 or Level2")
        return self


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
    """Record the shapes of every operation's arguments (torch, memory, msprof)."""
    stacks: bool = False
    """Record the Python stack of every operation (torch, memory, msprof); traces grow several times."""
    nsys: NsysConfig = NsysConfig()
    """Options of Nsight Systems."""
    rocprof: RocprofConfig = RocprofConfig()
    """Options of rocprofv3."""
    msprof: MsprofConfig = MsprofConfig()
    """Options of torch_npu's profiler."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step={self.last_step} lies before first_step={self.first_step}")
        return self
