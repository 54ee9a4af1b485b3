"""Chat messages to prompt tokens: the tokenizer's chat template with the generation prompt, nothing added. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.data.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot turn messages into a prompt."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template",
            "use an instruct model, or set model.tokenizer to a tokenizer that has one",
            exit_code=PREFLIGHT,
        )


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Return the prompt's text, up to where the assistant begins; a refusal by the template is a `RowError`."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RowError(f"the chat template refuses it: {error}") from error
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise texts as they stand; special tokens come from the template's own text."""
    if not texts:
        return []
    # Not verbose: whether a text is too long for the model is for the caller to judge.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
