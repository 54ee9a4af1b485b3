"""The report: whole for a finished run, and still a page for a run that has next to nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.telemetry.curves import PANELS, Panel, panels_with_data, series_of
from rlctl_train.telemetry.report import write_report

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects tags, texts and every address the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        addresses = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.fetched += [address for address in addresses if not address.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


def line(step: int, phase: str = "train", **metrics: float) -> dict[str, Any]:
    return {"step": step, "phase": phase, "time": 0.0, **{k.replace("__", "/"): v for k, v in metrics.items()}}


def finished_run(root: Path) -> RunFiles:
    files = RunFiles(root)
    files.samples.mkdir()
    lines = [line(step, critic__score__mean=step / 30, timing_s__gen=0.5) for step in range(1, 31)]
    lines += [line(30, "validation", val__accuracy=0.9)]
    files.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    for step, response in ((0, "no"), (30, SCRIPT)):
        sample = {"prompt": "1+1=", "response": response, "ground_truth": "2", "score": float(step > 0)}
        (files.samples / f"step_{step:06d}.jsonl").write_text(json.dumps(sample) + "\n")
    write_json(files.summary, {"val_accuracy_start": 0.25, "val_accuracy_end": 0.9, "steps": 30, "wall_s": 75.0})
    write_json(files.config, {"algo": {"type": "grpo"}, "seed": 7})
    write_json(files.plan, {"choices": [{"key": "k", "value": 1, "reason": "because", "origin": "formula"}]})
    return files


def test_a_finished_run_gets_figures_curves_samples_settings_and_reasons(tmp_path: Path) -> None:
    files = finished_run(tmp_path)
    write_report(files)
    page = Page(files.report.read_text())
    assert page.tags.count("svg") == 2
    for text in ("25.0%", "90.0%", "1 min 15 s", "1+1=", "grpo", "because", "Training score"):
        assert text in page.text
    assert files.curves.read_bytes().startswith(b"\x89PNG")


def test_the_report_runs_no_script_and_fetches_nothing(tmp_path: Path) -> None:
    files = finished_run(tmp_path)
    write_report(files)
    text = files.report.read_text()
    page = Page(text)
    assert "script" not in page.tags and SCRIPT in page.text
    assert page.fetched == []
    assert not re.search(r"url\((?!#)", text) and "@import" not in text


def test_an_empty_run_folder_still_gives_a_page(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    write_report(files)
    assert "No metrics yet" in files.report.read_text()
    assert files.curves.is_file()


def test_a_failed_run_shows_what_went_wrong_and_the_way_out(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    write_json(files.status, {"state": "failed", "step": 2, "error": {"what": "out of space", "remedy": "free some"}})
    files.metrics.write_text(json.dumps(line(1, critic__score__mean=0.0)) + '\n{"step": 2, "ph')
    write_report(files)
    page = Page(files.report.read_text())
    assert "out of space" in page.text and "free some" in page.text


def test_one_step_of_every_metric_can_be_drawn(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    phases = sorted({phase for panel in PANELS for phase in panel.phases})
    names = {name.replace("*", "x") for panel in PANELS for name in panel.metrics}
    every = [{**line(1, phase), **dict.fromkeys(names, 0.0)} for phase in phases]
    files.metrics.write_text("".join(json.dumps(one) + "\n" for one in every))
    assert len(panels_with_data(every)) == len(PANELS)
    write_report(files)
    assert Page(files.report.read_text()).tags.count("svg") == len(PANELS)


def test_stacked_curves_fill_steps_they_are_missing_from() -> None:
    panel = Panel("time", "s", ("timing_s/gen", "timing_s/ref"), stacked=True)
    lines = [line(1, timing_s__gen=1.0), line(2, timing_s__gen=2.0, timing_s__ref=3.0), line(3)]
    gen, ref = series_of(lines, panel)
    assert (gen.steps, gen.values, ref.values) == ([1, 2], [1.0, 2.0], [0.0, 3.0])
