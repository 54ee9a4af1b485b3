"""Typed configuration of a run: frozen pydantic models, no torch."""

from rlctl_train.config.relations import Problem, relation_problems
from rlctl_train.config.run import RunConfig

__all__ = ["Problem", "RunConfig", "relation_problems"]
