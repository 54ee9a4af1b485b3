"""Sum of weighted rewards; each part's own score is recorded under its name."""

from __future__ import annotations

from rlctl_train.config.reward import CustomReward, LeafReward, SumReward
from rlctl_train.registry import REWARDS, load
from rlctl_train.rewards.base import Grade, GradedSample, Grader, guard


def make(config: SumReward) -> Grader:
    """Return a grader that adds `weight * score` over the parts; a part that fails adds 0 and names itself."""
    names = _names(config.parts)
    graders: list[Grader] = [load(REWARDS, part.type)(part) for part in config.parts]
    weights = [part.weight for part in config.parts]

    def grade(sample: GradedSample) -> Grade:
        grades = [guard(part, sample) for part in graders]
        errors = [f"{name}: {g.error}" for name, g in zip(names, grades, strict=True) if g.error is not None]
        return Grade(
            score=sum(weight * g.score for weight, g in zip(weights, grades, strict=True)),
            reason="; ".join(f"{name} {g.score:g}: {g.reason}" for name, g in zip(names, grades, strict=True)),
            parts={name: g.score for name, g in zip(names, grades, strict=True)},
            error="; ".join(errors) or None,
            correct=next((g.correct for g in grades if g.correct is not None), None),
        )

    return grade


def _names(parts: tuple[LeafReward, ...]) -> list[str]:
    """Name parts by type, a user's function by its own name; a second of the same name gets `_2`."""
    names: list[str] = []
    for part in parts:
        base = part.path.rpartition(":")[2] if isinstance(part, CustomReward) else part.type
        same = sum(name == base or name.startswith(f"{base}_") for name in names)
        names.append(base if not same else f"{base}_{same + 1}")
    return names
