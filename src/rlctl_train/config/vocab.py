"""The vocabulary of the random model's character-level tokenizer: four markers, newline, printable ASCII."""

from __future__ import annotations

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

SPECIAL: tuple[str, ...] = (PAD, END, USER, ASSISTANT)
"""Padding, end of turn (which is the end-of-sequence token), and the start of either side's turn."""

VOCAB: tuple[str, ...] = (*SPECIAL, "\n", *(chr(code) for code in range(0x20, 0x7F)))
"""All tokens; a token's id is its place."""
