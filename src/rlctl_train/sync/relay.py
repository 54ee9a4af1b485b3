"""One weight transfer between actors: the buckets of one role's ranks to every receiver, checksums compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from rlctl_train.cluster import collect
from rlctl_train.sync.transfer import compare


def hand_over(
    senders: list[Any],
    receivers: list[Any],
    dtype: str,
    version: int,
    then: Callable[[], object],
    folder: Path | None = None,
) -> None:
    """Stream the weights that the senders hold together to every receiver, in a dtype, and compare checksums.

    `then` is called when the workers have been given all of it and only their answers are still to come. With `folder`
    the weights are those that the first sender has exported there.
    """
    collect([actor.start_update.remote() for actor in receivers])
    sender, *others = senders
    drained = [actor.drain_weights.remote(dtype) for actor in others] if folder is None else []
    streamed = sender.stream_weights.options(num_returns="streaming", _generator_backpressure_num_objects=4)
    stream = streamed.remote(dtype, folder)
    *buckets, last = _relay(stream, receivers)
    collect([*drained, *buckets])
    finished = [actor.finish_update.remote(version) for actor in receivers]
    then()
    received = collect(finished)
    expected: Any = ray.get(last)
    for held in received:
        compare(expected, held, version)


def _relay(stream: Iterator[ray.ObjectRef], receivers: list[Any]) -> Iterator[Any]:
    """Forward each bucket to every receiver while the next is gathered; yield receipts, last the checksum."""
    held: ray.ObjectRef | None = None
    for ref in stream:
        if held is not None:
            yield from [actor.update_weights.remote(held) for actor in receivers]
        held = ref
    yield held
