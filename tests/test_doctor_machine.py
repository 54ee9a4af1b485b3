"""The doctor on devices, the host's limits, disk, network, clock and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.host import CommandResult
from rlctl_hw.probe import survey
from rlctl_hw.record import replay
from rlctl_hw.types import Device, Fact, MemoryPart
from rlctl_hw.vendors import nvidia_processes

from rlctl.doctor import devices, disk, host_limits, network, nodes
from rlctl.doctor.registry import CHECKS
from tests import doctor_support as given

GIB = given.GIB
PROCESSES = "GPU-1, 4242, /usr/bin/python3\nGPU-2, 17, python\nNo running processes found\nGPU-1, x, y\n"


RECORDS = sorted((Path(__file__).parent / "fixtures" / "hw" / "records").iterdir())
JUDGED = {
    "driver-and-library-differ": ("devices", "fail"),
    "driver-not-loaded": ("devices", "warn"),
    "h100-8-with-12-ports": ("links", "warn"),
    "h100-cut-in-three": ("devices", "warn"),
    "mixed-cards-one-lost": ("devices", "warn"),
    "plain-host": ("devices", "ok"),
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda folder: folder.name)
def test_recorded_machines_are_examined_without_a_stumble(record: Path) -> None:
    host = replay(record)
    case = replace(given.case(survey(host)), host=host)
    found = {check.name: check.load()(case).status for check in CHECKS}
    name, status = JUDGED.get(record.name, ("clock", "ok"))
    assert found[name] == status


def test_healthy_devices_are_counted_by_name() -> None:
    found = devices.health(given.case(given.machine("h100:8")))
    assert found.status == "ok" and found.what.startswith("8 x NVIDIA H100")


def loaded(kind: str, root: Path, *, node: str | None, plan: Any = None) -> Any:
    if node:
        (root / "dev").mkdir()
        (root / "dev" / node).touch()
    facts = {f"{kind}.driver": "1.2", f"{kind}.physical": ([], "it does not talk")}
    return devices.health(given.case(given.machine("cpu:2", facts), root=root, plan=plan))


@pytest.mark.parametrize(("kind", "node"), [("cuda", "nvidia0"), ("rocm", "kfd"), ("ascend", "davinci3")])
def test_a_driver_whose_devices_do_not_answer_fails(kind: str, node: str, tmp_path: Path) -> None:
    found = loaded(kind, tmp_path, node=node)
    assert found.status == "fail" and "answers: it does not talk" in found.what and found.remedy


def test_a_container_without_its_devices_warns_and_so_does_a_run_that_goes_on_the_cpu(tmp_path: Path) -> None:
    given_none = given.case(given.machine("cpu:2", {"cuda.driver": "580.1"}), root=tmp_path / "none")
    assert devices.health(given_none).status == "warn" and "was given none" in devices.health(given_none).what
    assert loaded("cuda", tmp_path, node="nvidia0", plan=given.plan()).status == "warn"


def test_the_kernels_own_driver_of_a_display_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kfd").touch()
    facts = {"rocm.driver": "in-kernel 6.8", "rocm.physical": ([], "none")}
    assert devices.health(given.case(given.machine("cpu:2", facts), root=tmp_path)).status == "warn"


def test_tools_that_complain_without_a_driver_and_devices_that_say_too_little_warn() -> None:
    not_loaded = {"cuda.physical": ([], "NVML: Driver Not Loaded; nvidia-smi ended with code 9: has failed")}
    found = devices.health(given.case(given.machine("cpu:2", not_loaded)))
    assert found.status == "warn" and "ended with code 9" in found.what
    mute = {"cuda.physical": ["0: GPU"], "cuda.visible": ([], "GPU 0 (GPU) does not tell its memory")}
    assert "does not tell its memory" in devices.health(given.case(given.machine("cpu:2", mute))).what


def test_a_host_without_any_trace_of_a_vendor_is_fine() -> None:
    absent = {
        "cuda.physical": ([], "NVML: NVML Shared Library Not Found; nvidia-smi is not installed"),
        "rocm.physical": ([], "no AMD driver and no tool of ROCm here"),
        "ascend.physical": ([], "npu-smi is not installed"),
    }
    assert devices.health(given.case(given.machine("cpu:2", absent))).status == "ok"


@pytest.mark.parametrize(
    "facts",
    [
        {"cuda.physical": (["0: H100"], "Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error")},
        {"cuda.visible": (["0: H100"], "GPU 3 is in error; the driver asks for: reset")},
        {"cuda.missing": (["0000:cb:00.0"], "the driver knows GPUs that are lost")},
    ],
)
def test_a_lost_device_is_told(facts: dict[str, Any]) -> None:
    found = devices.health(given.case(given.machine("h100:1", facts)))
    assert found.status == "warn" and "not every device answers" in found.what


def test_a_source_that_another_one_replaced_is_no_loss() -> None:
    facts = {"cuda.physical": (["0: H100"], "NVML: NVML Shared Library Not Found")}
    assert devices.health(given.case(given.machine("h100:1", facts))).status == "ok"


def test_an_nvlink_fabric_that_is_not_ready_stops_runs_of_several_devices() -> None:
    facts = {"cuda.fabric": (["In Progress"], "GPU 0, 1: NVLink is not ready")}
    assert devices.health(given.case(given.machine("h100:2", facts))).status == "fail"
    assert devices.health(given.case(given.machine("h100:1", facts))).status == "warn"


def mixed(order: str | None) -> Any:
    pair = (Device("cuda", 0, "RTX 5060 Ti", 16.0), Device("cuda", 1, "RTX 3060", 12.0))
    env = {} if order is None else {"CUDA_DEVICE_ORDER": order}
    return devices.health(given.case(given.machine("h100:2", devices=pair), env=env))


def test_mixed_devices_warn_and_fail_when_cuda_counts_them_otherwise() -> None:
    assert mixed(None).status == mixed("PCI_BUS_ID").status == "warn"
    assert "smallest (12.0 GiB)" in mixed(None).what
    assert mixed("FASTEST_FIRST").status == "fail"


def test_a_mig_slice_is_told() -> None:
    piece = (Device("cuda", 0, "NVIDIA H100 MIG 3g.40gb", 39.0, partition="3g.40gb"),)
    assert "slice of a GPU" in devices.health(given.case(given.machine("h100:1", devices=piece))).what


def occupied(gib: float, *, plan: Any = None, config: Any = None) -> Any:
    hardware = given.machine("h100-80gb:1", {"cuda.used_gib": {"0": gib}})
    hardware = replace(hardware, devices=(replace(hardware.devices[0], uuid="GPU-1"),))
    run = given.answers(**{"nvidia-smi": CommandResult(PROCESSES, 0)})
    return devices.occupancy(given.case(hardware, run=run, plan=plan, config=config))


def test_memory_that_others_hold_is_told_with_their_names() -> None:
    assert occupied(0.6).status == "ok"
    found = occupied(20.0)
    assert found.status == "warn" and "python3 (4242)" in found.what and "(17)" not in found.what


def test_too_little_memory_left_for_the_plan_fails() -> None:
    part = (MemoryPart("actor_update", "weights", 70.0, "formula"),)
    assert occupied(20.0, plan=given.plan("cuda", memory=part)).status == "fail"
    assert occupied(0.6, plan=given.plan("cuda", memory=part)).status == "ok"


def test_the_share_that_vllm_takes_at_the_start_counts() -> None:
    plan = given.plan("cuda", rollout_gpu_memory_share=0.9)
    assert occupied(20.0, plan=plan, config=given.config(rollout={"type": "vllm"})).status == "fail"
    assert occupied(20.0, plan=plan, config=given.config()).status == "warn"


def test_without_figures_or_accelerators_occupancy_is_skipped() -> None:
    assert devices.occupancy(given.case(given.machine("h100:1"))).status == "skip"
    assert devices.occupancy(given.case()).status == "skip"


def test_processes_are_read_by_gpu() -> None:
    assert nvidia_processes.parse(PROCESSES) == {"GPU-1": ("python3 (4242)",), "GPU-2": ("python (17)",)}
    assert nvidia_processes.parse("NVIDIA-SMI has failed because it couldn't communicate") == {}


def shm(free_gib: float, root: Path, **changes: Any) -> Any:
    (root / "dev" / "shm").mkdir(parents=True, exist_ok=True)
    tools = given.tools(free=lambda path: int(free_gib * GIB))
    return host_limits.shared_memory(given.case(root=root, tools=tools, **changes))


def test_shared_memory_is_compared_with_the_store(tmp_path: Path) -> None:
    run = given.config()
    assert shm(4, tmp_path, plan=given.plan(object_store_gib=2.0), config=run).status == "ok"
    assert shm(1, tmp_path, plan=given.plan(object_store_gib=2.0), config=run).status == "warn"
    found = shm(1, tmp_path, plan=given.plan(object_store_gib=20.0), config=run)
    assert found.status == "fail" and "20.00" in found.what and "--shm-size" in found.remedy


def test_collectives_need_shared_memory_also_beside_an_existing_cluster(tmp_path: Path) -> None:
    plan, elsewhere = given.plan("cuda", trainer_devices=8), given.config(ray={"address": "head:6379"})
    assert shm(0.0625, tmp_path, plan=plan, config=elsewhere).status == "fail"
    assert shm(1, tmp_path, plan=given.plan(object_store_gib=20.0), config=elsewhere).status == "ok"


def test_without_a_plan_dockers_default_of_shared_memory_warns(tmp_path: Path) -> None:
    assert shm(0.0625, tmp_path).status == "warn"
    assert shm(8, tmp_path).status == "ok"
    assert host_limits.shared_memory(given.case(root=tmp_path / "none")).status == "fail"


@pytest.mark.parametrize(
    ("limits", "status"),
    [((1024, 1048576), "ok"), ((-1, -1), "ok"), ((1024, 2048), "warn"), ((256, 512), "fail"), ((65536, 65536), "ok")],
)
def test_the_limit_of_open_files_that_ray_can_reach_counts(limits: tuple[int, int], status: str) -> None:
    found = host_limits.open_files(given.case(tools=given.tools(open_files=lambda: limits)))
    assert found.status == status


def host(need_gib: float, *, available: float = 100.0, device: str = "cuda") -> Any:
    facts = {"host.available_gib": available}
    hardware = given.machine("h100:1", facts, host_memory_gib=32.0)
    hardware = replace(hardware, facts=hardware.facts | {"host.memory_gib": Fact(32.0, "cgroup memory limit")})
    parts = (MemoryPart("loading", "weights", need_gib, "formula"), MemoryPart("running", "processes", 1.0, "assumed"))
    field = {"memory": parts} if device == "cpu" else {"host_memory": parts}
    return host_limits.memory(given.case(hardware, plan=given.plan(device, **field)))


def test_host_memory_is_compared_with_the_control_groups_limit() -> None:
    assert host(20).status == host(20, device="cpu").status == "ok"
    found = host(40)
    assert found.status == "fail" and "cgroup memory limit gives 32.0" in found.what
    assert host(40, device="cpu").status == "fail"
    assert host(20, available=10).status == "warn"
    assert host_limits.memory(given.case()).status == "skip"


def checked_disk(free: Any, **changes: Any) -> Any:
    return disk.check(given.case(tools=given.tools(free=free), runs_root=Path("/no/such/place"), **changes))


def pretrained(**more: Any) -> Any:
    return given.config(model={"type": "pretrained", "path": "Qwen/Qwen2.5-7B-Instruct", **more})


def test_disk_is_compared_with_what_checkpoints_take() -> None:
    assert checked_disk(lambda path: 1000 * GIB, config=pretrained(), plan=given.plan()).status == "ok"
    found = checked_disk(lambda path: 100 * GIB, config=pretrained(), plan=given.plan())
    assert found.status == "fail" and "checkpoints need about" in found.what


def test_a_runs_folder_that_may_not_be_written_fails() -> None:
    found = disk.check(given.case(tools=given.tools(may_write=lambda folder: False)))
    assert found.status == "fail" and "RLCTL_RUNS_DIR" in found.remedy


def test_adapters_take_little_room() -> None:
    config = pretrained(lora={"rank": 8})
    assert checked_disk(lambda path: 40 * GIB, config=config, plan=given.plan()).status == "ok"


def test_weights_that_are_not_here_yet_need_room_in_the_cache(tmp_path: Path) -> None:
    def free(path: Path) -> int:
        return (4 if path == tmp_path else 1000) * GIB

    env = {"HF_HOME": str(tmp_path)}
    found = checked_disk(free, config=pretrained(), plan=given.plan(), env=env)
    assert found.status == "fail" and str(tmp_path) in found.what and "HF_HOME" in found.remedy
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    assert checked_disk(free, config=pretrained(), plan=given.plan(), env=env).status == "ok"


def test_a_full_scratch_folder_warns(tmp_path: Path) -> None:
    free = {tmp_path: GIB}
    found = checked_disk(lambda path: free.get(path, 1000 * GIB), env={"RAY_TMPDIR": str(tmp_path)})
    assert found.status == "warn" and "Ray keeps its session" in found.what


@pytest.mark.parametrize("address", ["head", "head:", "head:x", "head:99999", ":1", "host:-1"])
def test_a_ray_address_of_another_form_fails(address: str) -> None:
    found = network.ports(given.case(config=given.config(ray={"address": address})))
    assert found.status == "fail" and "not of the form" in found.what


def test_the_configured_cluster_must_listen() -> None:
    asked = []

    def connect(host: str, port: int, limit_s: float) -> str | None:
        asked.append((host, port))
        return "Connection refused" if port == 1 else None

    tools = given.tools(connect=connect)
    refused = network.ports(given.case(config=given.config(ray={"address": "head:1"}), tools=tools))
    assert refused.status == "fail" and "ray.address=head:1: Connection refused" in refused.what
    assert network.ports(given.case(config=given.config(ray={"address": "head:6379"}), tools=tools)).status == "ok"
    assert asked == [("head", 1), ("head", 6379)]


def test_a_private_cluster_must_be_able_to_listen() -> None:
    assert network.ports(given.case()).status == "ok"
    assert network.ports(given.case(tools=given.tools(listen=lambda host: "Permission denied"))).status == "fail"


def test_nccl_is_found_as_a_package_or_a_library(tmp_path: Path) -> None:
    folder = given.torch_folder(tmp_path, "2.14", cuda="13.0")
    package = given.tools(folder=folder, version={"nvidia-nccl-cu13": "2.29.1"}.get)
    assert network.collectives(given.case(given.machine("h100:8"), tools=package)).what == "NCCL 2.29.1"
    bare = given.case(given.machine("h100:8"), root=tmp_path / "root", tools=given.tools(folder=folder))
    assert network.collectives(bare).status == "fail"
    (tmp_path / "torch" / "lib").mkdir()
    (tmp_path / "torch" / "lib" / "libnccl.so.2").touch()
    assert network.collectives(bare).status == "ok"


def test_rccl_and_hccl_are_looked_for_where_they_come_from(tmp_path: Path) -> None:
    tools = given.tools(folder=given.torch_folder(tmp_path, "2.14", hip="7.0"))
    assert network.collectives(given.case(given.machine("mi300x:1"), root=tmp_path, tools=tools)).status == "warn"
    (tmp_path / "opt" / "rocm" / "lib").mkdir(parents=True)
    (tmp_path / "opt" / "rocm" / "lib" / "librccl.so.1").touch()
    assert network.collectives(given.case(given.machine("mi300x:1"), root=tmp_path, tools=tools)).status == "ok"
    for cann, status in (("8.5.0", "ok"), (None, "fail")):
        hardware = given.machine("ascend-910b2:8", {"ascend.cann": cann})
        assert network.collectives(given.case(hardware, root=tmp_path / "none", tools=tools)).status == status


def test_a_path_that_is_switched_off_warns(tmp_path: Path) -> None:
    tools = given.tools(folder=given.torch_folder(tmp_path, "2.14", cuda="13.0"), version=lambda name: "2.29")
    env = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}
    found = network.collectives(given.case(given.machine("h100:8"), env=env, tools=tools))
    assert found.status == "warn" and "direct copies between GPUs" in found.what and "IB" not in found.what


def linked(env: dict[str, str] | None = None, rdma: Any = None, spec: str = "h100:8", num_nodes: int = 1) -> Any:
    facts = {} if rdma is None else {"nics.rdma": rdma}
    plan = given.plan("cuda", num_nodes=num_nodes)
    return network.links(given.case(given.machine(spec, facts), env=env or {}, plan=plan))


def test_ports_that_are_down_warn_and_fail_when_several_nodes_have_no_other() -> None:
    assert linked(rdma=["mlx5_0"]).what == "active: mlx5_0"
    assert linked(rdma=(["mlx5_0"], "not active: mlx5_1")).status == "warn"
    assert linked(rdma=([], "not active: mlx5_0")).status == "warn"
    assert linked(rdma=([], "not active: mlx5_0"), num_nodes=2).status == "fail"
    assert linked().status == "ok"


@pytest.mark.parametrize(
    ("env", "status"),
    [
        ({"NCCL_SOCKET_IFNAME": "eth"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "eth0,ib0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "fail"),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "fail"),
        ({"NCCL_SOCKET_IFNAME": "^eth,lo"}, "fail"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "fail"),
        ({"NCCL_IB_HCA": "mlx5"}, "ok"),
        ({"NCCL_IB_HCA": "=mlx5_0:1"}, "ok"),
        ({"NCCL_IB_HCA": "bnxt"}, "fail"),
    ],
)
def test_variables_must_name_interfaces_and_adapters_that_are_here(env: dict[str, str], status: str) -> None:
    found = linked(env, rdma=["mlx5_0", "mlx5_1:2"])
    assert found.status == status and bool(found.remedy) == (status == "fail")


def test_hccl_has_a_variable_of_its_own() -> None:
    hardware = given.machine("ascend-910b2:8")
    for value, status in (("eth", "ok"), ("ib", "fail")):
        found = network.links(given.case(hardware, env={"HCCL_SOCKET_IFNAME": value, "NCCL_SOCKET_IFNAME": "x"}))
        assert found.status == status


def test_a_clock_before_this_release_fails() -> None:
    assert nodes.clock(given.case()).status == "ok"
    found = nodes.clock(given.case(tools=given.tools(now=lambda: 0.0)))
    assert found.status == "fail" and "1970-01-01" in found.what


def named(*found: str, num_nodes: int = 1) -> Any:
    tools = given.tools(addresses=lambda host: found)
    return nodes.hostname(given.case(tools=tools, plan=given.plan(num_nodes=num_nodes)))


def test_this_hosts_name_must_lead_to_itself() -> None:
    assert named("10.0.0.1").status == named("10.0.0.1", num_nodes=4).status == "ok"
    assert named("127.0.1.1").status == "ok" and named("127.0.1.1", num_nodes=2).status == "fail"
    assert named().status == "warn" and named(num_nodes=2).status == "fail"
    assert named("10.9.9.9").status == "warn" and named("10.9.9.9", num_nodes=2).status == "fail"


def asked(answer: str | CommandResult, *names: str, **addresses: tuple[str, ...]) -> Any:
    result = answer if isinstance(answer, CommandResult) else CommandResult(answer, 0)

    def run(argv: Sequence[str]) -> CommandResult:
        assert argv[0] == "ssh" and "BatchMode=yes" in argv
        return result

    book = {name: (f"10.0.0.{i}",) for i, name in enumerate(names, 2)} | addresses
    tools = given.tools(addresses=lambda host: book.get(host, ()))
    return nodes.between(given.case(run=run, nodes=names, tools=tools))


def test_nodes_that_resolve_and_agree_are_ok() -> None:
    assert asked(f"{given.NOW}\n10.0.0.1 me", "a", "me@b", b=("10.0.0.9",)).status == "ok"
    assert nodes.between(given.case()).status == "skip"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (f"{given.NOW + 5}\n10.0.0.1 me", "warn", "5 s apart"),
        (f"{given.NOW - 300}\n10.0.0.1 me", "fail", "300 s apart"),
        (f"{given.NOW}\nunresolved", "fail", "cannot resolve me"),
        ("garbage", "warn", "does not tell its time"),
        ("", "warn", "does not tell its time"),
        (CommandResult("", 255, "ssh ended with code 255: Permission denied"), "warn", "Permission denied"),
        (CommandResult("", None, "ssh is not installed"), "warn", "ssh is not installed"),
    ],
)
def test_what_a_node_answers_is_judged(answer: str | CommandResult, status: str, words: str) -> None:
    found = asked(answer, "a")
    assert found.status == status and words in found.what and found.remedy


def test_names_of_nodes_that_cannot_be_right_fail() -> None:
    good = f"{given.NOW}\n10.0.0.1 me"
    assert "b does not resolve" in asked(good, "a", "b", b=()).what
    assert "the same address" in asked(good, "a", "b", b=("10.0.0.2",)).what
    assert "each node itself" in asked(good, "a", "b", b=("127.0.0.1",)).what
