"""Vendors' names and settings: what a launcher exports, and what the shell makes of contradicting variables."""

from __future__ import annotations

import json
import subprocess

import pytest
from rlctl_hw.types import DeviceKind

from rlctl.launchers import vendors
from rlctl_train.placement import RESOURCE

SHOWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


def after_lines(kind: DeviceKind, **given: str) -> dict[str, str]:
    """Return the visibility variables that are left when the lines have run in a shell."""
    script = "\n".join(["set -eu", *vendors.visibility_lines(kind), "env"])
    done = subprocess.run(["sh", "-c", script], env={"PATH": "/usr/bin:/bin", **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return {name: pairs[name] for name in SHOWN if name in pairs}


def test_slurms_variables_on_amd_become_the_one_that_ray_accepts() -> None:
    found = after_lines("rocm", ROCR_VISIBLE_DEVICES="2,3", CUDA_VISIBLE_DEVICES="2,3", GPU_DEVICE_ORDINAL="2,3")
    assert found == {"HIP_VISIBLE_DEVICES": "2,3"}


def test_a_list_of_the_users_own_among_those_that_rocr_leaves_stays() -> None:
    found = after_lines("rocm", ROCR_VISIBLE_DEVICES="2,3", HIP_VISIBLE_DEVICES="1")
    assert found == {"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "2,3"}


def test_cudas_variable_alone_hides_amd_devices_too() -> None:
    assert after_lines("rocm", CUDA_VISIBLE_DEVICES="1") == {"HIP_VISIBLE_DEVICES": "1"}
    assert after_lines("rocm") == {}


@pytest.mark.parametrize("kind", ["cuda", "ascend", "cpu"])
def test_other_vendors_drop_the_variable_that_ray_refuses(kind: DeviceKind) -> None:
    assert after_lines(kind, ROCR_VISIBLE_DEVICES="0,1", CUDA_VISIBLE_DEVICES="0,1") == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_the_container_runtimes_list_hides_npus_unless_one_is_set_for_processes() -> None:
    assert after_lines("ascend", ASCEND_VISIBLE_DEVICES="4,5") == {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}
    found = after_lines("ascend", ASCEND_VISIBLE_DEVICES="4,5", ASCEND_RT_VISIBLE_DEVICES="4")
    assert found == {"ASCEND_RT_VISIBLE_DEVICES": "4"}


def test_ray_knows_devices_by_the_names_that_workers_ask_for() -> None:
    for kind, vendor in vendors.VENDORS.items():
        assert (vendor.ray_resource or "CPU") == RESOURCE[kind]
    assert vendors.ray_start_arguments("rocm", 8) == ("--num-gpus=8",)
    assert vendors.ray_start_arguments("cpu", 8) == ("--num-gpus=0",)
    npus = vendors.ray_start_arguments("ascend", 16)[-1].removeprefix("--resources=")
    assert json.loads(npus) == vendors.ray_resources("ascend", 16) == {"NPU": 16}


def test_collectives_take_the_whole_name_of_the_interface() -> None:
    assert vendors.network_variables("rocm", "ens1")["NCCL_SOCKET_IFNAME"] == "=ens1"
    assert vendors.network_variables("ascend", "ens1")["HCCL_SOCKET_IFNAME"] == "=ens1"
    assert vendors.network_variables("cpu", "ens1") == {"GLOO_SOCKET_IFNAME": "ens1", "TP_SOCKET_IFNAME": "ens1"}


def test_only_several_ascend_nodes_wait_longer_for_each_other() -> None:
    assert "HCCL_CONNECT_TIMEOUT" in vendors.environment_variables("ascend", 2)
    assert "HCCL_CONNECT_TIMEOUT" not in vendors.environment_variables("ascend", 1)
    assert "HCCL_CONNECT_TIMEOUT" not in vendors.environment_variables("cuda", 2)


def test_containers_are_given_the_devices_in_the_words_of_each_tool() -> None:
    assert vendors.container_arguments("cuda", "docker")[-1] == "--gpus=all"
    assert vendors.container_arguments("cuda", "podman")[-1] == "--device=nvidia.com/gpu=all"
    assert vendors.container_arguments("cuda", "apptainer") == ("--nv",)
    assert vendors.container_arguments("rocm", "apptainer") == ("--rocm",)
    assert "--device=/dev/kfd" in vendors.container_arguments("rocm", "podman")
    assert "--mount=/dev/hisi_hdc:/dev/hisi_hdc" in vendors.container_arguments("ascend", "enroot")
    assert vendors.container_arguments("cpu", "enroot") == ()


def test_images_follow_device_and_engine() -> None:
    assert vendors.image("cuda", "vllm").startswith("vllm/vllm-openai:")
    assert vendors.image("cuda", "sglang").startswith("lmsysorg/sglang:")
    assert vendors.image("rocm", "hf").startswith("rocm/vllm:")
    assert vendors.image("ascend", "vllm", "910c-64gb").endswith("-a3")
    assert not vendors.image("ascend", "vllm", "910b2-64gb").endswith("-a3")
