"""What a run needs before its first worker: the tokenizer of a model made here is had without the model classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from tests import runs

PREPARE = """
import json, sys
from pathlib import Path
from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.prepare import prepare
files = RunFiles(Path(sys.argv[1]))
tokenizer = prepare(files, RunConfig.model_validate(json.loads(files.config.read_text()))).tokenizer
ids = tokenizer.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True)["input_ids"]
print(json.dumps([ids, tokenizer.eos_token_id, tokenizer.pad_token_id, "torch._dynamo" in sys.modules]))
"""


def test_the_tokenizer_of_a_model_made_here_is_the_same_without_the_model_classes(tmp_path: Path) -> None:
    files = runs.make_run(tmp_path / "run")
    chat = [{"role": "user", "content": "23+45= ?"}]
    words = [sys.executable, "-c", PREPARE, str(files.root), json.dumps(chat)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    usual = AutoTokenizer.from_pretrained(files.model)
    ids = usual.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert json.loads(done.stdout) == [ids, usual.eos_token_id, usual.pad_token_id, False] and len(ids) > 8
