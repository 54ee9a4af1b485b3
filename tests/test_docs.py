"""Documents cannot drift: generated pages are current, and what pages name exists."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlctl import app, schema
from rlctl_train.config import RunConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = "|".join(RunConfig.model_fields)
KEY = re.compile(rf"(?<![\w/.-])((?:{SECTIONS})(?:\.[a-z][a-z0-9_]*)+)(?![\w/(])")
FILE_ENDINGS = ("py", "json", "jsonl", "html", "md", "toml", "png")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rlctl_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("name", ["config.md", "cli.md", "metrics.md", "doctor.md", "algorithms.md"])
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generator.pages()[name], "run `nox -s docs`"


def test_a_changed_page_is_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "DOCS", tmp_path)
    assert generator.main(["--check"]) == len(generator.pages())
    assert generator.main([]) == 0
    (tmp_path / "cli.md").write_text("drifted")
    assert generator.main(["--check"]) == 1
    assert (tmp_path / "cli.md").read_text() == "drifted"


def test_the_configuration_page_has_every_key() -> None:
    text = generator.config_page()
    missing = [node.key for node in schema.leaves() if f"`{node.key}`" not in text and node.path[-1] != "type"]
    assert not missing


def test_defaults_given_by_an_owner_are_the_ones_shown() -> None:
    text = generator.config_page()
    assert "| `warm_start.optim.lr` | number | `0.001` |" in text
    assert "| `trainer.optim.lr` | number | `1e-06` |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_show_exist(page: Path) -> None:
    unknown = [" ".join(words) for words in commands_shown(page.read_text()) if not exists(words)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_pages_name_exist(page: Path) -> None:
    keys = {key for key in KEY.findall(page.read_text()) if key.rpartition(".")[2] not in FILE_ENDINGS}
    assert not [key for key in keys if schema.find(tuple(key.split("."))) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_pages_name_exist(page: Path) -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in sources.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", page.read_text())
    assert not [name for name in named if name not in functions | sources.keys()]


def test_the_readme_is_short_and_starts_with_the_one_command() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    assert any("nox -s quickstart" in line for line in lines[:20])


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks[1].strip() in script.splitlines()


def commands_shown(text: str) -> Iterator[list[str]]:
    """Yield the words after `rlctl` of each command in code, without options and settings."""
    code = re.findall(r"```(?:sh)?\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL)
    for line in "\n".join(block or span for block, span in code).splitlines():
        for match in re.finditer(r"(?:^|/)rlctl ([a-z][^#|;]*)", line):
            yield [word for word in match[1].split() if re.fullmatch(r"[a-z][\w.-]*", word)]


def exists(words: list[str]) -> bool:
    """Return whether the words name a command; the words after the last command may be anything."""
    if words[0] not in app.COMMANDS:
        return False
    command: Any = app.load(words[0])
    verbs = getattr(command, "commands", {})
    bare_name = words[0] in ("preset", "plan", "profile")
    return not verbs or len(words) == 1 or words[1] in verbs or bare_name
