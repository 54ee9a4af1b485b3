"""The profile's pages in a real browser: they render, in their colours, without fetching anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling.report import write_comparison, write_page
from rlctl_train.profiling.summary import summarize
from rlctl_train.telemetry.curves import COLORS
from tests import slurm_cluster
from tests.test_profiling_steps import PREDICTED, a_step, event, write_trace

BROWSERS = ("chromium", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1240,1600", "--force-device-scale-factor=1",
)  # fmt: skip
CANNOT = next(iter(BROWSERS)) + " is not here, and apt-get is not, or not for this user"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not any(map(shutil.which, BROWSERS)) and (shutil.which("apt-get") is None or os.geteuid() != 0), reason=CANNOT
    ),
]


@pytest.fixture(scope="module")
def browser() -> str:
    if not any(map(shutil.which, BROWSERS)):
        slurm_cluster.apt_install("chromium")
    return next(path for name in BROWSERS if (path := shutil.which(name)))


def drawn(browser: str, page: Path, scratch: Path) -> NDArray[np.int_]:
    """Return the page as the browser draws it, [height, width, 3]."""
    shot = scratch / "page.png"
    places = (f"--user-data-dir={scratch / 'browser'}", f"--screenshot={shot}")
    done = subprocess.run(
        [browser, *FLAGS, *places, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert shot.exists(), done.stderr
    assert "Refused to" not in done.stderr, "the page's own policy forbids something on it"
    return np.rint(matplotlib.image.imread(shot)[..., :3] * 255).astype(int)


def pixels(picture: NDArray[np.int_], color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - wanted).max(-1) <= 2).sum())


def a_profile(root: Path, mm_us: float = 100_000) -> RunFiles:
    folder = a_step(root)
    write_trace(folder / "actor-0.trace.json.gz", event("aten::mm", 700_000, mm_us))
    (folder / "memory.json").write_text(json.dumps({"actor_update": {"weights": 1.0, "rest": 2.0}}))
    files = RunFiles(root)
    files.metrics.touch()
    return files


def test_a_browser_draws_a_lane_for_every_phase_and_fetches_nothing(tmp_path: Path, browser: str) -> None:
    files = a_profile(tmp_path / "run")
    picture = drawn(browser, write_page(files, summarize(files, {"gen": 0.5}, PREDICTED)), tmp_path)
    assert picture.shape == (1600, 1240, 3)
    for color in COLORS[:2]:  # of the two phases
        assert pixels(picture, color) > 1000, color


def test_a_browser_draws_both_sides_of_a_comparison(tmp_path: Path, browser: str) -> None:
    runs = [a_profile(tmp_path / name, mm_us) for name, mm_us in (("before", 100_000), ("after", 50_000))]
    summaries = [summarize(files, {}, ()) for files in runs]
    picture = drawn(browser, write_comparison(runs[0], *summaries), tmp_path)
    assert all(pixels(picture, color) > 1000 for color in COLORS[:2]), "a bar for each"
