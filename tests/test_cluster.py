"""An existing Ray cluster: used when it is large enough, refused at once with both numbers when it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlctl.farside.environment import environment_of
from rlctl_train.config.trainer import CLUSTER_VARIABLE, NODES_VARIABLE
from tests import farside_support, ray_head, runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ray_head.running(tmp_path_factory.mktemp("ray") / "head.log") as address:
        yield address


def test_a_cluster_that_is_too_small_is_refused_with_both_numbers(tmp_path: Path, small_cluster: str) -> None:
    files = runs.make_run(
        tmp_path / "run", plan={"trainer_devices": 4, "rollout_devices": 4}, ray={"address": small_cluster}
    )
    assert runs.run(files) == 5
    error = runs.status(files)["error"]
    assert "has 2 CPU" in error["what"] and "asks for 4.5 CPU" in error["what"]
    assert "trainer.num_devices" in error["remedy"]


@pytest.mark.long
def test_a_run_on_an_existing_cluster_leaves_the_cluster_running(tmp_path: Path, small_cluster: str) -> None:
    for name in ("first", "second"):
        files = runs.make_run(tmp_path / name, ray={"address": small_cluster}, trainer={"num_steps": 1})
        assert runs.run(files) == 0, runs.log(files)


CONNECT = """
import json, sys
from rlctl_train.cluster import connect
from rlctl_train.config.errors import UserError
from rlctl_train.config.trainer import RayConfig
try:
    connect(RayConfig(**json.loads(sys.argv[1])), needed={"CPU": 2.5}, object_store_gib=0.1)
except UserError as error:
    print(json.dumps({"what": error.what, "remedy": error.remedy, "exit_code": error.exit_code}))
"""


def refused(**config: Any) -> dict[str, Any]:
    """Connect as a driver does, in a process of its own, which has the token; return the error of the user's."""
    command = [sys.executable, "-c", CONNECT, json.dumps(config)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_nodes_that_did_not_join_a_launchers_cluster_are_named(
    small_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLUSTER_VARIABLE, small_cluster)
    monkeypatch.setenv(NODES_VARIABLE, "n1,n2")
    error = refused(start_timeout_s=5)
    assert "2 of 2 nodes did not join" in error["what"] and "n1, n2" in error["what"]
    assert "logs/ray-n1.log" in error["remedy"] and error["exit_code"] == 5


def test_an_address_where_no_cluster_is_gives_one_clear_line() -> None:
    error = refused(address="127.0.0.1:1", start_timeout_s=5)
    assert "127.0.0.1:1" in error["what"] and "\n" not in error["what"] and error["exit_code"] == 5


def ask_cluster(address: str, root: Path, num_nodes: int) -> tuple[int, str]:
    """Have the doctor ask the cluster for the nodes of a run; return its exit code and what it said of errors."""
    made = farside_support.order(root=root)
    run = farside_support.create(replace(made, plan=replace(made.plan, num_nodes=num_nodes)))
    environment_of(made).pack(run.files.root)
    command = [sys.executable, "-m", "rlctl.app", "doctor", "--run", str(root), "--cluster", address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root.parent)
    return done.returncode, done.stderr


def test_the_doctor_asks_the_nodes_of_a_cluster_through_ray(tmp_path: Path, small_cluster: str) -> None:
    assert ask_cluster(small_cluster, tmp_path / "one", 1) == (0, "")
    report = json.loads((tmp_path / "one" / "doctor" / "node-0.json").read_text())
    answers = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert (answers["planned_devices"], answers["planned_versions"]) == ("ok", "ok")
    code, told = ask_cluster(small_cluster, tmp_path / "two", 2)
    assert code == 4 and "planned for 2 nodes; no report of node 1" in told
