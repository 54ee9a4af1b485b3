"""Driver against runtime against torch build, for each vendor, without importing torch."""

from __future__ import annotations

from collections.abc import Iterator

from rlctl.doctor import torch_build
from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn
from rlctl.doctor.packages import numbers
from rlctl.doctor.torch_build import TorchBuild

NAME = "driver"
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA major version to the least driver branch: docs.nvidia.com/deploy/cuda-compatibility, minor version table."""


def check(case: Case) -> Finding:
    """Compare the driver, the runtime and what torch was built for."""
    build = torch_build.read(case.tools)
    if build is None:
        return skip(NAME, "torch is not installed here")
    compare = {"cuda": _cuda, "rocm": _rocm, "ascend": _ascend}.get(case.kind)
    problems = () if compare is None else compare(case, build)
    made_for = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else "CPU"
    return verdict(NAME, problems, f"torch {build.version} for {made_for}{_driver_words(case)}")


def _cuda(case: Case, build: TorchBuild) -> Iterator[Problem]:
    if build.cuda is None:
        what = f"torch {build.version} is built for {_of(build)}, and this machine has NVIDIA GPUs"
        yield fail(what, "install a CUDA build of torch: pip install --force-reinstall torch")
        return
    asked, carried = numbers(build.cuda), numbers(case.fact("cuda.runtime") or "")
    driver, least = case.fact("cuda.driver"), LEAST_DRIVER.get(asked[0] if asked else 0)
    branch = numbers(driver or "")
    # Within one major version every driver runs every build; between them only what the driver carries counts,
    # which a compatibility package may have raised above its branch.
    too_old = carried[0] < asked[0] if carried and asked else bool(branch and least and branch[0] < least)
    if too_old:
        carries = f", which carries CUDA {case.fact('cuda.runtime')}" if carried else ""
        needs = f"a driver of branch {least} or newer" if least else "a newer driver"
        yield fail(
            f"torch {build.version} is built for CUDA {build.cuda}, but the driver is {driver or 'older'}{carries}",
            f"install {needs}, or a torch built for CUDA {carried[0] if carried else 'of this driver'}",
        )
    elif not carried and not branch:
        yield warn(
            "the NVIDIA driver does not tell its version", "look at `nvidia-smi`; a container may hide the driver"
        )


def _rocm(case: Case, build: TorchBuild) -> Iterator[Problem]:
    if build.hip is None:
        what = f"torch {build.version} is built for {_of(build)}, and this machine has AMD GPUs"
        yield fail(what, "install a ROCm build of torch from its ROCm package index")
        return
    runtime = case.fact("rocm.runtime")
    if runtime and numbers(runtime)[:1] != numbers(build.hip)[:1]:
        yield warn(
            f"torch {build.version} is built for ROCm {build.hip}, and this machine has ROCm {runtime}",
            f"use a torch built for ROCm {numbers(runtime)[:1][0] if numbers(runtime) else runtime}",
        )


def _ascend(case: Case, build: TorchBuild) -> Iterator[Problem]:
    npu = case.tools.version("torch-npu")
    if npu is None:
        yield fail("torch-npu is not installed, and this machine has Ascend NPUs", "pip install 'rlctl[ascend]'")
    elif numbers(npu)[:2] != numbers(build.version)[:2]:
        minor = ".".join(map(str, numbers(npu)[:2]))
        yield fail(f"torch-npu {npu} does not go with torch {build.version}", f"pip install 'torch=={minor}.*'")
    if not case.fact("ascend.cann"):
        where = "source set_env.sh of the CANN toolkit, or install it"
        yield fail(f"no CANN toolkit is found: {case.error('ascend.cann') or 'no record of one'}", where)


def _of(build: TorchBuild) -> str:
    return {"cuda": "CUDA", "rocm": "ROCm", "cpu": "the CPU"}.get(build.kind, build.kind)


def _driver_words(case: Case) -> str:
    words = {
        "cuda": lambda: f", NVIDIA driver {case.fact('cuda.driver')}",
        "rocm": lambda: f", ROCm {case.fact('rocm.runtime') or 'of unknown version'} here",
        "ascend": lambda: f", torch-npu {case.tools.version('torch-npu')}, CANN {case.fact('ascend.cann')}",
        "cpu": lambda: "; the CPU is what will be used",
    }
    return words[case.kind]()
