"""One weight transfer, whole: buckets into a receiver, checksums compared. Runs without Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from rlctl_train.checksum import Checksum
from rlctl_train.sync.buckets import Bucket


class SyncError(Exception):
    """A receiver does not hold the weights that were sent."""


class Receiver(Protocol):
    """What `transfer` needs of a rollout engine."""

    def start_update(self) -> None:
        """Prepare to receive weights."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take one bucket."""
        ...

    def finish_update(self, version: int) -> str:
        """Make the new weights current; return the checksum of what is held."""
        ...


def transfer(buckets: Iterable[Bucket], receiver: Receiver, version: int, dtype: torch.dtype) -> str:
    """Send every bucket, cast to `dtype`, and return the checksum both ends agree on; else raise SyncError."""
    sent = Checksum(dtype)
    receiver.start_update()
    for bucket in buckets:
        sent.add(bucket)
        receiver.update_weights((name, tensor.to(dtype)) for name, tensor in bucket)
    compare(sent.hexdigest(), receiver.finish_update(version), version)
    return sent.hexdigest()


def compare(sent: str, held: str, version: int) -> None:
    """Raise SyncError, naming the version, unless the receiver holds what was sent."""
    if sent != held:
        raise SyncError(
            f"weights of version {version} did not arrive whole: the trainer sent {sent}, the receiver holds {held}"
        )
