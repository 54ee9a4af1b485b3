"""report.html and curves.png: what a run did, to look at. Works from whatever the run folder holds so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlctl_train.config.layout import RunFiles
from rlctl_train.telemetry import page
from rlctl_train.telemetry.curves import Line, panels_with_data, svg, write_png
from rlctl_train.telemetry.metrics import read_metrics

HIGHLIGHTS = (
    ("model", ("path", "type", "architecture", "hidden_size", "num_layers")),
    ("data", ("type", "train", "operators", "max_operand")),
    ("algo", ("type", "group_size", "aggregation", "kl_loss_coef")),
    ("trainer", ("num_steps", "prompts_per_step", "mini_batches_per_step", "num_devices")),
    ("rollout", ("type", "max_response_tokens", "temperature")),
    ("reward", ("type", "path")),
)


def write_report(files: RunFiles) -> None:
    """Write `curves.png` and a self-contained `report.html` into the run folder."""
    lines = read_metrics(files.metrics)
    panels = panels_with_data(lines)
    title = f"rlctl run {files.root.resolve().name}"
    write_png(panels, files.curves, title)
    config, summary, status = (_read(path) for path in (files.config, files.summary, files.status))
    body = [
        page.header(title, _subtitle(config, status, ended=bool(summary))),
        page.failure(status.get("error")),
        page.tiles(_tiles(lines, summary)),
        page.charts([(panel.title, svg(panel, series)) for panel, series in panels]),
        page.samples(_sample_pairs(files.samples)),
        page.settings(_highlights(config)),
        page.choices(_read(files.plan).get("choices", [])),
        page.details("config.json", config),
    ]
    _replace(files.report, page.document(title, body))


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file of the run folder; empty when it is not written yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _subtitle(config: dict[str, Any], status: dict[str, Any], *, ended: bool) -> str:
    """Return one line: algorithm, model, and how far the run is."""
    model = config.get("model", {})
    name = model.get("path") or " ".join(str(model[key]) for key in ("type", "architecture") if key in model)
    parts = [config.get("algo", {}).get("type", ""), name, "done" if ended else status.get("state", "")]
    if "step" in status:
        parts.append(f"step {status['step']} of {status.get('num_steps', '?')}")
    return " · ".join(part for part in parts if part)


def _tiles(lines: Sequence[Line], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures: from the summary where the run has ended, else from the metrics so far."""
    accuracy = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    trained = [line for line in lines if line.get("phase") == "train"]
    start = summary.get("val_accuracy_start", accuracy[0] if accuracy else None)
    end = summary.get("val_accuracy_end", accuracy[-1] if accuracy else None)
    rates = [line["perf/throughput"] for line in trained if "perf/throughput" in line]
    speed = summary.get("tokens_per_s")
    per_device = sum(rates) / len(rates) if rates else None
    steps = summary.get("steps", trained[-1]["step"] if trained else None)
    figures = [
        ("held-out accuracy before", None if start is None else f"{start:.1%}"),
        ("held-out accuracy now", None if end is None else f"{end:.1%}"),
        ("steps", None if steps is None else f"{steps:,}"),
        ("run time", _duration(summary["wall_s"]) if summary.get("wall_s") is not None else None),
        ("tokens per second", None if speed is None else f"{speed:,.0f}"),
        ("tokens/s per device", None if speed is not None or per_device is None else f"{per_device:,.0f}"),
    ]
    return [(name, text) for name, text in figures if text is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sample_pairs(folder: Path) -> list[page.SamplePair]:
    """Return the prompts that both the first and the last validation kept, in the order of the last."""
    found = sorted(folder.glob("step_*.jsonl")) if folder.is_dir() else []
    if not found:
        return []
    before = {_prompt(sample): sample for sample in read_metrics(found[0])}
    return [
        page.SamplePair(_prompt(after), str(after.get("ground_truth", "")), before[_prompt(after)], after)
        for after in read_metrics(found[-1])
        if _prompt(after) in before
    ]


def _prompt(sample: Line) -> str:
    """Return a sample's prompt as text; chat messages become their contents."""
    prompt = sample.get("prompt", "")
    if isinstance(prompt, list):
        return "\n".join(str(message.get("content", "")) for message in prompt)
    return str(prompt)


def _highlights(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings a reader asks for first, as (key, value)."""
    rows = []
    for section, keys in HIGHLIGHTS:
        values = config.get(section) or {}
        rows += [(f"{section}.{key}", _plain(values[key])) for key in keys if values.get(key) is not None]
    lr = config.get("trainer", {}).get("optim", {}).get("lr")
    rows += [("trainer.optim.lr", _plain(lr))] if lr is not None else []
    return rows + [(key, str(config[key])) for key in ("placement", "seed") if key in config]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
