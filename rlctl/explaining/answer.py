"""Everything about one key of a run, or a line about each: origin, rule, alternatives, consequence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlctl import schema
from rlctl.explaining.alternatives import MODEL, Alternative, alternatives, probe
from rlctl.explaining.effects import Change, Effect, Planned, effect, is_independent
from rlctl.explaining.leaves import Leaf, leaf_of, only_with
from rlctl.explaining.origins import PLANNER, Setter, setter_of
from rlctl.explaining.rules import relation_words, type_words

REVISION = "model.revision"
UNCOUNTED = {
    "algo.max_rounds": "each further round of generation takes its time",
    "grader.num_workers": "more of them grade faster",
    "engine.packing": "padding takes memory and time of its own",
    "model.lora.target_modules": "adapters on fewer layers take less",
    "rollout.enforce_eager": "CUDA graphs take memory and save time",
    "rollout.engine_args": "vLLM may need more or less with them",
    "rollout.ignore_eos": "responses get longer with it, and so does a step",
}
"""Keys that act on memory or time in truth, and that no plan counts yet; what they do."""


@dataclass(frozen=True)
class Explanation:
    """One key of a run: what it is, who set it, its rules, and each alternative with its effect."""

    leaf: Leaf
    setter: Setter
    rules: tuple[str, ...]
    others: tuple[tuple[Alternative, Effect], ...]
    consequence: str

    def to_json(self) -> dict[str, Any]:
        """Return the four parts as a document has them."""
        origin = asdict(self.setter)
        return {
            "origin": origin,
            "rule": list(self.rules),
            "alternatives": [_alternative(other, does) for other, does in self.others],
            "consequence": self.consequence,
        }


def explanation(run: Planned, key: str) -> Explanation | None:
    """Return all about a key of a run, or None where the run does not have it."""
    leaf = leaf_of(run.resolved, key)
    if leaf is None:
        return None
    setter = setter_of(leaf, run.resolved, run.plan)
    others = tuple((one, effect(run, key, one)) for one in alternatives(run.resolved, leaf, setter.value))
    return Explanation(leaf, setter, _rules(leaf, setter), others, _consequence(run, leaf, others))


def key_line(run: Planned, key: str) -> dict[str, Any]:
    """Return value, origin and meaning of a key of a run, in short."""
    leaf = leaf_of(run.resolved, key)
    assert leaf is not None, "the keys are the run's own"
    setter = setter_of(leaf, run.resolved, run.plan)
    return {
        "key": key,
        "type": type_words(leaf.node),
        "default": leaf.default,
        "value": setter.value,
        "source": setter.source if setter.mark is None else f"{PLANNER} ({setter.mark})",
        "reason": setter.reason,
        "meaning": meaning(leaf.node),
        "only_with": only_with(leaf.node),
    }


def meaning(node: schema.Node) -> str:
    """Return what a key means."""
    return node.description or ("Which variant of the section." if node.path[-1] == "type" else "")


def absent(run: Planned, node: schema.Node) -> str:
    """Say why a run does not have a key, and what would bring it in."""
    origins = run.resolved.origins
    for end in range(1, len(node.path)):
        section = schema.find(node.path[:end])
        assert section is not None, "a key's sections exist"
        if section.key in origins:
            return f"not part of this run: {section.key} is unset; setting {node.key} sets it"
        owners = [schema.tag(model) for model in section.models if node.path[end] in model.model_fields]
        chosen = origins.get(f"{section.key}.type")
        if chosen is not None and chosen.value not in owners:
            needed = " or ".join(map(str, owners))
            return f"not part of this run: it goes with {section.key}.type={needed}, which is {chosen.value}"
    return "not set in this run"


def _rules(leaf: Leaf, setter: Setter) -> tuple[str, ...]:
    """Return type and bounds, the variant the key goes with, its relations, and why a rank set it."""
    needed = only_with(leaf.node)
    found = [type_words(leaf.node), *([f"goes with {needed}"] if needed else []), *relation_words(leaf.key)]
    if setter.reason is not None:
        found.append(f"{setter.set_by}: {setter.reason}" + (f" ({setter.mark})" if setter.mark else ""))
    return tuple(found)


def _consequence(run: Planned, leaf: Leaf, others: tuple[tuple[Alternative, Effect], ...]) -> str:
    """Say what depends on the key."""
    kinds = {does.kind for _, does in others if does.kind != "invalid"}
    if not kinds:
        kinds = _probed(run, leaf)
    truth = UNCOUNTED.get(leaf.node.key)
    if truth is not None and kinds <= {"independent", "same"}:
        return f"The planner does not count it, so no prediction depends on it; in truth {truth}."
    if kinds == {"independent"}:
        return "Memory and step time of this run do not depend on it; the meaning says what it changes."
    if run.plan is None:
        return f"This run does not fit here: {run.refusal}."
    if not kinds:
        return "What follows is unknown: no other value is valid with the rest of this run."
    untimed = "" if run.plan.times else " No step time is predicted for this hardware."
    if kinds == {"same"}:
        return f"The planner reads it, but hardly anything changes on this hardware.{untimed}"
    return f"Memory or step time depend on it.{untimed}"


def _probed(run: Planned, leaf: Leaf) -> set[str]:
    """Return whether anything depends on a key of which no alternative can be named."""
    if leaf.key in (MODEL, REVISION):
        return {"changed"}
    one = probe(run.resolved, leaf)
    if one is None or one.varied is None:
        return set()
    return {"independent"} if is_independent(run.resolved.config, one.varied.config) else {"changed"}


def _alternative(other: Alternative, does: Effect) -> dict[str, Any]:
    return {
        "value": other.value,
        "meaning": other.meaning,
        "effect": does.kind,
        "consequence": does.text,
        "peak": _change(does.peak, "phase", "gib"),
        "most_changed_phase": _change(does.phase, "phase", "gib"),
        "host": _change(does.host, None, "gib"),
        "step_s": _change(does.step_s, None, "expected"),
        "choices": [{"key": key, "value": then, "now": now} for key, then, now in does.choices],
    }


def _change(change: Change | None, name: str | None, unit: str) -> dict[str, Any] | None:
    if change is None:
        return None
    return ({} if name is None else {name: change.what}) | {unit: change.value, "change": change.by}
