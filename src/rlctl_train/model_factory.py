"""Make a small decoder with random weights and a character-level tokenizer, as a Hugging Face folder.

Nothing is downloaded; the same config and seed give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from rlctl_train.config.model import RandomModel
from rlctl_train.config.vocab import ASSISTANT, END, PAD, SPECIAL, USER, VOCAB

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{ASSISTANT}' if message['role'] == 'assistant' else '{USER}' }}}}"
    f"{{{{ message['content'] + '{END}' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)
"""A turn is marker, content, end; system messages are turns of the user."""


def make_random_model(config: RandomModel, out_dir: Path, seed: int) -> None:
    """Write weights, config, generation config and tokenizer to `out_dir`, loadable with the Auto classes."""
    disable_progress_bar()
    out_dir.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config)
    model.generation_config = GenerationConfig(
        eos_token_id=VOCAB.index(END), pad_token_id=VOCAB.index(PAD), bos_token_id=None
    )
    model.save_pretrained(out_dir)
    make_tokenizer(config.max_position).save_pretrained(out_dir)


def make_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer over `VOCAB`: one token a character, markers whole, other characters left out.

    It is a byte-level BPE without merges, because that is what the class registered for `qwen2` makes of any
    tokenizer file: a word-level one would lose its white space on loading.
    """
    tokenizer = Tokenizer(BPE({_byte_level(token): i for i, token in enumerate(VOCAB)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,  # the registered class would add a token of its own if this were unset
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=max_tokens,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(token: str) -> str:
    # Byte-level vocabularies write the characters below "!" with the letters from U+0100 on.
    return chr(0x100 + ord(token)) if token in ("\n", " ") else token


def _build(config: RandomModel) -> PreTrainedModel:
    shape = {
        "vocab_size": len(VOCAB),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "pad_token_id": VOCAB.index(PAD),
        "eos_token_id": VOCAB.index(END),
        "bos_token_id": None,
        "dtype": "float32",
    }
    match config.architecture:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape))
