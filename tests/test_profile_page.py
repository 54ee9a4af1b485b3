"""The profile's page in a real browser: it renders, in its colours, without fetching anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling.report import summarize, write_page
from rlctl_train.telemetry.curves import COLORS
from tests.test_profiling_steps import a_step

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1240,1400", "--force-device-scale-factor=1",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_a_lane_for_every_phase_and_fetches_nothing(tmp_path: Path) -> None:
    a_step(tmp_path)
    files = RunFiles(tmp_path)
    files.metrics.touch()
    page = write_page(files, summarize(files, {}))
    shot = tmp_path / "page.png"
    places = (f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={shot}")
    words = [str(BROWSER), *FLAGS, *places, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    assert "Refused to" not in done.stderr, "the page's own policy forbids something on it"
    drawn = np.rint(matplotlib.image.imread(shot)[..., :3] * 255).astype(int)
    assert drawn.shape == (1400, 1240, 3)
    for color in COLORS[:2]:  # of the two phases
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(drawn - wanted).max(-1) <= 2).sum() > 1000, color
