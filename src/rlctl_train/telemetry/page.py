"""The HTML of a report: one page, no outside assets, readable in light and dark. Every value is escaped here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d222b; --soft: #5d6675;
  --line: #d9dee6; --accent: #2f6fde; --good: #1d7f56; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e9ee; --soft: #9aa4b2;
  --line: #343b46; --accent: #7fa8f5; --good: #5cc596; --bad: #ee8078; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 12px; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 22px; }
.tile { padding: 14px 16px; } .tile b { display: block; font-size: 25px; font-weight: 650; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 12px; }
.chart { padding: 10px; margin: 0; } .chart svg { width: 100%; height: auto; display: block; color: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 8px 14px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: 13px; }
td.text, td code { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo, monospace; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 4px 28px;
  padding: 12px 16px; margin: 0; } .settings div { display: flex; justify-content: space-between; gap: 12px; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.error { padding: 14px 16px; margin-top: 20px; border-left: 4px solid var(--bad); }
details { padding: 12px 16px; margin-top: 12px; } summary { cursor: pointer; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, Menlo, monospace; }
"""


@dataclass(frozen=True)
class SamplePair:
    """One held-out prompt with the model's response at the first and at the last validation."""

    prompt: str
    ground_truth: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def document(title: str, body: Sequence[str]) -> str:
    """Return the whole page. Its policy forbids the browser to fetch anything."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(body)}</main>
</body>
</html>
"""


def header(title: str, subtitle: str) -> str:
    """Return the heading with one line below it."""
    return f'<h1>{escape(title)}</h1>\n<div class="soft">{escape(subtitle)}</div>\n'


def failure(error: Mapping[str, str] | None) -> str:
    """Return what stopped the run and the way out; nothing for a healthy run."""
    if not error:
        return ""
    what, remedy = escape(error.get("what", "")), escape(error.get("remedy", ""))
    return f'<div class="card error"><b>{what}</b><div class="soft">{remedy}</div></div>\n'


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return the headline figures as (name, value)."""
    cells = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>'
        for name, value in figures
    )
    return f'<div class="tiles">{cells}</div>\n' if cells else ""


def charts(drawings: Sequence[tuple[str, str]]) -> str:
    """Return the charts, given as (title, SVG made here)."""
    if not drawings:
        return '<h2>Curves</h2>\n<p class="soft">No metrics yet.</p>\n'
    figures = "".join(
        f'<figure class="card chart" role="img" aria-label="{escape(title)}">{svg}</figure>' for title, svg in drawings
    )
    return f'<h2>Curves</h2>\n<div class="charts">{figures}</div>\n'


def samples(pairs: Sequence[SamplePair]) -> str:
    """Return held-out responses before and after, side by side."""
    if not pairs:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(pair.prompt)}</td><td class="text">{escape(pair.ground_truth)}</td>'
        f"{_response(pair.before)}{_response(pair.after)}</tr>"
        for pair in pairs
    )
    head = _head("prompt", "answer", "first validation", "last validation")
    return f"<h2>Held-out samples</h2>\n{_table(head, rows)}"


def settings(rows: Sequence[tuple[str, str]]) -> str:
    """Return the settings a reader asks for first."""
    if not rows:
        return ""
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in rows)
    return f'<h2>Settings</h2>\n<dl class="card settings">{cells}</dl>\n'


def choices(made: Sequence[Mapping[str, Any]]) -> str:
    """Return what the planner chose and why."""
    if not made:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(str(choice['key']))}</code></td><td>{escape(str(choice['value']))}</td>"
        f"<td>{escape(str(choice['reason']))}</td><td class='soft'>{escape(str(choice['origin']))}</td></tr>"
        for choice in made
    )
    return f"<h2>Plan</h2>\n{_table(_head('key', 'value', 'reason', 'origin'), rows)}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text under a heading."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2>\n{_table(_head(*columns), body)}"


def details(title: str, data: Mapping[str, Any]) -> str:
    """Return a JSON document, folded up; nothing when it is empty."""
    if not data:
        return ""
    text = escape(json.dumps(data, indent=2))
    return f'<details class="card"><summary>{escape(title)}</summary><pre>{text}</pre></details>\n'


def _response(sample: Mapping[str, Any]) -> str:
    score = sample.get("score")
    mark = "" if score is None else f' <span class="{"good" if score > 0 else "bad"}">({score:g})</span>'
    return f'<td class="text">{escape(str(sample.get("response", "")))}{mark}</td>'


def _head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>"


def _table(head: str, rows: str) -> str:
    return f'<div class="card scroll"><table>{head}{rows}</table></div>\n'
