"""The real SkyPilot takes every task we make, and refuses what it should; nothing is started, no network used."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from rlctl.launchers import sky_command, sky_task
from rlctl.launchers.base import TERMS
from rlctl.launchers.cloud import CloudLauncher
from rlctl.launchers.sky_upload import uploads
from rlctl_train.config.errors import UserError
from tests import cloud_goldens
from tests.cloud_goldens import order

pytestmark = pytest.mark.sky

PRICES = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone\n"
)
"""Of the columns of SkyPilot's price lists, those it reads."""
TAKE_ALL = """
import json, sys
import sky
tasks = json.load(sys.stdin)
for place, task in tasks.items():
    try:
        sky.Task.from_yaml_config(task)
    except Exception as error:
        sys.exit(f"{place}: {error}")
print("took", len(tasks))
"""


@pytest.fixture(autouse=True)
def a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyPilot keeps its files below HOME; a price list that is already there is not downloaded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    catalogs = tmp_path / ".sky" / "catalogs" / "v8"
    (catalogs / "common").mkdir(parents=True)
    (catalogs / "lambda").mkdir()
    (catalogs / "common" / "accelerators.csv").write_text("AcceleratorName,Clouds\nH100,\"['Lambda']\"\n")
    (catalogs / "common" / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\n")
    memory = "\"{'Gpus': [{'Name': 'H100', 'Count': 8, 'MemoryInfo': {'SizeInMiB': 81559}}]}\""
    row = f"gpu_8x_h100,H100,8.0,208.0,1800.0,{memory},23.92,,us-east-1,\n"
    (catalogs / "lambda" / "vms.csv").write_text(PRICES + row)


def test_skypilot_takes_the_task_of_every_place(tmp_path: Path) -> None:
    """As a whole: files that are not there, and secrets without values, are checked when it reads the task."""
    tasks = {}
    for place, launch in cloud_goldens.PLACES.items():
        asked = order(tmp_path, **launch)
        tasks[place] = yaml.safe_load(sky_task.task(asked))
        tasks[place]["secrets"] = dict.fromkeys(tasks[place]["secrets"], "given")
        tasks[place]["file_mounts"].pop("~/rlctl-bucket", None)  # it would ask the cloud for the bucket
        for upload in uploads(asked):
            upload.source.parent.mkdir(parents=True, exist_ok=True)
            upload.source.touch()
    python = sky_command.python()
    assert python is not None
    done = subprocess.run([python, "-c", TAKE_ALL], input=json.dumps(tasks), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"took {len(tasks)}"], done.stdout + done.stderr


def test_the_price_is_told_and_a_machine_that_is_not_offered_refused(tmp_path: Path) -> None:
    shown = CloudLauncher().preview(order(tmp_path, **cloud_goldens.PLACES["lambda"]))
    assert "from 71.76 USD an hour, by SkyPilot's list (23.92 a machine)" in shown[TERMS]
    CloudLauncher().check(order(tmp_path, **cloud_goldens.PLACES["lambda"]))
    with pytest.raises(UserError, match="SkyPilot knows no H1OO:8 at lambda"):
        CloudLauncher().check(order(tmp_path, machine="h100:8", accelerators="H1OO:8", infra="lambda"))


def test_what_skypilot_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SkyPilot refuses the task: .*nowhere"):
        CloudLauncher().check(order(tmp_path, machine="h100:8", infra="nowhere"))
