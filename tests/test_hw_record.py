"""Machines kept as records: what a survey finds in each, that no secret is kept, that no damage breaks it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.probe import parse_hardware, read_hardware, survey
from rlctl_hw.record import recording, replay, save
from rlctl_hw.scrub import Scrubber
from typer.testing import CliRunner

from rlctl.app import app

RECORDS = Path(__file__).parent / "fixtures/hw/records"
MACHINES = sorted(RECORDS.iterdir())
UUID = "5f000002-1c2d-4e5f-8a9b-0c1d2e3f0002"


@dataclass(frozen=True)
class Expected:
    """What matters of a machine: devices by index, their memory, islands of places, ports, facts with an error."""

    indices: tuple[int, ...]
    memory_gib: float
    catalogue: str | None
    islands: tuple[tuple[int, ...], ...]
    num_ports: int = 0
    cores: int = 96
    host_gib: float = 1024
    said: Mapping[str, str] = field(default_factory=dict)


EXPECTED = {
    "h100-8-with-12-ports": Expected(
        tuple(range(8)), 79.18, "h100-80gb", (tuple(range(8)),), 11, said={"cuda.used_gib": "GPU 3: 40.23 GiB"}
    ),
    "h200-two-islands-of-4": Expected((2, 3, 4, 5), 139.8, "h200-nvl-141gb", ((0, 1), (2, 3))),
    "h100-cut-in-three": Expected((0,), 19.62, None, ((0,),), said={"cuda.visible": "one MIG slice"}),
    "mixed-cards-one-lost": Expected(
        (0, 1, 3),
        23.7,
        "rtx3090-24gb",
        ((0,), (1,), (2,)),
        host_gib=128,
        said={"cuda.physical": "device handle", "cuda.missing": "do not answer", "cuda.order": "PCI_BUS_ID"},
    ),
    "container-with-2-of-4-cards": Expected((0, 1), 44.39, "l40s-48gb", ((0,), (1,)), 1, cores=12, host_gib=96),
    "driver-not-loaded": Expected((0,), 1024, None, (), cores=8, said={"cuda.physical": "communicate with the NVIDIA"}),
    "driver-and-library-differ": Expected((0,), 1024, None, (), cores=8, said={"cuda.physical": "version mismatch"}),
    "one-card-that-says-little": Expected((0,), 1024, None, (), said={"cuda.physical": "GPU is lost"}),
    "plain-host": Expected((0,), 1024, None, (), 1, cores=8, said={"host.shm_gib": "no shared memory"}),
    "mi300x-8": Expected((5, 4, 6, 7), 191.98, "mi300x-192gb", ((0, 1, 2, 3),), said={"rocm.visible": "differ"}),
    "mi300x-in-eight-parts": Expected(tuple(range(8)), 23.98, None, (tuple(range(8)),)),
    "mi250x-8-dies": Expected(tuple(range(8)), 63.98, "mi250x-64gb", (tuple(range(8)),)),
    "mi308x-7-of-8": Expected((0, 1, 2, 4, 5, 6, 7), 191.98, "mi308x-192gb", (tuple(range(7)),)),
    "amd-driver-not-loaded": Expected((0,), 1024, None, (), said={"rocm.physical": "amdgpu is not loaded"}),
    "910b3-8-one-in-alarm": Expected(
        (0, 1, 3, 4, 5, 6, 7), 64, "910b3-64gb", (tuple(range(7)),), said={"ascend.physical": "in error: NPU 2"}
    ),
    "910b3-in-a-container": Expected((5,), 64, "910b3-64gb", ((0,),)),
    "a3-16-dies": Expected((8, 9, 10, 11), 64, "910c-64gb", ((0, 1, 2, 3),)),
    "310p-two-chips": Expected((0, 1), 43.24, None, (), said={"ascend.islands": "no link is told"}),
    "npu-driver-wants-a-reboot": Expected((0,), 1024, None, (), said={"ascend.physical": "-8005"}),
}


@pytest.mark.parametrize("folder", MACHINES, ids=lambda folder: folder.name)
def test_a_recorded_machine_is_surveyed(folder: Path):
    wanted, found = EXPECTED[folder.name], survey(replay(folder))
    assert tuple(device.index for device in found.devices) == wanted.indices
    assert found.devices[0].memory_gib == pytest.approx(wanted.memory_gib, abs=0.01)
    assert (found.devices[0].catalogue, found.islands) == (wanted.catalogue, wanted.islands)
    assert (len(found.nics), found.cpu_cores, found.host_memory_gib) == (
        wanted.num_ports,
        wanted.cores,
        wanted.host_gib,
    )
    for key, words in wanted.said.items():
        assert words in str(found.facts[key].error)


@pytest.mark.parametrize("folder", MACHINES, ids=lambda folder: folder.name)
def test_recording_a_record_keeps_the_machine(folder: Path, tmp_path: Path):
    host = recording(replay(folder))
    found = survey(host, deep=True)
    save(host, tmp_path / "again", [])
    assert survey(replay(tmp_path / "again"), deep=True) == found


@pytest.mark.parametrize("folder", MACHINES, ids=lambda folder: folder.name)
def test_a_survey_written_as_json_is_the_machine(folder: Path, tmp_path: Path):
    found = survey(replay(folder))
    (tmp_path / "hw.json").write_text(json.dumps({"hardware": asdict(found)}))
    again = parse_hardware(str(tmp_path / "hw.json"))
    assert (again.devices, again.links, again.islands, again.nics) == (
        found.devices,
        found.links,
        found.islands,
        found.nics,
    )
    assert parse_hardware(str(folder)).devices == found.devices


@pytest.mark.parametrize("folder", MACHINES, ids=lambda folder: folder.name)
def test_every_fact_has_a_source_and_a_value_or_an_error(folder: Path):
    for key, fact in survey(replay(folder), deep=True).facts.items():
        assert fact.source, key
        assert fact.value is not None or fact.error, key


def test_cards_kept_from_a_container_are_not_called_lost():
    facts = survey(replay(RECORDS / "container-with-2-of-4-cards")).facts
    assert facts["cuda.withheld"].value == ["0000:83:00.0", "0000:84:00.0"]
    assert "cuda.missing" not in facts


def test_ports_know_the_devices_beside_them():
    found = survey(replay(RECORDS / "h100-8-with-12-ports"))
    near = found.facts["nics.near"].value
    assert (near["ibp20s0"], near["ibp24s0"]) == ([0], [2])
    assert "eth_rdma2" not in near
    assert {nic.rate_gb_per_s for nic in found.nics} == {50, 12.5}


def test_newer_questions_are_answered_by_older_records(tmp_path: Path):
    shutil.copytree(RECORDS / "h200-two-islands-of-4", tmp_path / "r")
    text = (tmp_path / "r/record.json").read_text()
    (tmp_path / "r/record.json").write_text(re.sub(r"--query-gpu=[^\"]*", "--query-gpu=index,name", text))
    assert len(survey(replay(tmp_path / "r")).devices) == 4


def secret_machine(root: Path) -> Host:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/jobs-of-jdoe42/node-17\n")
    (root / "proc/cpuinfo").write_text("model name\t: CPU\nSerial\t\t: 00000000deadbeef\n")
    text = f"index, uuid, name, memory.total [MiB]\n0, GPU-{UUID}, NVIDIA L4, 23034 MiB\n"
    env = {"CUDA_VISIBLE_DEVICES": "GPU-5f0", "NCCL_API_KEY": "secret1", "HF_TOKEN": "hf_secret234567", "HOME": "/x"}
    return Host(root, env, lambda argv: CommandResult(text if "--format=csv" in argv else "hf_secret234567 node-17", 0))


def test_a_record_has_no_secret_and_the_same_devices(tmp_path: Path):
    host = recording(secret_machine(tmp_path / "root"))
    found = survey(host)
    save(host, tmp_path / "r", [("node-17", "host"), ("jdoe42", "user")])
    everything = "\n".join(
        [str(path.relative_to(tmp_path)) for path in (tmp_path / "r").rglob("*")]
        + [path.read_text() for path in (tmp_path / "r").rglob("*") if path.is_file()]
    )
    for secret in ("secret", "node-17", "jdoe42", "deadbeef", UUID, "5f0"):
        assert secret not in everything
    again = survey(replay(tmp_path / "r"))
    assert [(d.index, d.name, d.memory_gib) for d in again.devices] == [
        (d.index, d.name, d.memory_gib) for d in found.devices
    ]
    assert again.devices[0].uuid == "GPU-00000001-0000-0000-0000-000000000001"


def test_one_thing_has_one_stand_in_however_it_is_written():
    scrubber = Scrubber()
    assert scrubber.text("unique_id 9999999999999999999") == "unique_id 1"
    assert scrubber.text("Unique ID: 0x8AC7230489E7FFFF") == "Unique ID: 0x0000000000000001"
    assert scrubber.environment([("ROCR_VISIBLE_DEVICES", "GPU-8ac7,1")]) == {
        "ROCR_VISIBLE_DEVICES": "GPU-0000000000000001,1"
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("driver 24.1.0.1", "driver 24.1.0.1"),
        ("ip address: 10.1.2.3", "ip address: 192.0.2.1"),
        ("Serial Number : 165000", "Serial Number : 0"),
        ('{"asic_serial": "0x12", "x": null}', '{"asic_serial": "SERIAL", "x": null}'),
        ('{"serial": null}', '{"serial": null}'),
        ("clocks 0x00000000000001FF", "clocks 0x00000000000001FF"),
        ("00000000-0000-0000-0000-000000000000", "00000000-0000-0000-0000-000000000000"),
        ("/home/anna/cuda", "/home/user/cuda"),
        ("https://me:pass@host/", "https://TOKEN@host/"),
        ("guid aa:bb:cc:dd:ee:ff", "guid 00:00:00:00:00:00"),
        ("0000:83:00.0", "0000:83:00.0"),
    ],
)
def test_secrets_go_and_facts_stay(text: str, clean: str):
    assert Scrubber([("nvidia", "user")]).text(text) == clean


def test_a_folder_in_use_is_not_written_into(tmp_path: Path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not an empty folder"):
        save(recording(Host(tmp_path, {})), tmp_path, [])


def test_a_record_never_leads_to_files_of_this_machine(tmp_path: Path):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "r/files").mkdir(parents=True)
    (tmp_path / "r/files/link").symlink_to(tmp_path / "private")
    index = {"schema_version": 1, "environment": {}, "answers": {}, "links": {}}
    command = {"argv": ["tool"], "code": 0, "error": None, "stdout": "../private"}
    (tmp_path / "r/record.json").write_text(json.dumps({**index, "commands": [command]}))
    host = replay(tmp_path / "r")
    assert host.read("../../private") is None
    assert host.read("/link") is None
    assert host.run(["tool"]).stdout == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no record"), ("{", "damaged"), ("[]", "not an object"), ('{"schema_version": 1}', "lacks")],
)
def test_what_is_no_record_says_so(text: str | None, words: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        replay(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
ANSWERS = st.dictionaries(st.sampled_from(["nvml", "affinity", "memory", "shm", "machine", "torch"]), JSON)
FILES = ("proc/meminfo", "proc/cpuinfo", "proc/self/cgroup", "proc/1/cgroup", "sys/fs/cgroup/cpu.max")


@given(data=st.data(), answers=ANSWERS, said=st.text(max_size=200), contents=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_record_breaks_the_survey(
    data: st.DataObject, answers: dict[str, Any], said: str, contents: str, tmp_path_factory: pytest.TempPathFactory
):
    source = data.draw(st.sampled_from(MACHINES))
    folder = tmp_path_factory.mktemp("damaged") / "r"
    shutil.copytree(source, folder)
    index = json.loads((folder / "record.json").read_text())
    index["answers"] |= answers
    for kept in index["commands"]:
        if data.draw(st.booleans()):
            (folder / kept["stdout"]).write_text(said, encoding="utf-8")
    target = folder / "files" / data.draw(st.sampled_from(FILES))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(contents, encoding="utf-8")
    (folder / "record.json").write_text(json.dumps(index))
    found = survey(replay(folder), deep=True)
    assert found.devices
    json.dumps(asdict(found))
    shutil.rmtree(folder.parent)


@given(JSON)
def test_no_json_is_more_than_a_value_error(value: Any):
    with contextlib.suppress(ValueError):
        read_hardware(value)
    with contextlib.suppress(ValueError):
        read_hardware({"hardware": value})


def surveyed() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(survey(replay(RECORDS / "h200-two-islands-of-4")))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": []}, "devices is empty"),
        ({"islands": [[9]]}, "not listed"),
        ({"num_nodes": 0}, "start at 1"),
        ({"cpu_cores": "8"}, "hardware.cpu_cores is '8', not int"),
        ({"speed": 1}, "no field speed"),
    ],
)
def test_a_survey_that_makes_no_sense_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        read_hardware({"hardware": {**surveyed(), **change}})


def test_the_command_records_and_replays(tmp_path: Path):
    run = CliRunner().invoke
    recorded = run(app, ["hw", "--replay", str(RECORDS / "h100-8-with-12-ports"), "--record", str(tmp_path / "r")])
    assert recorded.exit_code == 0, recorded.output
    assert "NV18" in recorded.output
    shown = run(app, ["hw", "--replay", str(tmp_path / "r"), "-o", "json"])
    assert len(json.loads(shown.stdout)["hardware"]["devices"]) == 8


@pytest.mark.parametrize("arguments", [["--replay", "nowhere"], ["--record", "."]])
def test_the_command_says_what_is_wrong_with_a_folder(arguments: list[str]):
    result = CliRunner().invoke(app, ["hw", *arguments])
    assert result.exit_code != 0
