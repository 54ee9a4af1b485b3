"""`rlctl plan memory`: the bare memory calculator, for any framework's configuration."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rlctl_hw import calculator
from rlctl_hw.devices import CatalogueEntry, by_key
from rlctl_hw.model_catalogue import named_shape
from rlctl_hw.model_shape import shape_from_file
from rlctl_hw.setup import Attention, Band, Estimate, IllegalLayout, LossPath, Optimizer, Setup, Task, WeightDtype
from rlctl_hw.types import EngineName, Mesh, ModelShape, Recompute

from rlctl import render
from rlctl.render import OutputOption
from rlctl_train.config.errors import DOES_NOT_FIT, UserError

DTYPES: dict[str, WeightDtype] = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float8": "float8",
    "fp8": "float8",
    "nf4": "nf4",
}
BAR_WIDTH = 30


def memory(
    model: Annotated[str, typer.Option(help="A config.json, or the name of a built-in model.")],
    engine: Annotated[EngineName, typer.Option(help="Whose memory: FSDP2 (or ZeRO-3), or Megatron.")] = "fsdp2",
    task: Annotated[
        Task, typer.Option(help="Supervised or actor update, forward pass alone, or generation.")
    ] = "update",
    gpu: Annotated[str | None, typer.Option(help="A device of the catalogue, such as h100-80gb: does it fit?")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices; by default as many as the degrees ask for.")] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences at one time; for rollout, decoded at once.")] = 1,
    num_micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Of one optimizer step and rank. [default: 1 for sft, else 2 a stage]")
    ] = None,
    dp_shard: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share states. [default: what --gpus leaves]")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context parallelism.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallelism.")] = 1,
    etp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism in an expert. [default: 1]")] = None,
    virtual_stages: Annotated[int, typer.Option(min=1, help="Model chunks per pipeline stage.")] = 1,
    sp: Annotated[
        bool | None,
        typer.Option("--sp/--no-sp", help="Sequence parallelism. [default: with --tp, on for fsdp2 and for experts]"),
    ] = None,
    recompute: Annotated[Recompute, typer.Option(help="Activations computed again in backward.")] = "none",
    loss: Annotated[LossPath, typer.Option(help="Logits whole, in chunks, or never (fused with the head).")] = "plain",
    loss_chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk of a chunked loss.")] = 1024,
    fp32_logits: Annotated[
        Literal["none", "dropped", "held"] | None,
        typer.Option(help="What a plain loss's caller does with the fp32 copy."),
    ] = None,
    compiled_loss: Annotated[bool, typer.Option("--compiled-loss", help="A plain loss under torch.compile.")] = False,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Of the parameters that are trained. [default: float32; megatron: bfloat16]"
        ),
    ] = None,
    grad_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of gradients. [default: as the parameters; megatron: float32]")
    ] = None,
    optim_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Of the moments. [default: as the parameters; megatron: float32]"),
    ] = None,
    base_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of frozen weights under LoRA.")] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd is without momentum.")] = "adamw",
    param_offload: Annotated[bool, typer.Option("--param-offload", help="FSDP2: shards live in host memory.")] = False,
    optim_offload: Annotated[bool, typer.Option("--optim-offload", help="Optimizer states live on the host.")] = False,
    activation_offload: Annotated[
        bool, typer.Option("--activation-offload", help="Layer inputs of full recomputation wait on the host.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=0, help="0 trains every parameter.")] = 0,
    attention: Annotated[Attention, typer.Option(help="eager keeps the scores.")] = "flash",
    reshard: Annotated[
        bool | None, typer.Option("--reshard/--no-reshard", help="FSDP2. [default: on without a pipeline]")
    ] = None,
    gpu_memory_share: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="Rollout: share of --gpu that the engine takes.")
    ] = None,
    critic: Annotated[bool, typer.Option("--critic", help="A value head in place of the output projection.")] = False,
    output: OutputOption = "text",
) -> None:
    """Say what one device holds at its peak, between steps and in nvidia-smi. Exit code 3: it does not fit."""
    device = _device(gpu)
    shape = _shape(model)
    # Experts need at least as many ranks as they are split over.
    least = 1 if gpus or dp_shard else ep * (etp or 1) // math.gcd(ep * (etp or 1), tp * cp)
    replicas, shards = _data_parallel(gpus, tp * pp * cp, dp_shard or (None if gpus else least))
    dtypes = _dtypes(engine, param_dtype, grad_dtype, optim_dtype)
    setup = Setup(
        shape=shape,
        engine=engine,
        task=task,
        mesh=Mesh(
            dp_replicate=replicas,
            dp_shard=shards,
            tp=tp,
            pp=pp,
            cp=cp,
            ep=ep,
            etp=etp or 1,
            sequence_parallel=(engine == "fsdp2" or shape.experts is not None) if sp is None else sp,
            virtual_stages=virtual_stages,
            uneven_stages=True,
        ),
        seq_len=seq_len,
        micro_batch=micro_batch,
        num_micro_batches=num_micro_batches or (1 if task == "sft" and pp == 1 else 2 * pp),
        recompute=recompute,
        loss=loss,
        logits_chunk_tokens=loss_chunk_tokens,
        fp32_logits=fp32_logits,
        compiled_loss=compiled_loss,
        attention=attention,
        param_dtype=dtypes[0],
        grad_dtype=dtypes[1],
        optim_dtype=dtypes[2],
        optimizer=optimizer,
        param_offload=param_offload,
        optim_offload=optim_offload,
        activation_offload=activation_offload,
        lora_rank=lora_rank,
        base_dtype=_dtype("--base-dtype", base_dtype) if base_dtype else None,
        reshard_after_forward=pp == 1 if reshard is None else reshard,
        gpu_memory_share=gpu_memory_share,
        critic=critic,
        device=device.kind if device else "cuda",
        catalogue=device.key if device else None,
    )
    try:
        found = calculator.estimate(setup)
    except IllegalLayout as error:
        raise UserError(
            f"this layout cannot run: {error}", "choose degrees that divide, or name what is missing"
        ) from error
    _show(found, setup, device, output)
    _refuse_misfit(found, device)


def _shape(model: str) -> ModelShape:
    file = Path(model)
    if file.is_dir():
        file /= "config.json"
    is_file = file.suffix == ".json"
    try:
        return shape_from_file(file) if is_file else named_shape(model)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {model}: {error}", "name a config.json or a built-in model") from error
    except OSError as error:
        raise UserError(f"--model {model}: {error.strerror or error}", "name a config.json that can be read") from error


def _device(gpu: str | None) -> CatalogueEntry | None:
    if gpu is None:
        return None
    try:
        return by_key(gpu)
    except ValueError as error:
        raise UserError(f"--gpu {error}", "take one of these names; `rlctl hw` shows this machine's") from error


def _data_parallel(gpus: int | None, model_parallel: int, dp_shard: int | None) -> tuple[int, int]:
    """Return how often states are copied, and over how many ranks they are spread."""
    total = gpus or model_parallel * (dp_shard or 1)
    if total % model_parallel:
        raise UserError(
            f"--gpus {total} does not divide by --tp times --pp times --cp ({model_parallel})",
            f"use a multiple of {model_parallel} devices or lower degrees",
        )
    left = total // model_parallel
    if left % (dp_shard or left):
        raise UserError(
            f"--dp-shard {dp_shard} does not divide the {left} data-parallel ranks that --gpus {total} leaves",
            "leave --dp-shard out, or use a divisor",
        )
    return left // (dp_shard or left), dp_shard or left


def _dtypes(
    engine: EngineName, param: str | None, grad: str | None, optim: str | None
) -> tuple[WeightDtype, WeightDtype, WeightDtype]:
    """Return what is not given as the engine has it: torch's gradients and moments follow the parameters, Megatron's
    are fp32."""
    own = _dtype("--param-dtype", param or ("float32" if engine == "fsdp2" else "bfloat16"))
    rest: WeightDtype = own if engine == "fsdp2" else "float32"
    return (
        own,
        _dtype("--grad-dtype", grad) if grad else rest,
        _dtype("--optim-dtype", optim) if optim else rest,
    )


def _dtype(option: str, name: str) -> WeightDtype:
    if name.lower() not in DTYPES:
        raise UserError(f"{option} {name!r} is not a type", f"use one of {', '.join(DTYPES)}")
    return DTYPES[name.lower()]


def _show(found: Estimate, setup: Setup, device: CatalogueEntry | None, output: render.Output) -> None:
    bands = {"peak": found.peak, "reserved": found.reserved, "device": found.device, "steady": found.steady}
    if render.document(output, **_content(found, setup, device, bands)):
        return
    metrics = {
        "peak": "the allocator at its peak (max_memory_allocated)",
        "reserved": "with fragmentation and caching (max_memory_reserved)",
        "device": "what the vendor's tool shows",
        "steady": "between steps",
    }
    rows = [(name, _gib(band.gib), _range(band), metrics[name]) for name, band in bands.items()]
    render.table(("MEMORY", "GIB", "BAND", "WHAT IT IS"), rows)
    render.text("")
    largest = max(part.gib for part in found.parts)
    render.table(
        ("PART", "GIB", "", "ORIGIN", "HOW"),
        [(p.name, _gib(p.gib), _bar(p.gib / largest), p.origin, p.why) for p in found.parts],
    )
    if found.host_gib:
        render.text(f"\nhost memory of a rank: {found.host_gib:.2f} GiB")
    render.say(f"\n{found.path}")


def _content(found: Estimate, setup: Setup, device: CatalogueEntry | None, bands: dict[str, Band]) -> dict[str, Any]:
    """Return the document: each metric and its band as flat numbers, and the bands once more together."""
    numbers = {f"{name}_gib": band.gib for name, band in bands.items()}
    edges = {f"{name}_{edge}": getattr(band, edge) for name, band in bands.items() for edge in ("low_gib", "high_gib")}
    grouped = {f"{name}_gib": {"low_gib": band.low_gib, "high_gib": band.high_gib} for name, band in bands.items()}
    fit = {"fits": None, "verdict": None, "gpu": None, "gpu_memory_gib": None}
    if device is not None:
        verdict = _verdict(found, device)
        fit = {"fits": verdict == "fits", "verdict": verdict, "gpu": device.key, "gpu_memory_gib": device.memory_gib}
    return {
        **numbers,
        **edges,
        "bands": grouped,
        "parts": [asdict(part) for part in found.parts],
        **fit,
        "host_gib": found.host_gib,
        "num_params": setup.shape.num_params,
        "mesh": asdict(setup.mesh),
        "path": found.path,
    }


def _verdict(found: Estimate, device: CatalogueEntry) -> str:
    if found.device.high_gib <= device.memory_gib:
        return "fits"
    return "borderline" if found.device.low_gib <= device.memory_gib else "does not fit"


def _refuse_misfit(found: Estimate, device: CatalogueEntry | None) -> None:
    if device is None or _verdict(found, device) == "fits":
        return
    largest = max(found.parts, key=lambda part: part.gib)
    at = found.path.rpartition("peak at: ")[2]
    raise UserError(
        f"{_verdict(found, device)}: {found.device.gib:.1f} GiB ({_range(found.device)}) "
        f"on {device.key} with {device.memory_gib:g} GiB; at {at}, most is {largest.name} with {largest.gib:.1f} GiB",
        REMEDIES[largest.name],
        exit_code=DOES_NOT_FIT,
    )


REMEDIES = {
    "weights": "raise --dp-shard or --tp, or use --lora-rank with a smaller --base-dtype",
    "gradients": "raise --dp-shard or --tp, or use --lora-rank",
    "optimizer": "raise --dp-shard, use --optim-offload, --optimizer adamw8bit or --lora-rank",
    "activations": "use --recompute full, a smaller --micro-batch, or raise --cp",
    "logits": "use --loss chunked or fused, or a smaller --micro-batch",
    "kv_cache": "lower --micro-batch or --seq-len, or raise --tp",
    "cuda_graphs": "use a larger device",
    "buffers": "raise --tp, or --ep for a model with experts",
    "fragmentation": "use --loss chunked or a smaller --micro-batch",
    "communication": "use a larger device",
    "context": "use a larger device",
}


def _range(band: Band) -> str:
    return f"{band.low_gib:.2f} to {band.high_gib:.2f}"


def _bar(share: float) -> str:
    return "█" * max(1, round(share * BAR_WIDTH))


def _gib(value: float) -> str:
    return f"{value:.2f}"
