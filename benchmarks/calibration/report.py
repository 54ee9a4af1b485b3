"""Write docs/calibration.md and its plot: `nox -s calibration`; `--check` fails where they are out of date.

The page is text.md with the tables computed here put in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import frameworks
import megatron_ci
from accuracy import Accuracy, Point, accuracy, framework_points, megatron_points, not_covered, refused
from scatter import scatter

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
COLUMNS = ("rows", "n", "median error", "90th percentile", "under by more than 5 %", "inside the band")


def main(arguments: Sequence[str]) -> int:
    """Write the files, or compare; return how many are out of date."""
    wanted = {"calibration.md": page(), "calibration.svg": scatter([*framework_points(), *megatron_points("peak")])}
    stale = [name for name, text in wanted.items() if _read(DOCS / name) != text]
    if "--check" not in arguments:
        for name in stale:
            (DOCS / name).write_text(wanted[name], encoding="utf-8")
            print(f"wrote docs/{name}")
        return 0
    for name in stale:
        print(f"docs/{name} is out of date: run `nox -s calibration`", file=sys.stderr)
    return len(stale)


def page() -> str:
    """Return the page."""
    text = (HERE / "text.md").read_text(encoding="utf-8")
    named, peak, steady = framework_points(), megatron_points("peak"), megatron_points("steady")
    tables = {
        "ACCURACY": _table(_by_group(named, "reserved"), _by_group(peak, "peak")),
        "TOTALS": _table(
            {
                "frameworks, path read from their code": accuracy(named),
                "frameworks, common flags only": accuracy(framework_points(frameworks.common_flags)),
                "Megatron CI, peak": accuracy(peak),
                "Megatron CI, steady state": accuracy(steady),
                "everything, odd rows": accuracy([*named, *peak][::2]),
                "everything, even rows": accuracy([*named, *peak][1::2]),
            }
        ),
        "ROWS": "\n".join(_rows(named)),
        "LEFT_OUT": "\n".join(f"| {name} | {count} |" for name, count in not_covered().items()),
        "COVERED": f"{len(peak)} of {len(megatron_ci.rows())}",
        "REFUSED": "; ".join(f"{name}: {'refused' if ok else 'MISSED'}" for name, ok in refused().items()),
    }
    for key, value in tables.items():
        text = text.replace(f"@{key}@", value)
    return text


def _by_group(points: Sequence[Point], metric: str) -> dict[str, Accuracy]:
    groups = dict.fromkeys(point.group for point in points)
    return {f"{group} ({metric})": accuracy([p for p in points if p.group == group]) for group in groups}


def _table(*parts: dict[str, Accuracy]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for part in parts:
        lines += [
            f"| {name} | {a.num} | {a.median:.1%} | {a.p90:.1%} | {a.under:.0%} | {a.in_band:.0%} |"
            for name, a in part.items()
        ]
    return "\n".join(lines)


def _rows(points: Sequence[Point]) -> Iterator[str]:
    for row, point in zip((r for r in frameworks.rows() if r["metric"] == "reserved"), points, strict=True):
        band = f"{point.predicted.low_gib:.1f} to {point.predicted.high_gib:.1f}"
        yield (
            f"| [{point.group}]({row['source']}) | {point.name} | {point.measured_gib:.1f} | "
            f"{point.predicted.gib:.1f} | {band} | {point.error:+.1%} | {row['reads']} |"
        )


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
