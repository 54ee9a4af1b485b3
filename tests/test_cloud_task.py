"""What goes to SkyPilot: golden dry runs of every place, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rlctl_hw import devices

from rlctl.farside.environment import doctor_line
from rlctl.launchers import sky_task
from rlctl.launchers.cloud import CloudLauncher
from rlctl.launchers.sky_machine import ACCELERATORS, ELSEWHERE_CALLED
from rlctl_train.config.errors import LAUNCH, UserError
from tests import cloud_goldens
from tests.cloud_goldens import HAS_ALL, THREE, order


@pytest.fixture(autouse=True)
def without_sky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLCTL_SKY", "nowhere")


@pytest.mark.parametrize("place", cloud_goldens.PLACES)
def test_a_dry_run_is_the_golden_one(place: str, tmp_path: Path) -> None:
    golden = cloud_goldens.FOLDER / f"cloud_{place}.txt"
    assert cloud_goldens.text(place, tmp_path) == golden.read_text(), "if that is meant, run `nox -s golden`"


@pytest.mark.parametrize("place", cloud_goldens.PLACES)
def test_every_golden_launch_passes_our_checks(place: str, tmp_path: Path) -> None:
    CloudLauncher().check(order(tmp_path, **cloud_goldens.PLACES[place]))


@pytest.mark.parametrize(
    ("launch", "what"),
    [
        ({"infra": "runpod", "nodes": 2, "bucket": "/mnt/x"}, "launch.nodes=2: runpod joins no machines"),
        ({"infra": "runpod", "bucket": "s3://b"}, "launch.bucket=s3://b: runpod mounts no buckets"),
        ({"infra": "lambda", "spot": True, "bucket": "s3://b"}, "launch.spot=True: lambda has no spot"),
        ({"infra": "lambda", "environment": HAS_ALL}, "launch.environment.image=docker:me/rlctl:1: lambda takes no"),
        ({"infra": "k8s/ctx", "spot": True, "bucket": "s3://b"}, "launch.spot=True: k8s/ctx has no spot"),
        ({"infra": "aws", "spot": True}, "launch.spot needs launch.bucket"),
        ({"infra": "aws", "nodes": 2}, "launch.nodes=2 needs launch.bucket"),
        ({"machine": "910b2:8"}, "SkyPilot has no name for 910b2-64gb"),
        ({"accelerators": "H100"}, "launch.accelerators=H100 is not NAME:COUNT"),
        ({"machine": "./survey.json"}, "survey.json"),
        ({"secrets": ["NO_SUCH_TOKEN"]}, "launch.secrets names NO_SUCH_TOKEN, which is not set here"),
    ],
    ids=str,
)
def test_what_cannot_work_there_is_refused(launch: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what.replace(".", r"\.")) as refused:
        CloudLauncher().check(order(tmp_path, **{"machine": "h100:8", **launch}))
    assert refused.value.remedy


def test_a_file_that_is_not_here_is_refused_by_its_key(tmp_path: Path) -> None:
    asked = order(tmp_path, **THREE, bucket="s3://b")
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"data\.train=train\.parquet: there is no such file"):
        CloudLauncher().check(asked)


def test_the_values_of_secrets_are_nowhere_in_what_is_shown_or_written(tmp_path: Path) -> None:
    asked = order(
        tmp_path, **THREE, bucket="s3://b", variables={"HF_TOKEN": "hf_hidden", "MINE": "m1ne"}, secrets=["MINE"]
    )
    shown = "".join(CloudLauncher().preview(asked).values())
    assert "hf_hidden" not in shown and "m1ne" not in shown
    assert yaml.safe_load(sky_task.task(asked))["secrets"] == {"MINE": None, "HF_TOKEN": None, "RAY_AUTH_TOKEN": None}
    assert "--secret MINE --secret HF_TOKEN --secret RAY_AUTH_TOKEN" in shown


def test_a_launch_without_sky_says_how_to_get_it_and_writes_nothing(tmp_path: Path) -> None:
    asked = order(tmp_path, **THREE, bucket="s3://b")
    with pytest.raises(UserError, match="no `sky` command at nowhere") as refused:
        CloudLauncher().submit(asked)
    assert refused.value.exit_code == LAUNCH and "pipx install" in refused.value.remedy
    assert not asked.root.exists()


def test_accelerators_are_named_for_devices_of_the_catalogue() -> None:
    keys = {entry.key for entry in devices.catalogue()}
    assert ACCELERATORS.keys() | {key for _, key in ELSEWHERE_CALLED} <= keys


def test_a_clusters_name_is_one_that_skypilot_takes() -> None:
    assert sky_task.cluster("Qwen2.5_7B--x.") == "rlctl-qwen2-5-7b--x"


def test_the_doctor_on_a_node_is_the_one_of_every_launcher() -> None:
    assert doctor_line('"$run"', '"$rank"') in (sky_task.folder() / "doctor.sh").read_text()
