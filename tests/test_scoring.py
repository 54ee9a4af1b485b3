"""The score worker on its own: its tokenizer comes as an object, or as a path; it starts without the model classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ray.cloudpickle as pickle
from transformers import AutoTokenizer

from rlctl_train.config import RunConfig
from rlctl_train.scoring import ScoreWorker
from tests import runs

START = """
import sys
import ray.cloudpickle as pickle
from rlctl_train.scoring import ScoreWorker
tokenizer = pickle.loads(open(sys.argv[1], "rb").read())
print(tokenizer.decode([5, 6, 7]), "transformers.modeling_utils" in sys.modules)
"""


def test_a_tokenizer_decodes_the_same_as_object_and_from_its_path(tiny_model: Path) -> None:
    config = RunConfig.model_validate(runs.CONFIG)
    by_path = ScoreWorker(config, str(tiny_model))
    by_object = ScoreWorker(config, pickle.loads(pickle.dumps(AutoTokenizer.from_pretrained(tiny_model))))
    ids = list(range(3, 40))
    assert by_path._tokenizer.decode(ids) == by_object._tokenizer.decode(ids) != ""


def test_it_starts_without_the_model_classes(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (tmp_path / "tokenizer").write_bytes(pickle.dumps(tokenizer))
    arguments = [sys.executable, "-c", START, str(tmp_path / "tokenizer")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*tokenizer.decode([5, 6, 7]).split(), "False"]
