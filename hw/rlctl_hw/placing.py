"""Choices that need no memory model: how many devices train and generate, in which precision, with how many threads."""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw.devices import by_printed_name
from rlctl_hw.layouts import Candidate
from rlctl_hw.needs import GIB
from rlctl_hw.types import Choice, Device, DoesNotFit, Dtype, Hardware, Workload

BF16_CAPABILITY = (8, 0)
MAX_THREADS = 32
CPU_VLLM_HEAD_DIM = 32
MOST_DISTRIBUTIONS_GIB = 16
"""Of one step's distributions, over all workers: every trainer rank takes them all from the object store."""
FEATURES_PER_THREAD, MIN_USEFUL_THREADS = 64, 4
"""A layer's matrix products keep about one thread busy per so many features; more threads only wait for each other."""


@dataclass(frozen=True)
class Counts:
    """Devices of either side, and why where the planner chose."""

    trainer: int
    rollout: int
    reason: str
    notes: tuple[str, ...] = ()


def check_model(workload: Workload, hardware: Hardware) -> None:
    """Refuse what no number can mend: sequences beyond the model's reach, heads that do not divide."""
    shape = workload.shape
    if shape.max_position is not None and workload.longest_tokens > shape.max_position:
        room = shape.max_position - workload.max_prompt_tokens
        raise DoesNotFit(
            f"sequences reach {workload.longest_tokens} tokens (data.max_prompt_tokens={workload.max_prompt_tokens} + "
            f"rollout.max_response_tokens={workload.max_response_tokens}), but the model accepts {shape.max_position}",
            (f"set rollout.max_response_tokens={room}",) if room > 0 else ("lower data.max_prompt_tokens",),
        )
    if workload.rollout == "vllm" and hardware.kind == "cpu" and shape.head_dim < CPU_VLLM_HEAD_DIM:
        raise DoesNotFit(
            f"vLLM on CPU needs heads of at least {CPU_VLLM_HEAD_DIM} features, but this model's have {shape.head_dim}",
            ("set rollout.type=hf", "use a model with fewer, larger heads"),
        )


def check_distributions(workload: Workload) -> None:
    """Refuse whole distributions of more tokens than can travel in a step."""
    taken, most = workload.distribution_bytes, MOST_DISTRIBUTIONS_GIB * GIB
    if taken <= most:
        return
    tokens, vocabulary = workload.step_sequences * workload.max_response_tokens, workload.shape.vocab_size
    raise DoesNotFit(
        f"algo.kl_loss_estimator=full would take {taken / GIB:.1f} GiB a step, but at most {MOST_DISTRIBUTIONS_GIB} GiB"
        f" may travel: {tokens} response tokens x {vocabulary} tokens of the vocabulary x 4 B",
        (
            "set algo.kl_loss_estimator=k3 or k3+, which take none of it",
            f"have at most {most // (4 * vocabulary)} response tokens a step "
            "(trainer.prompts_per_step x algo.group_size x rollout.max_response_tokens)",
        ),
    )


def num_present(hardware: Hardware) -> int:
    """Return the devices of all nodes; on CPU a device is a core."""
    per_node = hardware.cpu_cores if hardware.kind == "cpu" else len(hardware.devices)
    return per_node * hardware.num_nodes


def device_counts(workload: Workload, hardware: Hardware) -> Counts:
    """Return how many devices train and how many generate; pins are kept or refused."""
    present, pins = num_present(hardware), workload.pins
    unit = "CPU cores" if hardware.kind == "cpu" else f"{hardware.kind} devices"
    for key, pin in (("trainer.num_devices", pins.trainer_devices), ("rollout.num_devices", pins.rollout_devices)):
        if pin is not None and pin > present:
            raise DoesNotFit(f"{key}={pin}, but there are {present} {unit}", (f"set {key}={present} or lower",))
    if workload.placement == "colocated":
        return _colocated(workload, hardware, present)
    return _split(workload, hardware, present, unit)


def compute_dtype(workload: Workload, hardware: Hardware) -> Choice:
    """Choose bfloat16 where every device has units for it, else float32; Megatron takes bfloat16."""
    key = "engine.compute_dtype"
    if workload.engine == "megatron":
        return Choice(key, "bfloat16", "Megatron keeps weights in bfloat16 beside float32 masters", "formula")
    if hardware.kind == "cpu":
        return Choice(key, "float32", "CPU: exact, and bfloat16 units are not to be relied on", "assumed")
    without = next((device for device in hardware.devices if not has_bf16(device)), None)
    if without is None:
        return Choice(
            key, "bfloat16", f"{hardware.devices[0].name} computes in bfloat16; master weights are float32", "formula"
        )
    return Choice(key, "float32", f"{without.name} is not known to have bfloat16 units", "formula")


def has_bf16(device: Device) -> bool:
    """Say whether a device is known to compute in bfloat16 (CUDA: capability 8.0 or newer)."""
    if device.compute_capability is not None:
        major, minor = device.compute_capability.split(".")
        return (int(major), int(minor)) >= BF16_CAPABILITY
    entry = by_printed_name(device.name)
    return entry is not None and entry.bf16_tflops is not None


def check_rollout_dtype(workload: Workload, hardware: Hardware, dtype: Dtype) -> None:
    """Refuse bfloat16 in vLLM on CUDA devices that lack it; transformers would emulate it."""
    without = next((device for device in hardware.devices if device.kind == "cuda" and not has_bf16(device)), None)
    if workload.rollout == "vllm" and dtype == "bfloat16" and without is not None:
        raise DoesNotFit(f"vLLM has no bfloat16 on {without.name}", ("set rollout.dtype=float32",))


def threads_per_worker(workload: Workload, hardware: Hardware, counts: Candidate) -> Choice:
    """Divide a node's cores over the workers that are busy at one time."""
    cores = hardware.cpu_cores
    if hardware.kind != "cpu":
        busy = min(counts.trainer_devices, len(hardware.devices))
        useful, why = MAX_THREADS // 4, f"{cores} host cores, busy devices: {busy}"
    elif workload.placement == "colocated":
        busy = max(counts.trainer_devices, counts.rollout_devices)
        useful, why = (
            _useful_threads(workload),
            f"trainer and rollout take turns on {cores} cores, {busy} busy at one time",
        )
    else:
        busy = counts.trainer_devices + counts.rollout_devices
        useful, why = _useful_threads(workload), f"{busy} workers of both sides share {cores} cores"
    threads = max(1, min(cores // busy, useful))
    if cores // busy > useful:
        why += f"; more than {useful} do not speed up this model" if hardware.kind == "cpu" else f"; {useful} suffice"
    return Choice("trainer.threads_per_worker", threads, why, "assumed")


def _colocated(workload: Workload, hardware: Hardware, present: int) -> Counts:
    pins = workload.pins
    pinned = pins.trainer_devices or pins.rollout_devices
    if pinned is not None:
        if pins.rollout_devices not in (None, pinned):
            raise DoesNotFit(
                f"placement=colocated needs equal numbers, but trainer.num_devices={pins.trainer_devices} and "
                f"rollout.num_devices={pins.rollout_devices}",
                ("unset one of them", "set placement=split"),
            )
        return Counts(pinned, pinned, "placement=colocated: as many as the other side")
    if hardware.kind == "cpu":
        return Counts(1, 1, "one process per side, with all cores in turns, beats several that share them")
    count = min(present, workload.mini_batch_sequences)
    notes = (f"{present - count} of {present} devices stay idle",) if count < present else ()
    reason = "every device trains and generates, in turns" if count == present else "a mini-batch feeds no more"
    return Counts(count, count, reason, notes)


def _split(workload: Workload, hardware: Hardware, present: int, unit: str) -> Counts:
    pins, on_cpu = workload.pins, hardware.kind == "cpu"
    # The two smallest sides can share a single core; it is only slow.
    room = max(present, 2) if on_cpu else present
    trainer, rollout = pins.trainer_devices, pins.rollout_devices
    if on_cpu:
        trainer, rollout = trainer or 1, rollout or 1
    elif rollout is None:
        rollout = room // 2 if trainer is None else room - trainer
    if trainer is None:
        trainer = min(room - rollout, workload.mini_batch_sequences)
    if trainer < 1 or rollout < 1 or trainer + rollout > room:
        wanted = max(trainer, 1), max(rollout, 1)
        raise DoesNotFit(
            f"placement=split needs {wanted[0]} trainer and {wanted[1]} rollout devices, {sum(wanted)} together, but "
            f"there are {present} {unit}",
            ("set placement=colocated", "lower trainer.num_devices or rollout.num_devices"),
        )
    notes = ("trainer and rollout share one core",) if trainer + rollout > present else ()
    idle = present - trainer - rollout
    if idle > 0 and not on_cpu:
        notes = (f"{idle} of {present} devices stay idle",)
    reason = (
        "one process per side" if on_cpu else "placement=split: about half of the devices each, or what a pin leaves"
    )
    return Counts(trainer, rollout, reason, notes)


def _useful_threads(workload: Workload) -> int:
    return min(MAX_THREADS, max(MIN_USEFUL_THREADS, workload.shape.hidden_size // FEATURES_PER_THREAD))
