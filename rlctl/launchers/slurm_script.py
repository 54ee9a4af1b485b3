"""The batch script of a Slurm job: what the run sets, then what is the same for all (`slurm_job.sh`)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from rlctl_hw.types import Hardware, Plan

from rlctl import planning
from rlctl.farside.environment import Environment, doctor_line, environment_of
from rlctl.launchers import vendors
from rlctl.launchers.base import Order
from rlctl_train.config.launch_slurm import ContainerConfig, SlurmLaunch
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.trainer import PROCESS_ENVIRONMENT

MEMORY_MARGIN = 1.25
PASSED_ON = "^(RAY|RLCTL|SLURM|NCCL|RCCL|HCCL|GLOO|TP|CUDA|HIP|ROCR|ASCEND|HF|WANDB|MLFLOW|SWANLAB|OMP|TOKENIZERS)_"
"""Variables that reach a container whose program passes none on by itself."""


def script(order: Order) -> str:
    """Return the batch script of a run."""
    launch = order.config.launch
    assert isinstance(launch, SlurmLaunch)
    environment = environment_of(order)
    body = files("rlctl.launchers").joinpath("slurm_job.sh").read_text(encoding="utf-8")
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in options(order, launch)),
        "",
        *_settings(order, launch),
        "",
        *_modules(launch),
        "set -uo pipefail",
        "",
        *_inside(environment),
        "",
        *_prepare_node(order, launch),
        "",
        *_enter(order, launch, environment.image),
        "",
        body,
    ]
    return "\n".join(lines)


def options(order: Order, launch: SlurmLaunch) -> list[str]:
    """Return the options of sbatch."""
    gres = launch.gres or _default_gres(order)
    named = {
        "job-name": order.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": _cpus(order, launch),
        "mem": f"{_memory_gib(order.plan, launch)}G",
        "gres": gres,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "time": launch.time_limit,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "reservation": launch.reservation,
        "signal": f"B:USR1@{launch.save_before_s}",
        "open-mode": "append",
        "output": _in_pattern(RunFiles(order.root).driver_log),
        "chdir": order.cwd,
        "export": "ALL",
    }
    return [*(f"--{name}={value}" for name, value in named.items() if value is not None), "--requeue", *launch.sbatch]


def _settings(order: Order, launch: SlurmLaunch) -> Iterator[str]:
    cpus, kind, devices = _cpus(order, launch), order.plan.device, _devices(order)
    # One CPU more than Slurm gives, for what scores: Ray's CPUs are a count and bind nothing.
    node = [f"--num-cpus={cpus + 1}", *vendors.ray_start_arguments(kind, devices)]
    node.append(f"--object-store-memory={int(order.plan.object_store_gib * 2**30)}")
    yield f"RUN={shlex.quote(str(order.root))}"
    yield f"CPUS={cpus}"
    yield f"RAY_NODE=({shlex.join(node)})"
    yield f"INTERFACE={shlex.quote(launch.network_interface or '')}"
    yield f"START_TIMEOUT_S={math.ceil(order.config.ray.start_timeout_s)}"
    yield f"MAX_RESTARTS={launch.max_restarts}"
    yield ""
    for name, value in (PROCESS_ENVIRONMENT | vendors.environment_variables(kind, launch.nodes)).items():
        yield f'export {name}="${{{name}:-{value}}}"'
    if launch.network_interface is not None:
        for name, value in vendors.network_variables(kind, launch.network_interface).items():
            yield f'export {name}="{value}"'


def _modules(launch: SlurmLaunch) -> Iterator[str]:
    if launch.modules:
        yield 'if [ "${1:-}" != inside ]; then'
        yield "    type module >/dev/null 2>&1 || . /etc/profile"
        yield f"    module load {shlex.join(launch.modules)} || exit 5"
        yield "fi"


def _prepare_node(order: Order, launch: SlurmLaunch) -> Iterator[str]:
    """Yield the function that runs on every node before anything else."""
    kind = order.plan.device
    yield "prepare_node() {"
    if kind == "ascend" and (launch.gres or "").startswith("gpu"):
        yield f'    export {vendors.ASCEND_RT}="${{{vendors.CUDA}}}"  # gres/gpu names devices so, whatever they are'
    yield from (f"    {line}" for line in vendors.visibility_lines(kind))
    yield from (f"    {line} || return" for line in launch.setup)
    yield "}"


def _inside(environment: Environment) -> Iterator[str]:
    """Yield the function that becomes Python with the run's packages; a node is examined before."""
    yield "inside() {  # ROLE NUMBER ARGUMENT...: of Python; ROLE is head, worker or driver, NUMBER the node's"
    yield from (f"    {line}" for text in environment.lines('"$RUN/launch"') for line in text.splitlines())
    examine = doctor_line('"$RUN"', '"$2"')
    yield f'    [ "$1" = driver ] || {examine} || exit'
    yield '    [ "$1" != worker ] || await_head'
    yield "    shift 2"
    yield '    exec "$python" "$@"'
    yield "}"


def _enter(order: Order, launch: SlurmLaunch, image: str | None) -> Iterator[str]:
    """Yield the function that becomes `inside`, in the container where there is an image."""
    yield "enter() {"
    if image is None:
        yield '    inside "$@"'
    else:
        if launch.container.runtime != "apptainer":
            yield f"    local names; mapfile -t names < <(compgen -e | grep -E {shlex.quote(PASSED_ON)})"
        yield f'    exec {_container_command(order, launch.container, image)} bash "$RUN/launch/job.sbatch" inside "$@"'
    yield "}"


def _container_command(order: Order, container: ContainerConfig, image: str) -> str:
    given = vendors.container_arguments(order.plan.device, container.runtime)
    folders = dict.fromkeys([str(order.root.parent), str(order.cwd), "/tmp", *container.mounts])
    mounts = [folder if ":" in folder else f"{folder}:{folder}" for folder in folders]
    if container.runtime == "apptainer" and "://" not in image and not image.endswith(".sif"):
        image = f"docker://{image}"
    image = shlex.quote(image)
    if container.runtime == "apptainer":
        return f"apptainer exec {shlex.join([*given, *(f'--bind={mount}' for mount in mounts)])} {image}"
    if container.runtime == "enroot":
        # Enroot knows no working directory.
        words = shlex.join([*given, *(f"--mount={mount}" for mount in mounts)])
        go = shlex.join(["sh", "-c", 'cd "$0" && exec "$@"', str(order.cwd)])
        return f'enroot start {words} "${{names[@]/#/--env=}}" {image} {go}'
    words = shlex.join([*given, "--pid=host", f"--workdir={order.cwd}", *(f"--volume={mount}" for mount in mounts)])
    return f'podman run --rm {words} "${{names[@]/#/--env=}}" {image}'


def _devices(order: Order) -> int:
    """Return the accelerators of one node; 0 on CPU."""
    return 0 if order.plan.device == "cpu" else len(_node(order).devices)


def _cpus(order: Order, launch: SlurmLaunch) -> int:
    if launch.cpus_per_node is not None:
        return launch.cpus_per_node
    return _devices(order) * order.plan.threads_per_worker or _node(order).cpu_cores


def _node(order: Order) -> Hardware:
    launch = order.config.launch
    assert isinstance(launch, SlurmLaunch) and launch.machine is not None
    return planning.hardware_named(launch.machine)


def _memory_gib(plan: Plan, launch: SlurmLaunch) -> int:
    if launch.memory_gib is not None:
        return math.ceil(launch.memory_gib)
    parts = plan.memory if plan.device == "cpu" else plan.host_memory
    phases = {part.phase: 0.0 for part in parts}
    for part in parts:
        phases[part.phase] += part.gib
    return math.ceil(MEMORY_MARGIN * max(phases.values(), default=1.0))


def _default_gres(order: Order) -> str | None:
    devices = _devices(order)
    return None if devices == 0 else f"{'npu' if order.plan.device == 'ascend' else 'gpu'}:{devices}"


def _in_pattern(path: Path) -> str:
    """Return a path as Slurm's file names want it, where `%` begins a replacement."""
    return str(path).replace("%", "%%")
