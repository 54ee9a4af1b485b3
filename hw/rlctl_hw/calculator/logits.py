"""Logits and loss: usually the largest tensors of a step. Bytes per logit by the path that computes the loss."""

from __future__ import annotations

from rlctl_hw.calculator.activations import tokens
from rlctl_hw.calculator.sizes import BYTES, vocabulary
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.terms import Term
from rlctl_hw.setup import Setup

FUSED_TOKENS = 256
"""Rows that a fused linear-cross-entropy kernel has at one time; the order of the published kernels' blocks."""
LOSS_TENSORS = 12
"""Three fp32 tensors: log-softmax, the dense gradient that the loss hands it, and its own gradient."""
FP32_COPY = 4
"""The logits cast to fp32: torchtitan drops them after the loss; accelerate and prime-rl return them to the caller."""

HELD_SHARE = 0.75
"""Of that copy, where nobody says: every trainer built on accelerate holds it, so the guess leans that way."""


def logits(setup: Setup, stage: Stage, *, backward: bool = True) -> Term:
    """Return the logits' term of the last stage; other stages, and a critic, have none."""
    if not stage.last or setup.critic:
        return Term("logits", 0.0, "no head on this stage")
    per_logit, words = bytes_per_logit(setup, backward=backward)
    rows, columns = rows_at_once(setup), vocabulary(setup)
    return Term("logits", rows * columns * per_logit, f"{rows} tokens x {columns} logits x {per_logit:g} B: {words}")


def rows_at_once(setup: Setup) -> int:
    """Return the tokens whose logits exist together; Megatron's fused cross entropy takes whole logits."""
    rows = tokens(setup)
    if setup.loss == "fused" and setup.engine == "fsdp2":
        return min(rows, FUSED_TOKENS)
    return min(rows, setup.logits_chunk_tokens) if setup.loss == "chunked" else rows


def bytes_per_logit(setup: Setup, *, backward: bool) -> tuple[float, str]:
    """Return bytes per logit of one rank, and of what they consist."""
    width = BYTES[setup.compute_dtype]
    if not backward:
        return width + 8, "as computed, in fp32, log-softmax"
    if setup.engine == "megatron":
        # The softmax is written over its fp32 input, and the gradient over the softmax.
        # Fused, Transformer Engine needs less and Megatron's own compiled functions more: 4 and 10 B.
        return width + 4, "as computed, and the softmax in fp32 that becomes the gradient"
    if setup.loss == "plain":
        return _plain(setup, width)
    return width + LOSS_TENSORS, "as computed, log-softmax in fp32, the gradients of loss and of log-softmax"


def _plain(setup: Setup, width: float) -> tuple[float, str]:
    """torch.nn.functional.cross_entropy on logits cast to fp32."""
    if setup.compiled_loss:
        return width + 4, "as computed, and an fp32 gradient: one compiled kernel"
    if setup.fp32_logits == "none":
        return 4 * width, "as computed, log-softmax, the gradients of loss and log-softmax, all in one type"
    if setup.mesh.tp > 1:
        words = "DTensor's loss in fp32: log-softmax, and three tensors of its backward pass"
        return width + LOSS_TENSORS + FP32_COPY, words
    held = {"dropped": 0.0, "held": FP32_COPY, None: HELD_SHARE * FP32_COPY}[setup.fp32_logits]
    words = f"the fp32 copy {setup.fp32_logits}" if setup.fp32_logits else "most of an fp32 copy that many callers hold"
    return width + LOSS_TENSORS + held, f"as computed, log-softmax, the gradients of loss and log-softmax, {words}"
