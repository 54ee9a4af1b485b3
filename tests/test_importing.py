"""While a large library is imported the garbage collector rests, and only then."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from rlctl_train.importing import keep_for_good, uncollected
from rlctl_train.registry import load


def test_what_a_table_names_is_imported_without_collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rests_while_imported.py").write_text("import gc\nCOLLECTS = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load({"one": "rests_while_imported:COLLECTS"}, "one") is False
    assert gc.isenabled()


def test_an_import_that_fails_wakes_the_collector() -> None:
    with pytest.raises(ModuleNotFoundError):
        load({"one": "no_such_module_anywhere:NAME"}, "one")
    assert gc.isenabled()


def test_a_collector_that_rested_before_rests_after() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_kept_for_good_is_no_longer_gone_through_and_what_comes_later_is_still_collected() -> None:
    class Node:
        """Refers to itself."""

        def __init__(self) -> None:
            self.me = self

    before = Node()
    keep_for_good()
    try:
        later = weakref.ref(Node())
        assert len(gc.get_objects()) < gc.get_freeze_count()
        assert not any(one is before for one in gc.get_objects())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
