"""The environment that travels: extras, pins, the wheel, the shell that makes it, images."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.types import DeviceKind

import rlctl
from rlctl import launchers, rundir
from rlctl.farside import package_set, promise, wheel
from rlctl.farside.environment import Environment, doctor_line, environment_of
from rlctl.launchers.base import Job, Order
from rlctl_train.config.errors import LAUNCH, PREFLIGHT, UserError
from rlctl_train.config.launch import CloudLaunch
from rlctl_train.config.layout import RunFiles
from tests.farside_support import create, order

VLLM = {"type": "vllm", "max_response_tokens": 6}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cuda", ("train", "vllm")), ("cpu", ("train", "vllm-cpu")), ("ascend", ("train", "ascend"))],
)
def test_extras_follow_hardware_and_engine(kind: DeviceKind, expected: tuple[str, ...]) -> None:
    assert package_set.extras_of(order(kind, rollout=VLLM).config, kind) == expected


def test_extras_follow_what_the_run_imports_and_what_the_user_adds() -> None:
    config = order(reward={"type": "math"}, telemetry={"trackers": ["wandb"]}).config
    assert package_set.extras_of(config, "cuda", ["flash"]) == ("train", "math", "trackers", "flash")


def test_versions_of_this_environment_travel_where_it_has_all_of_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_set, "requirements_of", lambda name: ("pytest>=1", "hypothesis>=1; extra == 'train'"))
    found = package_set.package_set(order().config, "cpu")
    assert found.pins["pytest"] == importlib.metadata.version("pytest")
    assert not {"pip", "rlctl"} & found.pins.keys() and not any("+" in version for version in found.pins.values())


def test_the_tested_versions_travel_where_something_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_set, "requirements_of", lambda name: ("absent>=1; extra == 'train'",))
    found = package_set.package_set(order().config, "cpu")
    assert found.pins == package_set.shipped_pins() and "torch==2.13.0\n" in found.constraints()
    assert found.promised() == {
        "rlctl": rlctl.__version__,
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "ray": "2.60.0",
    }


def test_beside_an_image_nothing_of_its_own_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("rich>=14", "torch<2.15,>=2.13; extra == 'train'", "ray[default]<2.61,>=2.60; extra == 'train'")
    monkeypatch.setattr(package_set, "requirements_of", lambda name: lines)
    assert package_set.beside_an_image(["train"]) == ("ray[default]<2.61,>=2.60",)


def installed_by_pip(place: Path, monkeypatch: pytest.MonkeyPatch, wheel_file: Path) -> None:
    """Unpack a wheel as an installer does, and let it be the rlctl that is asked about."""
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(place)
    info = next(place.glob("rlctl-*.dist-info"))
    with (info / "RECORD").open("a") as record:
        record.write("../../bin/rlctl,,\nrlctl/__pycache__/app.cpython-311.pyc,,\n" + f"{info.name}/INSTALLER,,\n")
    (info / "INSTALLER").write_text("pip\n")
    monkeypatch.setattr(rlctl, "__file__", str(place / "rlctl" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: importlib.metadata.PathDistribution(info))


def test_the_wheel_of_a_checkout_and_that_of_its_installation_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = wheel.write(tmp_path / "built")
    installed_by_pip(tmp_path / "site", monkeypatch, built)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    packed = wheel.write(tmp_path / "first")
    with zipfile.ZipFile(built) as one, zipfile.ZipFile(packed) as two:
        assert set(one.namelist()) == set(two.namelist())
        assert {"rlctl/constraints.txt", "rlctl/presets/quickstart.toml", "rlctl_hw/plan.py"} <= set(two.namelist())
    assert packed.read_bytes() == wheel.write(tmp_path / "second").read_bytes()


def test_a_checkout_that_cannot_be_built_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "no_such_backend"\n')
    monkeypatch.setattr(rlctl, "__file__", str(tmp_path / "rlctl" / "__init__.py"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="no wheel can be built") as caught:
        wheel.write(tmp_path)
    assert caught.value.exit_code == LAUNCH and "launch.environment.type" in caught.value.remedy


def test_the_same_environment_is_this_interpreter_and_promises_its_versions() -> None:
    made = environment_of(order())
    assert made.lines("x") == (f"python={sys.executable}",) and made.file_names == ("environment.json",)
    assert made.promise.versions["torch"] == importlib.metadata.version("torch").partition("+")[0]


def test_a_named_interpreter_promises_no_more_than_rlctl() -> None:
    made = environment_of(order(environment={"type": "same", "python": "/opt/it's/python"}))
    assert made.lines("x") == ("python='/opt/it'\"'\"'s/python'",)
    assert made.promise.versions == {"rlctl": rlctl.__version__}


def test_clouds_get_a_wheel_unless_told_otherwise() -> None:
    assert CloudLaunch().environment.type == "wheel"


def test_the_public_index_has_no_torch_for_rocm() -> None:
    with pytest.raises(UserError, match="ROCm") as caught:
        environment_of(order("rocm", {"type": "wheel"}, machine="mi300x:8"))
    assert "launch.environment.type=image" in caught.value.remedy


def test_an_image_that_holds_rlctl_is_used_as_it_is() -> None:
    made = environment_of(order("rocm", {"type": "image", "image": "mine:1", "holds_rlctl": True}, machine="mi300x:8"))
    assert (made.image, made.lines("x"), made.file_names) == ("mine:1", ("python=python3",), ("environment.json",))


def test_on_the_vendors_image_its_own_torch_stays() -> None:
    made = environment_of(order("rocm", {"type": "image"}, machine="mi300x:8"))
    text = "\n".join(made.lines('"$F"'))
    assert made.image is not None and made.image.startswith("rocm/vllm:")
    assert '-c "$venv/image.txt"' in text and "torch" not in made.texts["requirements.txt"]


def test_an_image_for_cpus_gets_the_whole_set() -> None:
    made = environment_of(order("cpu", {"type": "image"}))
    assert "constraints.txt" in made.texts and "[train]" in "\n".join(made.lines("x"))


def test_what_is_compiled_against_torch_is_installed_after_it() -> None:
    made = environment_of(order("cuda", {"type": "wheel", "extras": ["flash"]}, machine="h100:8"))
    first, second = [line for line in "\n".join(made.lines("x")).splitlines() if "pip install" in line]
    assert "[train]" in first and "--no-build-isolation" in second and "[flash]" in second


def test_vllm_on_cpu_leaves_no_cuda_builds_behind() -> None:
    made = environment_of(order("cpu", {"type": "wheel"}, rollout=VLLM))
    assert "uninstall --quiet -y torchvision" in "\n".join(made.lines("x"))


def test_a_promise_survives_its_file(tmp_path: Path) -> None:
    made = environment_of(order("cuda", {"type": "same"}, machine="h100:8", root=tmp_path))
    made.pack(tmp_path)
    assert promise.read(RunFiles(tmp_path).environment) == made.promise
    assert made.promise.machine == promise.Machine("cuda", 8, 79.1, "h100-80gb") and made.promise.num_nodes == 2


def test_a_promise_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="another schema_version"):
        promise.read(tmp_path / "a.json")


def run_script(made: Environment, root: Path, *further: str, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the lines in a shell without an index; packages beside rlctl come from this environment, by PYTHONPATH or
    (`alone`) by what the lines themselves find.
    """
    lines = ["set -eu", f"RUN={root}", *made.lines('"$RUN/launch"'), *further]
    paths = sysconfig.get_paths()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(root.parent), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    if not alone:
        env |= {"PIP_NO_DEPS": "1", "PYTHONPATH": f"{paths['purelib']}:{paths['platlib']}"}
    return subprocess.run(["bash", "-c", "\n".join(lines)], env=env, capture_output=True, text=True, cwd=root.parent)


def packed(tmp_path: Path, kind: DeviceKind, machine: str) -> tuple[Environment, Path]:
    asked: dict[str, Any] = {"type": "wheel", "python": sys.executable, "folder": f"{tmp_path}/envs"}
    made = order(kind, asked, machine=machine, root=tmp_path / "runs" / kind)
    create(made)
    environment = environment_of(made)
    core = replace(environment, promise=replace(environment.promise, extras=()))
    core.pack(made.root)
    return core, made.root


@pytest.mark.slow
def test_the_lines_make_an_environment_once_and_its_doctor_lets_the_run_go_on(tmp_path: Path) -> None:
    made, root = packed(tmp_path, "cpu", "cpu:1")
    where = '"$python" -c "import rlctl; print(rlctl.__file__)"'
    first = run_script(made, root, '"$python" -m rlctl.app --version', where, doctor_line('"$RUN"', "1"))
    assert first.returncode == 0, first.stdout + first.stderr
    version, place = first.stdout.splitlines()[:2]
    assert version == rlctl.__version__ and place.startswith(f"{tmp_path}/envs/")
    made_once = {path: path.stat().st_mtime_ns for path in (tmp_path / "envs").glob("*/whole")}
    assert len(made_once) == 1 and run_script(made, root).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "envs").glob("*/whole")} == made_once
    assert json.loads((root / "doctor" / "node-1.json").read_text())["node"] == 1


@pytest.mark.slow
def test_a_run_planned_for_another_kind_of_device_is_stopped_before_it_costs(tmp_path: Path) -> None:
    made, root = packed(tmp_path, "cuda", "h100:8")
    done = run_script(made, root, doctor_line('"$RUN"', "0"), "echo the driver starts")
    assert done.returncode == PREFLIGHT and "the driver starts" not in done.stdout
    assert "planned for 8 x h100-80gb of 79.1 GiB a node; found CPU" in done.stderr
    status = json.loads((root / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", PREFLIGHT)


@pytest.mark.slow
def test_over_an_image_rlctl_is_the_one_sent_and_torch_the_images_own(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    made = environment_of(order("cuda", {"type": "image"}, machine="h100:8", root=root))
    create(order(root=root))
    needed = {**made.texts, "requirements.txt": "numpy\nrich\n"}
    made = replace(made, python=sys.executable, texts=needed, folder=f"{tmp_path}/envs")
    made.pack(root)
    done = run_script(
        made, root, '"$python" -c "import rlctl, torch; print(rlctl.__file__, torch.__file__)"', alone=True
    )
    assert done.returncode == 0, done.stderr
    own, theirs = done.stdout.split()
    assert own.startswith(f"{tmp_path}/envs/") and theirs.startswith(sysconfig.get_paths()["purelib"])
    (pins,) = (tmp_path / "envs").glob("*/image.txt")
    assert "torch==" in pins.read_text()


def test_an_environment_that_cannot_be_made_ends_the_job(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    made = environment_of(order("cpu", {"type": "wheel", "python": sys.executable}, root=root))
    (root / "launch").mkdir(parents=True)
    (root / "launch" / wheel.NAME).write_bytes(b"not a wheel")
    (root / "launch" / "constraints.txt").write_text("")
    done = run_script(made, root, "echo the driver starts")
    assert done.returncode == LAUNCH and "no environment for the run" in done.stderr and not done.stdout
    assert not list((tmp_path / "runs").glob(".cache/rlctl/environments/*/whole"))


class Elsewhere:
    """A launcher that notes what lies in the run folder when it is handed over."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def submit(self, made: Order) -> Job:
        self.seen = sorted(path.relative_to(made.root).as_posix() for path in made.root.glob("[ld][ao]*/*.json"))
        return Job("slurm", "1", "here", "/", 0.0)


def test_a_start_elsewhere_packs_first_and_forgets_the_nodes_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, made = Elsewhere(), order(root=tmp_path / "runs" / "a")
    monkeypatch.setattr(launchers, "load", lambda name: launcher)
    run = create(made)
    run.files.doctor.mkdir()
    (run.files.doctor / "node-7.json").write_text("{}")
    rundir.start(run, made)
    assert launcher.seen == ["launch/environment.json"]
