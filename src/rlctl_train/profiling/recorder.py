"""What one worker records of one step: its ranges, and what the tool adds."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from rlctl_train import device
from rlctl_train.config.profile import ProfileConfig
from rlctl_train.memory_watch import held_bytes
from rlctl_train.profiling.ranges import listening
from rlctl_train.profiling.timeline import SUFFIX, Timeline, moment
from rlctl_train.profiling.tools import PROGRAMS, chosen
from rlctl_train.profiling.traces import TRACE

SNAPSHOT = ".snapshot.pickle"
ACTIVITIES = {"cpu": (), "cuda": (ProfilerActivity.CUDA,), "npu": (ProfilerActivity.PrivateUse1,)}
Act = Callable[[], None]
SILENT = nullcontext()
MAX_EVENTS = 100_000
"""Events that the allocator's history keeps; older ones are dropped."""


class Recorder:
    """Records between `start` and `stop`; `kind` is the torch device type."""

    def __init__(self, config: ProfileConfig, role: str, rank: int, kind: str) -> None:
        self._config, self._role, self._rank, self._kind = config, role, rank, kind
        self._open = ExitStack()

    def start(self, folder: Path, marking: AbstractContextManager[object] = SILENT) -> None:
        """Begin to record what goes to `folder` once it ends; `marking` marks more ranges meanwhile."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self._role}-{self._rank}"
        self._open.enter_context(self._ranges(target))
        if chosen(self._config, self._role, self._rank):
            for context in self._tools(target):
                self._open.enter_context(context)
        self._open.enter_context(marking)

    def stop(self) -> None:
        """End recording and write it."""
        self._open.close()

    @contextmanager
    def _ranges(self, target: Path) -> Iterator[None]:
        timeline = Timeline(lambda: held_bytes(self._kind))
        with listening(timeline):
            yield
        facts = {"role": self._role, "rank": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
        timeline.write(target.with_name(target.name + SUFFIX), **facts, device=self._kind)

    def _tools(self, target: Path) -> Iterator[AbstractContextManager[object]]:
        if self._config.tool == "ranges":
            return
        if self._config.tool in PROGRAMS:
            yield listening(device.vendor_range)
            yield device.vendor_capture(self._kind)
            yield device.vendor_range(moment())
            return
        if self._config.tool == "msprof":
            shapes, stacks = self._config.shapes, self._config.stacks
            yield device.ascend_profiled(self._config.msprof, target, self._kind, shapes=shapes, stacks=stacks)
            yield listening(device.vendor_range)
            return
        yield _traced(self._config, self._kind, target.with_name(target.name + TRACE))
        if self._config.tool == "memory":
            yield device.allocations(self._kind, target.with_name(target.name + SNAPSHOT), MAX_EVENTS)


class Recordable:
    """A worker that can be told to record."""

    _recorder: Recorder | None = None

    def start_recording(self, config: ProfileConfig, role: str, rank: int, kind: str, folder: Path) -> None:
        """Record until `stop_recording`, into files of `folder` named after role and rank."""
        self._recorder = Recorder(config, role, rank, kind)
        self._recorder.start(folder, self._marking())

    def _marking(self) -> AbstractContextManager[object]:
        """Return what marks more ranges while the worker records."""
        return nullcontext()

    def stop_recording(self) -> None:
        """Write what was recorded; a worker that took another's place since has nothing."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None


@contextmanager
def recorded(
    config: ProfileConfig, folder: Path, start: Callable[[], None], stop: Callable[[], None]
) -> Iterator[None]:
    """Record the body in the driver, and in workers that `start` and `stop` recording."""
    start()
    driver = Recorder(config.model_copy(update={"tool": "ranges"}), "driver", 0, "cpu")
    driver.start(folder)
    try:
        yield
    finally:
        driver.stop()
    stop()


@contextmanager
def _traced(config: ProfileConfig, kind: str, path: Path) -> Iterator[None]:
    """Have torch.profiler record the body, ranges included, as a trace."""
    with ExitStack() as stack:
        made = stack.enter_context(
            profile(
                activities=[ProfilerActivity.CPU, *ACTIVITIES[kind]],
                record_shapes=config.shapes,
                with_stack=config.stacks,
                profile_memory=config.tool == "memory",
            )
        )
        stack.enter_context(listening(record_function))
        yield
        device.synchronize(kind)
    plain = path.with_suffix("")
    made.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=4) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
