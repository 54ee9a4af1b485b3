"""The engine on a CUDA device: packed half-precision attention, sharded, offloaded, against single precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.engine_support import (
    gradients,
    kl_objective,
    make_batch,
    make_engine,
    make_model,
    policy_objective,
    weights,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def own_group() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def test_half_precision_on_the_device_is_near_single_precision_on_the_host(tmp_path: Path, own_group: None) -> None:
    path, batch = make_model(tmp_path, hidden_size=128), make_batch()
    host = make_engine(path)
    host.forward_backward(batch, policy_objective)
    exact = gradients(host)
    device = make_engine(path, device="cuda", compute_dtype="bfloat16", offload_params=True, offload_optimizer=True)
    device.offload()
    device.onload()
    logp, _ = device.logprobs(batch, 1.0)
    torch.testing.assert_close(logp, host.logprobs(batch, 1.0)[0], atol=0.1, rtol=0.05)
    device.forward_backward(batch, policy_objective)
    ours = {name: grad.cpu() for name, grad in gradients(device).items()}
    distance = sum(float((ours[n] - exact[n]).square().sum()) for n in exact)
    assert distance < 0.05**2 * sum(float(grad.square().sum()) for grad in exact.values())
    before = weights(device)
    assert device.optim_step()["skipped"] == 0
    assert any((after != before[name]).any() for name, after in weights(device).items())


def test_single_precision_on_the_device_agrees_with_the_host(tmp_path: Path) -> None:
    path, batch = make_model(tmp_path), make_batch()
    results = []
    for device in ("cpu", "cuda"):
        engine = make_engine(path, device=device)
        engine.forward_backward(batch, policy_objective)
        results.append({name: grad.cpu() for name, grad in gradients(engine).items()})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_distributions_that_lie_on_the_host_are_compared_on_the_device(tmp_path: Path) -> None:
    path, other, batch = make_model(tmp_path / "own"), make_model(tmp_path / "other", init_std=0.3), make_batch()
    found = []
    for device in ("cpu", "cuda"):
        _, full = make_engine(other, role="reference", device=device, logits_chunk_tokens=7).full_logprobs(batch, 1.3)
        engine = make_engine(path, device=device, logits_chunk_tokens=7)
        metrics = engine.forward_backward(batch.with_columns(ref_full_logp=full), kl_objective, 1.3)
        found.append((metrics, full, {name: grad.cpu() for name, grad in gradients(engine).items()}))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_device_random_state_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    engine = make_engine(make_model(tmp_path / "model"), device="cuda")
    engine.save(tmp_path / "saved")
    draws = torch.rand(3, device="cuda")
    engine.load(tmp_path / "saved")
    assert torch.equal(torch.rand(3, device="cuda"), draws)
