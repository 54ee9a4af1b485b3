"""Hold rlctl's algorithms against published implementations on random float32 inputs; write `agreement.md`.

    python benchmarks/agreement.py --verl-python PATH --trl-python PATH [--recipe FOLDER] [--seeds 12]

Each peer runs in an environment of its own and gets the same arrays. `nox -s agreement` does all of it. Ends with 1
where a difference has no reason in `agreement_cases`, or a reason no difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement_cases import CASES, Arrays, Case, draw, published, serve
from agreement_rlctl import CALLS

HERE = Path(__file__).parent
BOUND = 1e-5
PER_TOKEN = ("advantages", "returns")
"""What is compared under the mask alone; gradients and weights must be alike outside it too."""
INTRODUCTION = """# rlctl beside published implementations

Each row calls a published function and rlctl's counterpart on the same random float32 inputs: {seeds} seeds for every
setting. Losses are compared with their gradients, and under all aggregation modes where nothing else is said; metrics
too, but for those of clip_cov, kl_cov, gmpo and bypass, where the same name has another meaning or denominator.
A difference is the largest absolute one, and a share of the value where that is above 1; up to {bound:g} agrees.
`usual` inputs have groups of 2 to 6 in any order, ragged responses and tool replies in between; `plain` have no tool
replies, `empty` some responses without a token, `alone` groups of one, `level` equal scores within a group, `extreme`
log-ratios of up to 80 nats; `pairs` and `quads` are groups of two and four, and `ties` pairs of equal scores.

Peers: {peers}.
Only what a peer offers as a function can be called. Of rlctl's algorithms these are not compared: VAPO's advantage,
the sampled form of distillation, and veto, which verl 0.9.1 no longer has.

Written by `nox -s agreement`.

| peer | function | setting | inputs | largest difference | agree | why they differ |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """The largest difference of one case over seeds, options and outputs, and in which of these."""

    peer: str
    call: str
    name: str
    inputs: str
    reason: str
    difference: float
    output: str


def main() -> None:
    """Run every side, compare, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl-python", required=True)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--recipe", help="a checkout of verl-project/verl-recipe, whose rows are left out otherwise")
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    pythons = {"verl": options.verl_python, "trl": options.trl_python}
    cases = [case for case in CASES if case.peer != "recipe" or options.recipe]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_questions(folder, cases, options.seeds)
        serve("rlctl", CALLS, folder, torch.from_numpy)
        for peer, python in pythons.items():
            recipe = [options.recipe] if options.recipe and peer == "verl" else []
            subprocess.run([python, str(HERE / f"agreement_{peer}.py"), name, *recipe], check=True)
        answers = {peer: dict(np.load(folder / f"{peer}.npz")) for peer in {"rlctl", *(case.peer for case in cases)}}
    rows = compare(cases, answers)
    tell = "from importlib.metadata import version; print(version({!r}))"
    peers = {name: f"{name} {output_of(python, '-c', tell.format(name))}" for name, python in pythons.items()}
    if options.recipe:
        peers["recipe"] = (
            f"verl-recipe (recipe) {output_of('git', '-C', options.recipe, 'rev-parse', '--short', 'HEAD')}"
        )
    text = page(rows, peers, options.seeds)
    (HERE / "agreement.md").write_text(text)
    print(text)
    wrong = [row for row in rows if (row.difference <= BOUND) == bool(row.reason)]
    for row in wrong:
        print("not as stated:", row, file=sys.stderr)
    sys.exit(bool(wrong))


def write_questions(folder: Path, cases: list[Case], seeds: int) -> None:
    """Write the inputs, and each case under each of its options on each of its inputs."""
    inputs, questions = {}, []
    for number, case in enumerate(cases):
        for seed in range(seeds):
            name = f"{case.inputs}-{seed}"
            inputs[name] = case.inputs, seed
            for at, chosen in enumerate(case.options):
                question = {"id": f"{number}.{at}.{seed}", "peer": case.peer, "call": case.call}
                questions.append(question | {"inputs": name, "options": chosen})
    columns: dict[str, Any] = {
        f"{name}:{key}": c for name, wanted in inputs.items() for key, c in draw(*wanted).items()
    }
    np.savez(folder / "inputs.npz", **columns)
    (folder / "cases.json").write_text(json.dumps(questions))


def compare(cases: list[Case], answers: dict[str, Arrays]) -> list[Row]:
    """Return a row for each case, from answers by peer under `CASE.OPTION.SEED:OUTPUT`."""
    gaps: dict[int, list[tuple[float, str]]] = {number: [] for number in range(len(cases))}
    for key, theirs in (
        (key, value) for peer, found in answers.items() if peer != "rlctl" for key, value in found.items()
    ):
        place, _, output = key.partition(":")
        number, _, seed = (int(part) for part in place.split("."))
        ours = answers["rlctl"].get(key)
        if ours is not None:
            mask = draw(cases[number].inputs, seed)["response_mask"] if output in PER_TOKEN else None
            gaps[number].append((difference(ours, theirs, mask), output))
    assert all(gaps.values()), "a case without a common output"
    return [
        Row(case.peer, case.call, case.name, case.inputs, case.reason, *max(gaps[number]))
        for number, case in enumerate(cases)
    ]


def difference(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray | None) -> float:
    """Return the largest difference, of sizes above 1 as a share; where a mask [S, T] is given, under it alone."""
    gap = np.abs(ours - theirs) / np.maximum(1, np.abs(ours))
    gap = gap if mask is None else np.where(mask > 0, gap, 0)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def page(rows: list[Row], peers: dict[str, str], seeds: int) -> str:
    """Return the page; cases that agree and have but other inputs share a row."""
    lines = []
    for (peer, call, name, reason), same in groupby(rows, lambda row: (row.peer, row.call, row.name, row.reason)):
        found = list(same)
        worst = max(found, key=lambda row: row.difference)
        size = f"{worst.difference:.0e}" if np.isfinite(worst.difference) else "not finite"
        told = [peer, f"`{published(peer, call, name)}`", name, ", ".join(row.inputs for row in found), size]
        lines.append("| " + " | ".join([*told, "yes" if worst.difference <= BOUND else "no", reason]) + " |")
    head = INTRODUCTION.format(seeds=seeds, bound=BOUND, peers=", ".join(peers.values()))
    return head + "\n".join(lines) + "\n"


def output_of(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
