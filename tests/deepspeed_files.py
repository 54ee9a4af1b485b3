"""DeepSpeed's universal checkpoints without DeepSpeed: a folder a parameter, a file a state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_universal(folder: Path, weights: Mapping[str, Tensor], *, flat: bool) -> None:
    """Write what DeepSpeed's converter makes of ZeRO 1 and 2, or flat as of ZeRO 3; step 5, invented moments."""
    for name, weight in weights.items():
        (folder / "zero" / name).mkdir(parents=True)
        for state, value in (("fp32", weight), ("exp_avg", weight * 2), ("exp_avg_sq", weight**2)):
            held = value.reshape(-1).clone() if flat else {"param": value, "cat_dim": 0}
            torch.save(held, folder / "zero" / name / f"{state}.pt")
        torch.save(torch.tensor(5.0), folder / "zero" / name / "step.pt")
    shapes = [OrderedDict((name, weight.shape) for name, weight in weights.items())]
    torch.save({"param_shapes": shapes, "ds_version": "0.19"}, folder / "mp_rank_00_model_states.pt")
