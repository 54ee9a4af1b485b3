"""From a trainer to transformers and back: whatever was saved, by us or by others, is after a merge the same model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rlctl import app
from rlctl_train.checkpoint import kinds
from rlctl_train.checkpoint.merge import MergeOptions, merge, plan_merge
from rlctl_train.checkpoint.shares import seal, tensors_of, told_of
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.config.errors import FAILED, INTERRUPTED, OK, UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.vocab import VOCAB
from rlctl_train.engines.fsdp2 import Fsdp2Engine
from rlctl_train.model_factory import make_tokenizer
from tests import mcore_files, runs, verl_files
from tests.deepspeed_files import write_universal
from tests.engine_support import make_batch, make_engine, policy_objective, reference
from tests.stored_checkpoints import make_model, save_model

Cli = Callable[..., tuple[int, str, str]]

TRAINED: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window": 4,
    },
    "Qwen3MoeForCausalLM": {"tie_word_embeddings": False},
    "MixtralForCausalLM": {},
}  # fmt: skip
"""Class -> what its config must have. The engine has no soft-capping, which Gemma-2 can be made without."""
CLOSE = 1e-5
"""Largest difference of log-probs in float32, in nats."""
SHARES = ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
UNEVEN = {"vocab_size": 99, "intermediate_size": 66}
"""Rows that four ranks cannot share evenly."""


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    disable_progress_bar()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str | Path) -> tuple[int, str, str]:
        code = app.run(["ckpt", *map(str, words)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def start_run(root: Path, architecture: str) -> RunFiles:
    """Make a run of a model of that class, with its tokenizer."""
    files = runs.make_run(root)
    settings = {"vocab_size": len(VOCAB), "initializer_range": 0.2}
    save_model(files.model, architecture, **settings | TRAINED[architecture])
    make_tokenizer(64).save_pretrained(files.model)
    return files


def trained(files: RunFiles, rows: list[int]) -> tuple[Fsdp2Engine, Tensor]:
    """Take one optimizer step on these rows; return the engine and their log-probs after it."""
    engine, own = make_engine(str(files.model)), make_batch().rows(rows)
    before, _ = engine.logprobs(own, 1.0)
    engine.forward_backward(own, policy_objective)
    engine.optim_step()
    logp, _ = engine.logprobs(own, 1.0)
    assert (logp - before).abs().max() > 1000 * CLOSE
    return engine, logp


def merged_logprobs(root: Path, out: Path) -> Tensor:
    """Merge a run's newest checkpoint and return the batch's log-probs by plain transformers."""
    plan = plan_merge(kinds.read(root), MergeOptions())
    assert plan.problems == ()
    merge(plan, out)
    return reference(str(out), make_batch(), 1.0)[0]


@pytest.mark.parametrize("architecture", TRAINED)
def test_a_model_trained_and_saved_by_one_rank_answers_the_same_once_merged(tmp_path: Path, architecture: str) -> None:
    files = start_run(tmp_path / "run", architecture)
    engine, logp = trained(files, list(range(10)))
    with CheckpointStore(files.checkpoints, keep_last=1).writing(1) as folder:
        engine.save(folder / "actor")
    found = merged_logprobs(files.root, tmp_path / "out")
    torch.testing.assert_close(found, logp, rtol=0, atol=CLOSE)
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "chat_template.jinja").is_file()


def train_as_rank(rank: int, folder: Path) -> None:
    """Train and save a model of every class as one of two ranks of its run; leave the log-probs in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for architecture in TRAINED:
        files = RunFiles(folder / architecture)
        engine, found[architecture] = trained(files, SHARES[rank])
        save_together(engine, CheckpointStore(files.checkpoints, keep_last=1))
    torch.save(found, folder / f"logp_{rank}.pt")
    dist.destroy_process_group()


def save_together(engine: Fsdp2Engine, store: CheckpointStore) -> None:
    """Write each rank's share, and have rank 0 make one checkpoint of them."""
    first = dist.get_rank() == 0
    places: list[Any] = [store.begin(1) if first else None]
    dist.broadcast_object_list(places)
    (place,) = places
    everyone: list[Any] = [None, None]
    dist.gather_object(engine.write_share(place / "actor"), everyone if first else None)
    if first:
        seal(place / "actor", everyone)
        written = {"actor": everyone}
        store.commit(1, {"tensors": tensors_of(written)}, told_of(written))
    dist.barrier()


@pytest.mark.slow
def test_models_trained_and_saved_by_two_ranks_answer_the_same_once_merged(tmp_path: Path) -> None:
    for architecture in TRAINED:
        start_run(tmp_path / architecture, architecture)
    mp.spawn(train_as_rank, (tmp_path,), nprocs=2)  # type: ignore[attr-defined]
    halves = [torch.load(tmp_path / f"logp_{rank}.pt") for rank in range(2)]
    for architecture in TRAINED:
        assert len(list((tmp_path / architecture).rglob("*.distcp"))) == 2
        found = merged_logprobs(tmp_path / architecture, tmp_path / "merged" / architecture)
        for half, rows in zip(halves, SHARES, strict=True):
            torch.testing.assert_close(found[rows], half[architecture], rtol=0, atol=CLOSE, msg=architecture)


def test_gemma2_with_soft_capping_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    save_model(tmp_path, "Gemma2ForCausalLM")
    with pytest.raises(UserError, match="final_logit_softcapping, which the fsdp2 engine does not have"):
        make_engine(str(tmp_path))


def assert_same_model(folder: Path, model: nn.Module, loader: Any = AutoModelForCausalLM) -> None:
    """See that a folder loads, whole, as the same model bit for bit."""
    loaded, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)


def write_verl(folder: Path, model: nn.Module, config: PreTrainedModel, replicas: int = 1) -> None:
    """Write what verl's FSDP trainer saves of a model on four ranks, with config and tokenizer beside."""
    held = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    verl_files.write_shards(folder, held, num_ranks=4, replicas=replicas)
    config.config.architectures = [type(config).__name__]
    config.config.save_pretrained(folder / "huggingface")
    make_tokenizer(64).save_pretrained(folder / "huggingface")


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_verls_shards_become_the_model_they_were_cut_from(
    tmp_path: Path, cli: Cli, architecture: str, dtype: torch.dtype, replicas: int
) -> None:
    model = make_model(architecture, **UNEVEN)
    nn.Module.to(model, dtype)
    write_verl(tmp_path / "global_step_5" / "actor", model, model, replicas)
    code, _, err = cli("merge", "global_step_5", "--out", "out")
    assert code == OK, err
    assert_same_model(tmp_path / "out", model)


def adapted(folder: Path) -> tuple[PreTrainedModel, nn.Module]:
    """Write verl's checkpoint of a model with random adapters; return the model without them and with them in it."""
    from peft import LoraConfig, get_peft_model

    base, model = (make_model("LlamaForCausalLM", **UNEVEN) for _ in range(2))
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    write_verl(folder, wrapped, base)
    (folder / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}))
    return base, wrapped.merge_and_unload()


def assert_close(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=1e-6)


def test_verls_adapters_are_folded_as_peft_merges_them(tmp_path: Path, cli: Cli) -> None:
    base, merged = adapted(tmp_path / "actor")
    code, _, err = cli("merge", "actor", "--out", "out")
    assert code == OK, err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(loaded, merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (loaded.state_dict()[name] - base.state_dict()[name]).abs().max() > 0.01


def test_verls_adapters_are_kept_beside_their_base(tmp_path: Path, cli: Cli) -> None:
    from peft import PeftModel

    base, merged = adapted(tmp_path / "actor")
    code, _, err = cli("merge", "actor", "--out", "out", "--adapter", "keep")
    assert code == OK, err
    assert_same_model(tmp_path / "out", base)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("out"), tmp_path / "out" / "adapter")
    assert_close(wrapped.merge_and_unload(), merged)


def test_verls_critic_keeps_its_head_or_drops_it(tmp_path: Path, cli: Cli) -> None:
    model = make_model("Qwen2ForTokenClassification", num_labels=1, **UNEVEN)
    write_verl(tmp_path / "critic", model, model)
    code, _, err = cli("merge", "critic", "--out", "kept", "--value-head", "keep")
    assert code == OK, err
    assert_same_model(tmp_path / "kept", model, AutoModelForTokenClassification)
    code, _, err = cli("merge", "critic", "--out", "bare", "--value-head", "drop")
    assert code == OK and "score.weight" in err
    assert_same_model(tmp_path / "bare", model.base_model, AutoModel)


def source(folder: Path, model: mcore_files.HfModel) -> PreTrainedModel:
    """Return the model that transformers itself makes of these weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    save_file(model.weights, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", mcore_files.FAMILIES)
def test_megatrons_checkpoints_become_the_model_they_were_made_of(tmp_path: Path, cli: Cli, family: str) -> None:
    model = mcore_files.hf_model(family)
    tensors = mcore_files.mcore_weights(model)
    mcore_files.write_checkpoint(tmp_path / "actor", tensors, config=model.config, tensor_parallel=2)
    code, _, err = cli("merge", "actor", "--out", "out")
    assert code == OK, err
    assert_same_model(tmp_path / "out", source(tmp_path / "source", model))


@pytest.mark.parametrize("flat", [False, True])
def test_deepspeeds_universal_checkpoints_become_the_model_they_were_made_of(
    tmp_path: Path, cli: Cli, flat: bool
) -> None:
    model = save_model(tmp_path / "start", "LlamaForCausalLM")
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    write_universal(tmp_path / "global_step5", weights, flat=flat)
    code, _, err = cli("merge", "global_step5", "--config", "start", "--out", "out")
    assert code == OK, err
    assert_same_model(tmp_path / "out", model)


class Touches:
    """Makes a file `canary` when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize(
    "words", [("inspect",), ("merge", "--out", "out"), ("merge", "--kind", "verl-fsdp", "--out", "out")]
)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_shard_that_would_run_code_is_refused_by_name(
    tmp_path: Path, cli: Cli, words: tuple[str, ...], rank: int
) -> None:
    model = make_model("Qwen2ForCausalLM")
    write_verl(tmp_path / "actor", model, model)
    torch.save({"lm_head.weight": Touches()}, tmp_path / "actor" / f"model_world_size_4_rank_{rank}.pt")
    code, out, err = cli(words[0], "actor", *words[1:])
    assert code == FAILED and "posix.system" in err and f"rank_{rank}.pt" in err and not out
    assert not (tmp_path / "canary").exists() and not list(tmp_path.glob("*out*"))


INTERRUPTED_MERGE = """
import itertools, signal, sys, threading
from rlctl import app
from rlctl_train.checkpoint import safetensors_writer

number, blocks = itertools.count(), safetensors_writer._pwrite

def pwrite(*arguments):
    if next(number) == int(sys.argv[1]):
        signal.pthread_kill(threading.main_thread().ident, int(sys.argv[2]))
    blocks(*arguments)

safetensors_writer._pwrite = pwrite
sys.exit(app.run(sys.argv[3:]))
"""


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_an_interrupted_merge_says_how_to_go_on_and_is_finished_by_the_same_command(tmp_path: Path, cli: Cli) -> None:
    save_model(tmp_path / "in", "LlamaForCausalLM", hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) > 150e6
    cli("merge", "in", "--out", "whole")
    for number in (signal.SIGTERM, signal.SIGINT):
        words = [
            sys.executable,
            "-c",
            INTERRUPTED_MERGE,
            "300",
            str(int(number)),
            "ckpt",
            "merge",
            "in",
            "--out",
            "out",
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == INTERRUPTED
        assert "merging into out was interrupted" in done.stderr and "same command again" in done.stderr
        assert not (tmp_path / "out").exists()
    assert cli("merge", "in", "--out", "out")[0] == OK
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))
