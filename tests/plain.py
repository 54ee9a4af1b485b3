"""What an exported folder is worth by plain `generate` of transformers, apart from every engine of ours."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.data.loader import PromptLoader
from rlctl_train.rewards.pool import GradedSample, GraderPool

CHUNK = 64


@torch.inference_mode()
def plain_accuracy(files: RunFiles) -> float:
    """Return the mean accuracy on a run's made-up held-out prompts of greedy decoding with what it has exported."""
    folder, val_path = files.hf, files.data / "val.parquet"
    config = RunConfig.model_validate(json.loads(files.config.read_text()))
    assert config.reward is not None
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loader = PromptLoader(val_path, tokenizer, config.data.model_copy(update={"shuffle": False}), config.seed)
    rows = loader.next_batch(min(config.validation.max_prompts, len(loader)))
    texts: list[str] = []
    for start in range(0, len(rows), CHUNK):
        prompts = [{"input_ids": row.prompt_ids} for row in rows[start : start + CHUNK]]
        inputs = tokenizer.pad(prompts, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=config.rollout.max_response_tokens)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    samples = [
        GradedSample(text, row.record["ground_truth"], row.record["data_source"], row.record["extra_info"])
        for text, row in zip(texts, rows, strict=True)
    ]
    pool = GraderPool(config.reward, config.grader)
    try:
        grades = pool.score(samples)
    finally:
        pool.close()
    return sum(grade.accuracy for grade in grades) / len(grades)
