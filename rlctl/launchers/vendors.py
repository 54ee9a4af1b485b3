"""What each vendor calls things, for every launcher: resources, visibility variables, collectives, containers, images.

Pure functions that return mappings, arguments and lines of shell; nothing here looks at a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlctl_hw.types import DeviceKind

ContainerTool = Literal["docker", "podman", "apptainer", "enroot"]
HIP, ROCR, CUDA = "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"
ASCEND_RT, ASCEND = "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"
SHARED_MEMORY = ("--ipc=host", "--network=host")
"""Ray's object store and the collectives want the host's own shared memory and interfaces."""
ASCEND_DEVICES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
ASCEND_MOUNTS = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    "/usr/local/Ascend/driver",
    "/etc/ascend_install.info",
)


@dataclass(frozen=True)
class Vendor:
    """The names of one kind of device."""

    ray_resource: str | None
    """Ray's name of one device; None where CPUs are all there is (Ray's pages on accelerator support)."""
    visible: tuple[str, ...]
    """Variables that hide devices from a process, the one that Ray sets for its workers first."""
    collectives: str
    """Library by which the devices exchange tensors."""
    interface_variable: str | None
    """Variable that names this library's network interface, beside Gloo's."""
    device_files: str | None
    """Pattern of the device files."""


VENDORS: Mapping[DeviceKind, Vendor] = {
    "cuda": Vendor("GPU", (CUDA,), "NCCL", "NCCL_SOCKET_IFNAME", "/dev/nvidia[0-9]*"),
    # RCCL reads NCCL's variables: rocm.docs.amd.com/projects/rccl, "RCCL environment variables".
    "rocm": Vendor("GPU", (HIP, ROCR, CUDA), "RCCL", "NCCL_SOCKET_IFNAME", "/dev/kfd"),
    "ascend": Vendor("NPU", (ASCEND_RT,), "HCCL", "HCCL_SOCKET_IFNAME", "/dev/davinci[0-9]*"),
    "cpu": Vendor(None, (), "gloo", None, None),
}


def ray_resources(kind: DeviceKind, num_devices: int) -> dict[str, float]:
    """Return Ray's resources of so many devices beside its CPUs."""
    name = VENDORS[kind].ray_resource
    return {} if name is None else {name: float(num_devices)}


def ray_start_arguments(kind: DeviceKind, num_devices: int) -> tuple[str, ...]:
    """Return the arguments of `ray start` that declare a node's devices; its CPUs are the launcher's to declare.

    Only GPUs have an option of their own; NPUs are declared by name.
    """
    name = VENDORS[kind].ray_resource
    if name == "GPU":
        return (f"--num-gpus={num_devices}",)
    if name is None:
        return ("--num-gpus=0",)
    return ("--num-gpus=0", f'--resources={{"{name}": {num_devices}}}')


def visibility_lines(kind: DeviceKind) -> tuple[str, ...]:
    """Return lines of POSIX shell that make the visibility variables agree on a node, before Ray reads them.

    Slurm's gres sets `ROCR_VISIBLE_DEVICES` and `GPU_DEVICE_ORDINAL` on every vendor's nodes, and Ray raises where
    ROCR's stands without `HIP_VISIBLE_DEVICES` (ray 2.60, `_private/accelerators/amd_gpu.py`). HIP counts among the
    devices that ROCR leaves, and obeys CUDA's variable too (rocm.docs.amd.com, "GPU isolation techniques"): the list
    moves to HIP's variable instead of being copied. `ASCEND_VISIBLE_DEVICES` belongs to the container runtime, and
    processes obey `ASCEND_RT_VISIBLE_DEVICES`.
    """
    foreign = f"unset {ROCR} GPU_DEVICE_ORDINAL"
    if kind == "cuda":
        return (foreign, f"unset {HIP}", "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    if kind == "rocm":
        return (
            f'if [ -z "${{{HIP}+set}}" ]; then',
            f'  if [ -n "${{{ROCR}+set}}" ]; then export {HIP}="${ROCR}"; unset {ROCR}',
            f'  elif [ -n "${{{CUDA}+set}}" ]; then export {HIP}="${CUDA}"; fi',
            "fi",
            f"unset {CUDA} GPU_DEVICE_ORDINAL",
        )
    if kind == "ascend":
        take_over = f'export {ASCEND_RT}="${ASCEND}"'
        return (foreign, f'if [ -z "${{{ASCEND_RT}+set}}" ] && [ -n "${{{ASCEND}+set}}" ]; then {take_over}; fi')
    return (foreign,)


def network_variables(kind: DeviceKind, interface: str) -> dict[str, str]:
    """Return the variables that lead collectives over one network interface, by its whole name.

    NCCL, RCCL and HCCL take a list of prefixes, and `=` before it asks for the whole name (docs.nvidia.com, "NCCL
    environment variables"; hiascend.com, "HCCL_SOCKET_IFNAME"); Gloo and TensorPipe take the name as it is.
    """
    named = {"GLOO_SOCKET_IFNAME": interface, "TP_SOCKET_IFNAME": interface}
    own = VENDORS[kind].interface_variable
    return named if own is None else {own: f"={interface}", **named}


def environment_variables(kind: DeviceKind, num_nodes: int) -> dict[str, str]:
    """Return what else a node of this kind sets.

    HCCL waits 120 s for the slowest process to connect unless told otherwise, at most 7200 (hiascend.com,
    "HCCL_CONNECT_TIMEOUT"), and models are loaded at different speeds on several nodes. Ray hides all devices from a
    process that asked for none unless RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0.
    """
    found = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return found | {"HCCL_CONNECT_TIMEOUT": "1200"} if kind == "ascend" and num_nodes > 1 else found


def container_arguments(kind: DeviceKind, tool: ContainerTool) -> tuple[str, ...]:
    """Return the arguments by which a container is given the devices.

    Sources: docs.nvidia.com container toolkit and CDI; rocm.docs.amd.com, "Run ROCm Docker containers"; docs.vllm.ai
    Ascend quick start; apptainer.org, "GPU support". Enroot takes NVIDIA's devices by its own hook.
    """
    if tool == "apptainer":
        flags = {"cuda": ("--nv",), "rocm": ("--rocm",), "ascend": tuple(f"--bind={path}" for path in ASCEND_MOUNTS)}
        return flags.get(kind, ())
    if tool == "enroot":
        mounts = {"rocm": ("/dev/kfd", "/dev/dri"), "ascend": (*ASCEND_DEVICES, *ASCEND_MOUNTS)}
        return tuple(f"--mount={path}:{path}" for path in mounts.get(kind, ()))
    return (*SHARED_MEMORY, *_devices(kind, tool))


def image(kind: DeviceKind, rollout: str, catalogue: str | None = None) -> str:
    """Return the vendor's public image that holds torch and the rollout engine for a device.

    docker.com: vllm/vllm-openai, lmsysorg/sglang, python; rocm.docs.amd.com, "vLLM inference and serving on ROCm";
    docs.vllm.ai Ascend installation (A3, whose dies are the catalogue's 910C, has images of its own).
    """
    if kind == "cpu":
        return "python:3.12"
    if kind == "ascend":
        return "quay.io/ascend/vllm-ascend:v0.23.0" + ("-a3" if "910c" in (catalogue or "") else "")
    if kind == "rocm":
        return "rocm/vllm:rocm7.14.0_cdna_ubuntu24.04_py3.14_pytorch_2.11.0_vllm_0.23.0"
    return "lmsysorg/sglang:v0.5.20" if rollout == "sglang" else "vllm/vllm-openai:v0.32.0"


def _devices(kind: DeviceKind, tool: ContainerTool) -> tuple[str, ...]:
    if kind == "cuda":
        return ("--gpus=all",) if tool == "docker" else ("--device=nvidia.com/gpu=all",)
    if kind == "rocm":
        return ("--device=/dev/kfd", "--device=/dev/dri", "--group-add=video", "--security-opt=seccomp=unconfined")
    if kind == "ascend":
        # The runtime gives the NPUs that are named; the rest are the driver's own files.
        devices = tuple(f"--device={path}" for path in ASCEND_DEVICES)
        return (*devices, *(f"--volume={path}:{path}:ro" for path in ASCEND_MOUNTS))
    return ()
