"""The memory calculator: `estimate(setup)` says what one device holds, for any framework's configuration.

Every number is a count of tensors with a reason; `docs/calibration.md` compares it with published measurements.

sizes       parameters of a rank          stages    pipeline stages        states    weights, gradients, optimizer
activations what autograd keeps           logits    loss paths             gathered  FSDP2's buffers
training    moments of an update          forward   log-probabilities      rollout   generation
overheads   fragmentation, context, ...   legal     which splits divide
"""

from rlctl_hw.calculator.estimate import estimate, estimate_stages
from rlctl_hw.calculator.legal import check

__all__ = ["check", "estimate", "estimate_stages"]
