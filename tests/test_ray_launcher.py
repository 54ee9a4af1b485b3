"""The launcher for a Ray cluster against a small stand-in for the dashboard, and what travels both ways."""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlctl import app, launchers, rundir
from rlctl.commands import profile as profile_command
from rlctl.commands import runs as runs_command
from rlctl.launchers import ray_cluster, ray_size, ray_upload
from rlctl.launchers.base import JobStatus, Order
from rlctl.launchers.ray_api import dashboard_at
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.parcel import pack, unpack
from rlctl_train.courier import Outbox
from tests import runs

Cli = Callable[..., tuple[int, str, str]]
TOKEN = "a-token"


def node(**resources: float) -> dict[str, Any]:
    return {"state": "ALIVE", "resources_total": resources}


class Cluster:
    """What the stand-in has and was told."""

    def __init__(self) -> None:
        self.nodes = [node(CPU=2.0), {"state": "DEAD", "resources_total": {"CPU": 64.0}}]
        self.packages: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.answers: dict[str, str] = {}
        """What the first job prints once a second one asks for it, by what it asks for."""
        self.stopped: list[str] = []
        self.questions: list[str] = []
        self.url = ""

    def answer(self, verb: str, path: str, body: bytes) -> Any:
        """Return the answer to a request, or None where there is no such thing."""
        self.questions.append(f"{verb} {path}")
        match verb, path.partition("?")[0].strip("/").split("/")[1:]:
            case "GET", ["v0", "nodes"]:
                return {"data": {"result": {"result": self.nodes}}}
            case "GET", ["packages", "gcs", name]:
                return {} if name in self.packages else None
            case "PUT", ["packages", "gcs", name]:
                self.packages[name] = body
                return {}
            case "POST", ["jobs"]:
                job = json.loads(body)
                self.jobs[job["submission_id"]] = job | {"status": "RUNNING"}
                if beside := re.search(r"courier (stacks|kill) ", job["entrypoint"]):
                    first = next(iter(self.jobs))
                    self.logs[first] = self.logs.get(first, "") + self.answers.pop(beside[1], "")
                return {}
            case "GET", ["jobs", name]:
                return self.jobs.get(name)
            case "GET", ["jobs", name, "logs"]:
                return {"logs": self.logs.get(name, "")}
            case "POST", ["jobs", name, "stop"]:
                self.stopped.append(name)
                return {}
        return None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    has = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            told = has.answer(self.command, self.path, body) if known else None
            self.send_response((404 if told is None else 200) if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        do_GET = do_PUT = do_POST = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    has.url = f"http://127.0.0.1:{server.server_port}"
    yield has
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ray_cluster.RayLauncher, "poll_s", 0.0)
    monkeypatch.setattr(ray_cluster, "PAUSES", 0)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        done = capfd.readouterr()
        return code, done.out, done.err

    return call


def order(root: Path, **sections: Any) -> Order:
    config = {**runs.CONFIG, "reward": {"type": "arithmetic"}, **sections}
    config["launch"] = {"type": "ray", "address": "http://x:1", **sections.get("launch", {})}
    return Order(root, RunConfig.model_validate(config), runs.PLAN, root.parent, {})


def test_a_launch_uploads_the_run_and_submits_a_job_that_may_save(cluster: Cluster, at_home: Path, cli: Cli) -> None:
    code, _, err = cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    assert (code, "planned for what is there, cpu:2" in err) == (0, True)
    (job,), (data,) = cluster.jobs.values(), cluster.packages.values()
    assert job["entrypoint"].startswith("exec python -m rlctl_train.courier run '~/rlctl-runs/far-")
    assert job["runtime_env"]["working_dir"] == f"gcs://{next(iter(cluster.packages))}"
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    sent = zipfile.ZipFile(io.BytesIO(data))
    assert sent.read("run/config.json") == (at_home / "far" / "config.json").read_bytes()
    assert not [file for file in at_home.rglob("*") if file.is_file() and TOKEN in file.read_text()]


def test_a_dry_run_shows_the_job_and_uploads_nothing(cluster: Cluster, at_home: Path, cli: Cli) -> None:
    code, out, err = cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "--dry-run")
    assert code == 0 and f"would submit, job to {cluster.url}:" in err
    assert '"submission_id": "rlctl-far-RANDOM"' in out and "run/plan.json" in out
    assert not at_home.exists() and {line.split()[0] for line in cluster.questions} == {"GET"}


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--gpus", "cpu:8", "trainer.num_devices=8"], 5, "has 2 CPU, but the run asks for 8.5"),
        (["--gpus", "H100:8"], 5, "has 0 GPU, but the run asks for"),
        (["--nodes", "2", "launch.folder=/shared"], 5, "has 1 node(s), but the run asks for 2"),
        (["--nodes", "2"], 2, "launch.folder is unset"),
        (["launch.environment.type=wheel"], 2, "has its interpreter already"),
        (["ray.address=127.0.0.1:6379"], 2, "name two clusters"),
        (["reward.path=my.py:score"], 2, "reward.path=my.py: there is no such file"),
    ],
    ids=str,
)
def test_what_the_cluster_cannot_do_is_refused_before_anything_is_uploaded(
    words: list[str], code: int, what: str, cluster: Cluster, at_home: Path, cli: Cli
) -> None:
    got, _, err = cli("launch", "quickstart", "--ray", cluster.url, "-y", *words)
    assert (got, what in err, "\n  -> " in err) == (code, True, True), err
    assert not cluster.packages and not at_home.exists()


def test_an_address_or_a_token_that_is_wrong_is_named(cluster: Cluster, cli: Cli, monkeypatch: Any) -> None:
    assert "launch.address=localhost:8265 is not" in cli("launch", "quickstart", "--ray", "localhost:8265")[2]
    code, _, err = cli("launch", "quickstart", "--ray", "http://127.0.0.1:1")
    assert (code, "http://127.0.0.1:1 does not answer" in err) == (5, True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    code, _, err = cli("launch", "quickstart", "--ray", cluster.url)
    assert (code, "RAY_AUTH_TOKEN" in err) == (5, True)


def test_files_come_home_as_they_grow_and_for_the_last_time_at_the_end(
    cluster: Cluster, at_home: Path, cli: Cli
) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    ((name, job),) = cluster.jobs.items()
    one = b'{"step": 1, "time": 1.0, "phase": "train"}\n'
    two = b'{"step": 2, "time": 2.0, "phase": "train"}\n'
    status = b'{"state": "running", "step": 1, "num_steps": 2}'
    cluster.logs[name] = f"hello\n{pack('status.json', 0, status)}{pack('metrics.jsonl', 0, one)}"
    assert json.loads(cli("runs", "ls", "-o", "json")[1])["runs"][0]["state"] == "running"
    files = RunFiles(at_home / "far")
    assert files.metrics.read_bytes() == one
    done = b'{"state": "done", "step": 2, "num_steps": 2, "exit_code": 0}'
    cluster.logs[name] += f"bye\n{pack('metrics.jsonl', len(one), two)}{pack('status.json', 0, done)}"
    job |= {"status": "SUCCEEDED", "driver_exit_code": 0}
    assert cli("runs", "logs", "-f", "far")[1] == "hello\nbye\n"
    assert files.metrics.read_bytes() == one + two
    cluster.questions.clear()
    assert "done" in cli("runs", "show", "far")[1] and not cluster.questions


def test_a_fetch_that_takes_long_is_followed_by_a_longer_pause_and_the_end_is_fetched_at_once(
    cluster: Cluster, at_home: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    monkeypatch.setattr(ray_cluster, "PAUSES", 1e9)
    ((name, job),) = cluster.jobs.items()
    run = rundir.Run(RunFiles(at_home / "far"))
    for text in ("one\n", "one\ntwo\n"):
        cluster.logs[name] = text
        launchers.fetch(run)
    assert run.files.driver_log.read_text() == "one\n"
    job["status"] = "SUCCEEDED"
    launchers.fetch(run)
    assert run.files.driver_log.read_text() == "one\ntwo\n"


def test_stop_and_resume_are_two_jobs_over_one_folder(cluster: Cluster, at_home: Path, cli: Cli) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    ((first, job),) = cluster.jobs.items()
    assert "already running" in cli("runs", "resume", "far")[2]
    launchers.load("ray").interrupt(rundir.Run(RunFiles(at_home / "far")))
    assert cluster.stopped == [first]
    cluster.logs[first] = "one\n" + pack("status.json", 0, b'{"state": "stopped", "step": 3, "exit_code": 130}')
    job["status"] = "STOPPED"
    assert re.search(r"state +stopped", cli("runs", "show", "far")[1])
    assert cli("runs", "resume", "far", "-d")[0] == 0
    second = next(name for name in cluster.jobs if name != first)
    assert cluster.jobs[second]["metadata"] == job["metadata"]
    cluster.logs[second] = "two\n"
    assert re.search(r"state +pending", cli("runs", "show", "far")[1])
    assert cli("runs", "logs", "far")[1] == "one\ntwo\n"


def test_a_kill_is_a_job_beside_it_on_the_same_node(cluster: Cluster, at_home: Path, cli: Cli) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    ((first, job),) = cluster.jobs.items()
    job["driver_agent_http_address"] = "http://10.0.0.7:52365"
    launchers.load("ray").kill(rundir.Run(RunFiles(at_home / "far")))
    killer = next(told for name, told in cluster.jobs.items() if name != first)
    assert killer["entrypoint"] == job["entrypoint"].replace(" run ", " kill ")
    assert killer["entrypoint_resources"] == {"node:10.0.0.7": 0.001}


def test_stacks_are_asked_for_by_a_job_beside_it_and_come_home(
    cluster: Cluster, at_home: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    ((first, job),) = cluster.jobs.items()
    cluster.logs[first] = pack("logs/stacks-20260101-000000.txt", 0, b"an older answer")
    cluster.answers["stacks"] = pack("logs/stacks-20260101-000001.txt", 0, b"in forward\n")
    code, out, err = cli("runs", "stacks", "far")
    assert (code, out, "kept in" in err) == (0, "in forward\n", True), err
    asker = next(told for name, told in cluster.jobs.items() if name != first)
    assert asker["entrypoint"] == job["entrypoint"].replace(" run ", " stacks ")
    monkeypatch.setattr(runs_command, "STACKS_WITHIN_S", 0.3)
    code, _, err = cli("runs", "stacks", "far")
    assert (code, "did not answer within 0.3 s" in err) == (1, True), err


def test_a_driver_that_left_no_word_is_lost_and_a_cluster_that_is_away_is_said(
    cluster: Cluster, at_home: Path, cli: Cli
) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    ((name, job),) = cluster.jobs.items()
    run = rundir.Run(RunFiles(at_home / "far"))
    address = run.job().facts["address"]  # type: ignore[union-attr]
    driver = json.loads(run.files.driver.read_text())
    run.files.driver.write_text(json.dumps(driver | {"facts": driver["facts"] | {"address": "http://127.0.0.1:1"}}))
    assert run.status().state == "pending" and "does not answer" in run.status().phase
    run.files.driver.write_text(json.dumps(driver | {"facts": driver["facts"] | {"address": address}}))
    cluster.logs[name] = pack("status.json", 0, b'{"state": "running", "step": 1}')
    job |= {"status": "FAILED", "driver_exit_code": 137, "message": "killed\nmore"}
    assert run.status().state == "lost"
    assert launchers.load("ray").status(run) == JobStatus("ended", "killed", 137)


def test_the_machine_is_what_the_nodes_are_alike() -> None:
    head, eight = node(CPU=16.0), node(**{"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    amd = node(**{"GPU": 4.0, "accelerator_type:AMD-Instinct-MI300X-OAM": 1.0})
    assert ray_size.machine_of([head, eight, eight], "x") == "h100:8"
    assert ray_size.machine_of([amd], "x") == "mi300x:4"
    assert ray_size.machine_of([node(NPU=8.0)], "x") == "accelerator:8"
    with pytest.raises(UserError, match=r"has h100:8 and mi300x:4"):
        ray_size.machine_of([eight, amd], "x")


def test_needs_count_sides_apart_when_they_are_split(tmp_path: Path) -> None:
    plan = replace(runs.PLAN, device="cuda", trainer_devices=4, rollout_devices=2)
    assert ray_size.needed(plan, order(tmp_path / "r").config) == {"GPU": 4.0, "CPU": 4.5}
    assert ray_size.needed(plan, order(tmp_path / "r", placement="split").config) == {"GPU": 6.0, "CPU": 6.5}


def test_named_files_travel_by_relative_path_and_large_or_local_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "reward.py").write_text("def score(): ...")
    custom = {"type": "custom", "path": "my/reward.py:score"}
    assert list(ray_upload.contents(order(tmp_path / "r", reward=custom))) == ["my/reward.py"]
    with (tmp_path / "big.parquet").open("wb") as file:
        file.truncate(101 * 2**20)
    data = {"type": "parquet", "train": "big.parquet", "val": "/on/the/cluster.parquet"}
    with pytest.raises(UserError, match="have 101 MiB"):
        ray_upload.contents(order(tmp_path / "r", data=data))
    with pytest.raises(UserError, match="does not travel"):
        ray_upload.contents(order(tmp_path / "r", model={"type": "pretrained", "path": "my"}))


def test_parcels_keep_what_was_printed_and_wait_for_a_missing_piece() -> None:
    text = f"half a {pack('a', 0, b'12')}line\n{pack('a', 2, b'34')}{pack('b', 7, b'x')}{pack('c', 0, b'')}"
    assert unpack(text) == ("half a line\n", {"a": b"1234", "c": b""})


def test_no_parcel_writes_outside_the_run_folder(cluster: Cluster, at_home: Path, cli: Cli) -> None:
    cli("launch", "quickstart", "--ray", cluster.url, "--name", "far", "-d", "-y")
    deep = "profile/step_000003/actor-0.ranges.json"
    evil = pack("../evil", 0, b"x") + pack("/tmp/../evil", 0, b"x")
    cluster.logs[next(iter(cluster.jobs))] = evil + pack(deep, 0, b"{}")
    assert cli("runs", "show", "far")[0] == 0
    assert not list(at_home.parent.rglob("evil"))
    assert list(at_home.parent.rglob(deep))


def test_the_courier_sends_what_is_new_and_no_old_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = RunFiles(tmp_path)
    files.status.write_text("old")
    outbox = Outbox(tmp_path)
    files.metrics.write_text("1\n")
    outbox.send()
    outbox.send()
    with files.metrics.open("a") as file:
        file.write("2\n")
    outbox.send()
    said = capsys.readouterr().out
    assert said == pack("metrics.jsonl", 0, b"1\n") + pack("metrics.jsonl", 2, b"2\n")
    files.metrics.write_text("1\n")
    files.status.write_text("newer")
    outbox.send()
    assert capsys.readouterr().out == pack("status.json", 0, b"newer") + pack("metrics.jsonl", 0, b"1\n")
    step = files.profile / "step_000003"
    step.mkdir(parents=True)
    for name in ("actor-0.ranges.json", "actor-0.trace.json.gz"):
        (step / name).write_text("{}")
    outbox.send()
    assert capsys.readouterr().out == pack("profile/step_000003/actor-0.ranges.json", 0, b"{}"), "no trace"


def test_what_a_profile_left_comes_at_the_end_in_pieces_and_what_is_too_large_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "profile" / "step_000003"
    step.mkdir(parents=True)
    sizes = {"known.ranges.json": 2, "large.nsys-rep": 100, "small.trace.json.gz": 25, "empty.csv": 0, ".half": 1}
    for name, size in sizes.items():
        (step / name).write_bytes(bytes(range(size)))
    outbox = Outbox(tmp_path, piece_bytes=10)
    outbox.send()
    outbox.send_within(50, "profile/**/*")
    printed, files = unpack(capsys.readouterr().out)
    left = json.loads(files.pop("profile/left.json"))
    assert left["files"] == {"profile/step_000003/large.nsys-rep": 100} and left["folder"] == str(tmp_path)
    home = {f"profile/step_000003/{name}": bytes(range(sizes[name])) for name in sizes if name[0] in "kse"}
    assert (printed, files) == ("", home)


def test_what_did_not_come_home_is_named_with_the_way_to_bring_it(tmp_path: Path) -> None:
    run = rundir.Run(RunFiles(tmp_path))
    assert profile_command._left(run) == []
    run.files.profile.mkdir()
    left = {"host": "gpu7", "folder": "/there/far-1", "files": {"profile/actor-0.nsys-rep": 80 * 2**20}}
    run.files.left.write_text(json.dumps(left))
    (said,) = profile_command._left(run)
    assert "profile/actor-0.nsys-rep (80 MiB)" in said
    assert f"`rsync -a gpu7:/there/far-1/profile/ {tmp_path}/profile/`" in said


def test_a_token_is_found_where_ray_looks_for_it(tmp_path: Path, cluster: Cluster, monkeypatch: Any) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert dashboard_at(cluster.url).nodes() == [node(CPU=2.0)]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="wants another token"):
        dashboard_at(cluster.url).nodes()
