"""Verifying: every harm that can come to a folder is found and named, and an unharmed one is clean."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlctl_train.checkpoint import kinds
from rlctl_train.checkpoint.agreement import agreement, find_probe
from rlctl_train.checkpoint.merge import MergeOptions, merge, plan_merge
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.stored import Checkpoint
from rlctl_train.checkpoint.verify import Finding, verify
from rlctl_train.config.errors import UserError
from tests.stored_checkpoints import in_files, make_model, read_file, read_folder, save_model


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    save_model(tmp_path / "in", "LlamaForCausalLM")
    return merge(plan_merge(read_folder(tmp_path / "in"), MergeOptions(shard_gb=2e-5)), tmp_path / "out")


def faults(folder: Path) -> list[tuple[str, str]]:
    return [(finding.fault, finding.where) for finding in verify(folder).findings]


def test_an_unharmed_folder_is_clean_and_every_byte_of_weights_was_read(merged: Path) -> None:
    verdict = verify(merged)
    weights = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    assert verdict.findings == () and verdict.num_tensors == 21 and verdict.num_bytes > weights


def flip(file: Path, offset: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= bit
    file.write_bytes(content)


def test_one_flipped_bit_names_its_tensor(merged: Path) -> None:
    for file in sorted(merged.glob("*.safetensors"))[:3]:
        for name, tensor in read_file(file).items():
            offset = tensor.pieces[0].offset + tensor.nbytes - 1  # type: ignore[attr-defined]
            flip(file, offset, 128)
            assert faults(merged) == [("changed", name)]
            flip(file, offset, 128)


def test_a_flipped_bit_of_a_header_or_of_the_config_names_the_file(merged: Path) -> None:
    file = sorted(merged.glob("*.safetensors"))[0]
    flip(file, 20)
    flip(merged / "config.json", 20)
    assert set(faults(merged)) == {("changed", file.name), ("changed", "config.json")}


def test_truncated_and_missing_files_are_named(merged: Path) -> None:
    first, second = sorted(merged.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    assert set(faults(merged)) == {("truncated", first.name), ("missing", second.name)}


def swap(a: Path, b: Path) -> None:
    a.rename(a.with_suffix(".aside"))
    b.rename(a)
    a.with_suffix(".aside").rename(b)


def test_swapped_files_are_said_to_be_swapped(merged: Path) -> None:
    first, second = sorted(merged.glob("*.safetensors"))[:2]
    swap(first, second)
    findings = verify(merged).findings
    assert {(one.fault, one.where) for one in findings} == {("swapped", first.name), ("swapped", second.name)}
    assert findings[0].what == f"it holds what belongs to {second.name}"


def test_swapped_tensors_are_said_to_be_swapped(merged: Path) -> None:
    places = {
        name: (file, tensor.pieces[0].offset, tensor.nbytes)  # type: ignore[attr-defined]
        for file in merged.glob("*.safetensors")
        for name, tensor in read_file(file).items()
    }
    names = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    contents = [places[name][0].read_bytes()[places[name][1] :][: places[name][2]] for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        file, offset, num_bytes = places[name]
        whole = bytearray(file.read_bytes())
        whole[offset : offset + num_bytes] = content
        file.write_bytes(whole)
    findings = {one.where: one for one in verify(merged).findings}
    assert set(findings) == set(names) and all(one.fault == "swapped" for one in findings.values())
    assert names[1] in findings[names[0]].what


def saved(folder: Path) -> Path:
    """Write a run's checkpoint of two ranks with hashes of files, and checksums of ranges."""
    store = CheckpointStore(folder, 1)
    parts = {f"rank_{rank}": bytes(range(rank, rank + 64)) for rank in (0, 1)}
    place = store.begin(5)
    tensors = {}
    for name, content in parts.items():
        (place / name).write_bytes(content)
        entry = {"file": name, "offset": 0, "bytes": 64, "checksum": f"{zlib.crc32(content):08x}"}
        tensors.setdefault("w", []).append(entry)
    return store.commit(5, {"tensors": tensors, "checksum": "crc32"})


def harm_flip(folder: Path) -> None:
    flip(folder / "rank_0", 3)


def harm_cut(folder: Path) -> None:
    (folder / "rank_0").write_bytes(b"short")


def harm_swap(folder: Path) -> None:
    swap(folder / "rank_0", folder / "rank_1")


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (harm_flip, {("changed", "rank_0"), ("changed", "w")}),
        (harm_cut, {("truncated", "rank_0")}),
        (harm_swap, {("swapped", "rank_0"), ("swapped", "rank_1")}),
        (lambda folder: (folder / "rank_1").unlink(), {("missing", "rank_1")}),
        (lambda folder: None, set()),
    ],
)
def test_harm_to_a_runs_checkpoint_is_found(
    tmp_path: Path, harm: Callable[[Path], None], found: set[tuple[str, str]]
) -> None:
    folder = saved(tmp_path)
    harm(folder)
    assert set(faults(folder)) == found


def test_checksums_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("crc32", "crc64"))
    with pytest.raises(UserError, match="crc64"):
        verify(folder)


def without_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Checkpoint:
    tensors = in_files(tmp_path, {"x": torch.ones(8, 4)}, 2)
    files = (tmp_path / "x.0", tmp_path / "x.1")
    checkpoint = replace(Checkpoint("verl-fsdp", tmp_path, tensors, files=files), **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(kinds, "read", lambda path, kind=None: checkpoint)
    return checkpoint


def test_without_a_manifest_a_sound_form_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_manifest(tmp_path, monkeypatch)
    verdict = verify(tmp_path)
    assert verdict.manifest is None and verdict.findings == () and verdict.num_bytes == 140


def test_without_a_manifest_missing_pieces_and_cut_files_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = without_manifest(tmp_path, monkeypatch)
    whole = checkpoint.tensors["x"]
    half = replace(whole, pieces=whole.pieces[:1])  # type: ignore[attr-defined, type-var]
    without_manifest(tmp_path, monkeypatch, tensors={"x": half})
    assert verify(tmp_path).findings == (Finding("incomplete", "x", "16 of its 32 elements are in no file"),)
    without_manifest(tmp_path, monkeypatch)
    (tmp_path / "x.0").write_bytes((tmp_path / "x.0").read_bytes()[:-5])
    assert faults(tmp_path) == [("truncated", "x.0")]


def test_without_a_manifest_torchs_archives_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.ones(64)}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    harmed = content.replace(torch.ones(64).numpy().tobytes(), torch.zeros(64).numpy().tobytes())
    (tmp_path / "model.pt").write_bytes(harmed)
    without_manifest(tmp_path, monkeypatch, files=(tmp_path / "model.pt",), tensors={})
    assert faults(tmp_path) == [("changed", "model.pt")]


def test_a_checkpoint_that_cannot_be_read_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, kind: str | None = None) -> Checkpoint:
        raise UserError("rank 3 is missing", "look for it")

    monkeypatch.setattr(kinds, "read", refuse)
    assert verify(tmp_path).findings == (Finding("unreadable", tmp_path.name, "rank 3 is missing"),)


def record(folder: Path, *, off: float = 0.0, temperature: float = 0.7) -> Path:
    """Write what a trainer would have recorded of the model in `in`."""
    model = make_model("LlamaForCausalLM")
    ids = torch.tensor([[1, 5, 9, 30, 31, 32]])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0, 2:-1] / temperature, dim=-1)
    told = [float(logp[at, token]) + off for at, token in enumerate((30, 31, 32))]
    sequence = {"prompt_ids": [1, 5, 9], "response_ids": [30, 31, 32], "logp": told}
    content = {"schema_version": 1, "temperature": temperature, "sequences": [sequence]}
    (folder / "probe.json").write_text(json.dumps(content))
    return folder / "probe.json"


def test_the_merged_model_says_what_the_trainers_did(tmp_path: Path, merged: Path) -> None:
    found = agreement(merged, record(tmp_path))
    assert found.within and found.max_abs < 1e-5 and (found.num_sequences, found.num_tokens) == (1, 3)


def test_another_model_or_temperature_is_found_out(tmp_path: Path, merged: Path) -> None:
    probe = record(tmp_path, off=0.01)
    found = agreement(merged, probe)
    assert not found.within and found.mean_abs == pytest.approx(0.01, abs=1e-4)
    probe.write_text(probe.read_text().replace("0.7", "1.0"))
    assert not agreement(merged, probe).within


def test_a_recording_is_looked_for_and_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no probe\.json"):
        find_probe([tmp_path])
    (tmp_path / "probe.json").write_text('{"temperature": 1, "sequences": [{"prompt_ids": [1]}]}')
    assert find_probe([tmp_path / "none", tmp_path]) == tmp_path / "probe.json"
    with pytest.raises(UserError, match="no recording"):
        agreement(tmp_path, tmp_path / "probe.json")
