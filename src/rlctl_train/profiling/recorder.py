"""What one worker records of one step: its ranges, and what the tool adds."""

from __future__ import annotations

import gc
import gzip
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rlctl_train import device
from rlctl_train.config.profile import ProfileConfig
from rlctl_train.device_load import Load
from rlctl_train.importing import keep_for_good
from rlctl_train.memory_watch import held_bytes
from rlctl_train.profiling.allocations import SNAPSHOT
from rlctl_train.profiling.garbage import collections_marked
from rlctl_train.profiling.ranges import listening
from rlctl_train.profiling.snapshots import keep_snapshot
from rlctl_train.profiling.timeline import SUFFIX, Timeline, moment
from rlctl_train.profiling.tools import PROGRAMS, chosen
from rlctl_train.profiling.traces import TRACE

ACTIVITIES = {"cpu": (), "cuda": (ProfilerActivity.CUDA,), "npu": (ProfilerActivity.PrivateUse1,)}
Act = Callable[[], None]
SILENT = nullcontext()
MAX_EVENTS = 100_000
"""Events that the allocator's history keeps; older ones are dropped."""


@dataclass(frozen=True)
class Who:
    """A process that records."""

    role: str
    rank: int
    kind: str
    """The torch device type."""
    slot: int | None = None
    """Number of the device that it works on, counted over the whole run; None for one that has no share in any."""

    @property
    def file(self) -> str:
        """What names of its files begin with."""
        return f"{self.role}-{self.rank}"


class Recorder:
    """Records between `start` and `stop`."""

    def __init__(self, config: ProfileConfig, who: Who) -> None:
        self._config, self._who = config, who
        self._open = ExitStack()

    def start(self, folder: Path, marking: AbstractContextManager[object] = SILENT) -> None:
        """Begin to record what goes to `folder` once it ends; `marking` marks more ranges meanwhile."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self._who.file
        self._open.enter_context(self._ranges(target))
        if chosen(self._config, self._who.role, self._who.rank):
            for context in self._tools(target):
                self._open.enter_context(context)
        self._open.enter_context(marking)
        gc.collect()
        keep_for_good()  # what a tool imports: a collection of it within the step would not come without the tool
        self._open.enter_context(collections_marked())

    def stop(self) -> None:
        """End recording and write it."""
        self._open.close()

    @contextmanager
    def _ranges(self, target: Path) -> Iterator[None]:
        who = self._who
        timeline, load = Timeline(lambda: held_bytes(who.kind)), Load(who.kind)
        with listening(timeline), load.sampled():
            yield
        facts = {"role": who.role, "rank": who.rank, "host": socket.gethostname(), "pid": os.getpid()}
        facts |= {"device": who.kind, "slot": who.slot, "threads": torch.get_num_threads(), "load": load.samples}
        timeline.write(target.with_name(target.name + SUFFIX), **facts)

    def _tools(self, target: Path) -> Iterator[AbstractContextManager[object]]:
        if self._config.tool == "ranges":
            return
        if self._config.tool in PROGRAMS:
            yield listening(device.vendor_range)
            yield device.vendor_capture(self._who.kind)
            yield device.vendor_range(moment())
            return
        if self._config.tool == "msprof":
            shapes, stacks = self._config.shapes, self._config.stacks
            yield device.ascend_profiled(self._config.msprof, target, self._who.kind, shapes=shapes, stacks=stacks)
            yield listening(device.vendor_range)
            return
        yield _traced(self._config, self._who.kind, target.with_name(target.name + TRACE))
        if self._config.tool == "memory":
            yield device.allocator_history(self._who.kind, MAX_EVENTS)
            yield _kept(self._who.kind, target.with_name(target.name + SNAPSHOT))


class Recordable:
    """A worker that can be told to record."""

    _recorder: Recorder | None = None

    def start_recording(self, config: ProfileConfig, who: Who, folder: Path) -> None:
        """Record until `stop_recording`, into files of `folder` named after role and rank."""
        self._recorder = Recorder(config, who)
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
    driver = Recorder(config.model_copy(update={"tool": "ranges"}), Who("driver", 0, "cpu"))
    driver.start(folder)
    try:
        yield
    finally:
        driver.stop()
    stop()


@contextmanager
def _kept(kind: str, path: Path) -> Iterator[None]:
    """Write the allocator's history of the body."""
    yield
    keep_snapshot(kind, path)


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
