"""Chunked log-probabilities: exact against plain log-softmax, in value and gradient, for any chunk size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlctl_train.engines.logits import full_logprobs, token_logprobs, token_logprobs_and_kl, token_logprobs_and_squares


def inputs(num_tokens: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, 5), (11, 5), (11,)]
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_probs = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_plain_log_softmax(chunk_tokens: int, temperature: float) -> None:
    targets = torch.arange(7)
    results = []
    for function in (plain, lambda *a: token_logprobs(*a, chunk_tokens)):
        leaves = inputs()
        logp, entropy = function(*leaves, targets, temperature)
        (logp.sin().sum() + entropy.square().sum()).backward()
        results.append([logp, entropy, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_sums_of_squared_probabilities_come_beside_the_same_answers(chunk_tokens: int) -> None:
    hidden, weight, bias = inputs()
    targets = torch.arange(7)
    logp, entropy, squares = token_logprobs_and_squares(hidden, weight, bias, targets, 0.7, chunk_tokens)
    z = torch.nn.functional.linear(hidden, weight, bias) / 0.7
    torch.testing.assert_close(squares, (torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1)).exp())
    assert not squares.requires_grad and (squares <= 1).all()
    for ours, theirs in zip((logp, entropy), token_logprobs(hidden, weight, bias, targets, 0.7, 3), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_the_kl_to_other_distributions_comes_beside_the_same_answers(chunk_tokens: int) -> None:
    targets, ref = torch.arange(7), torch.randn(7, 11, dtype=torch.float64).log_softmax(-1)
    results = []
    for ours in (False, True):
        hidden, weight, bias = leaves = inputs()
        answers = plain(hidden, weight, bias, targets, 0.7)
        log_probs = (torch.nn.functional.linear(hidden, weight, bias) / 0.7).log_softmax(-1)
        kl = (log_probs.exp() * (log_probs - ref)).sum(-1)
        if ours:
            *answers, kl = token_logprobs_and_kl(hidden, weight, bias, targets, 0.7, chunk_tokens, ref)
        (answers[0].sin().sum() + answers[1].square().sum() + kl.cos().sum()).backward()
        results.append([*answers, kl, *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_whole_distributions_come_with_what_they_say_of_the_targets(chunk_tokens: int) -> None:
    hidden, weight, bias = inputs()
    targets = torch.arange(7)
    logp, whole = full_logprobs(hidden, weight, bias, targets, 0.7, chunk_tokens)
    torch.testing.assert_close(whole, (torch.nn.functional.linear(hidden, weight, bias) / 0.7).log_softmax(-1))
    torch.testing.assert_close(logp, token_logprobs(hidden, weight, bias, targets, 0.7, 3)[0])
    assert not whole.requires_grad


def test_gradients_are_those_of_finite_differences() -> None:
    targets = torch.tensor([0, 3, 10, 5])
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, b, targets, 0.9, 3), inputs(4))


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_nobody_uses_gives_no_gradient(used: int) -> None:
    targets = torch.arange(7)
    hidden, weight, _ = inputs()
    token_logprobs(hidden, weight, None, targets, 1.0, 4)[used].sum().backward()
    expected, expected_weight, _ = inputs()
    plain(expected, expected_weight, None, targets, 1.0)[used].sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad)
    torch.testing.assert_close(weight.grad, expected_weight.grad)


def test_no_predicted_token_gives_zero_gradients() -> None:
    hidden, weight, bias = inputs(0)
    logp, entropy = token_logprobs(hidden, weight, bias, torch.zeros(0, dtype=torch.long), 1.0, 4)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_half_precision_inputs_give_single_precision_answers() -> None:
    hidden, weight, _ = inputs(dtype=torch.float32)
    targets = torch.arange(7)
    logp, entropy = token_logprobs(hidden.bfloat16(), weight.bfloat16(), None, targets, 1.0, 4)
    exact, exact_entropy = plain(hidden, weight, None, targets, 1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(entropy, exact_entropy, atol=0.05, rtol=0.05)


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


@pytest.mark.parametrize(("chunk_tokens", "num_elements"), [(8, 64 * 5), (64, 64 * 11)])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(chunk_tokens: int, num_elements: int) -> None:
    hidden, weight, _ = inputs(64)
    with LargestTensor() as largest:
        logp, entropy = token_logprobs(hidden, weight, None, torch.zeros(64, dtype=torch.long), 1.0, chunk_tokens)
        (logp.sum() + entropy.sum()).backward()
    assert largest.num_elements == num_elements
