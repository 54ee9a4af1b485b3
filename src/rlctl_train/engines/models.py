"""The modules an engine trains: a Hugging Face decoder with the output that training needs.

Their forward pass answers for predicted tokens only; the output projection never sees a prompt token. Rank 0 reads
the weights; the others build the same module around memory nobody has touched, and get theirs when it is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.model import LoraConfig
from rlctl_train.engines.attention import NAME
from rlctl_train.engines.fused import fuse
from rlctl_train.engines.logits import (
    Top,
    full_logprobs,
    token_logprobs,
    token_logprobs_and_kl,
    token_logprobs_and_squares,
    top_logprobs,
)
from rlctl_train.engines.lora import ALL, adapt, is_adapter, target_layers
from rlctl_train.engines.packing import Pass

Role = Literal["actor", "critic", "reference"]
CHANGES_LOGITS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of architectures that change logits after the output projection, which `Policy` would miss."""


class Decoder(nn.Module):
    """What the two modules share: the Hugging Face model under `lm`, and its hidden states."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return list(cast(Any, self.lm.base_model).layers)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter of the Hugging Face model once, under its name there; adapters are not among them."""
        yield from ((name, p) for name, p in self.lm.named_parameters() if not is_adapter(name))

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter that is trained, adapters and all."""
        yield from ((name, p) for name, p in self.lm.named_parameters() if p.requires_grad)

    @cached_property
    def num_matrix_parameters(self) -> int:
        """Parameters that take part in matrix products: all matrices but an input embedding of its own."""
        matrices = sum(p.numel() for _, p in self.named_weights() if p.ndim > 1)
        embedding = cast(nn.Embedding, self.lm.get_input_embeddings()).weight.numel()
        return matrices if self.lm.config.tie_word_embeddings else matrices - embedding

    @cached_property
    def attention_width(self) -> int:
        """Layers x query heads x head size."""
        config = self.lm.config.get_text_config()
        head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers * config.num_attention_heads * head_size

    def hidden(self, asked: Pass) -> Tensor:
        """Return the last hidden state from which each answer is read, [R, H]."""
        out = cast(nn.Module, self.lm.base_model)(
            input_ids=asked.tokens[None],
            position_ids=asked.positions[None],
            use_cache=False,
            slots=asked.slots,
        )
        return out.last_hidden_state.squeeze(0).index_select(0, asked.predictors)


class Policy(Decoder):
    """A causal language model that answers with log-probabilities."""

    def forward(
        self,
        asked: Pass,
        temperature: float,
        chunk_tokens: int,
        wants_squares: bool = False,
        top: Top | None = None,
        wants_full: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return log-probability of each target and entropy where it was predicted, [R] each, in nats.

        With `wants_squares` the sum of squared probabilities [R] is the third; with a reference to compare with, the
        KL to it [R]. With `wants_full` the second is the log-probabilities of the whole vocabulary, [R, V]. With `top`
        the answer is which tokens are likeliest and their log-probabilities, [R, K] each. Several targets a place are
        [R, K] throughout.
        """
        head = cast(nn.Linear, self.lm.get_output_embeddings())
        if top is not None:
            return top_logprobs(self.hidden(asked), head.weight, head.bias, temperature, chunk_tokens, top)
        arguments = self.hidden(asked), head.weight, head.bias, asked.targets, temperature, chunk_tokens
        if wants_full:
            return full_logprobs(*arguments)
        if asked.ref_full_logp is not None:
            return token_logprobs_and_kl(*arguments, asked.ref_full_logp)
        return token_logprobs_and_squares(*arguments) if wants_squares else token_logprobs(*arguments)


class Critic(Decoder):
    """A decoder with one linear output that answers with values."""

    def forward(self, asked: Pass) -> Tensor:
        """Return the value of the state before each target, [R] in float32."""
        score = cast(nn.Linear, self.lm.score)
        hidden = self.hidden(asked)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return nn.functional.linear(hidden, score.weight.to(hidden.dtype), score.bias.to(hidden.dtype)).squeeze(1)


def load_model(
    path: str,
    role: Role,
    *,
    read_weights: bool,
    trust_remote_code: bool,
    lora: LoraConfig | None,
    frozen_dtype: torch.dtype,
    seed: int,
) -> Decoder:
    """Build the module of a role on the host; without `read_weights` its parameters are arbitrary.

    What is trained is in float32. With `lora` that is adapters, drawn from `seed`, and a critic's output; the rest
    is in `frozen_dtype`. A critic made from a language model gets an output of zeros, so that it starts by promising
    nothing.
    """
    disable_progress_bar()
    settings = _settings(torch.float32 if lora is None else frozen_dtype, trust_remote_code)
    with _reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _refuse_unsupported(config)
        lm = _read(path, role, settings) if read_weights else _shape(config, role, settings)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fuse(lm)
    lm.train()  # gradient checkpointing is off in eval mode
    lm.requires_grad_(role != "reference")
    if lora is not None:
        adapt(lm, lora, seed)
        if role == "critic":
            cast(nn.Linear, lm.score).float().requires_grad_(True)
    return Critic(lm) if role == "critic" else Policy(lm)


def check_targets(path: str, lora: LoraConfig, *, trust_remote_code: bool) -> None:
    """Refuse adapters for layers that the model at `path` lacks; reads its config and no weights."""
    if lora.target_modules == (ALL,):
        return
    with _reading(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm = _shape(config, "actor", _settings(torch.float32, trust_remote_code))
    target_layers(lm, lora)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Say in the user's words that a model cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model at {path!r} does not load: {reason}",
            "set model.path to a folder with config.json and safetensors, or to a hub id",
            exit_code=PREFLIGHT,
        ) from error


def _read(path: str, role: Role, settings: dict[str, Any]) -> PreTrainedModel:
    settings = settings | {"output_loading_info": True, "low_cpu_mem_usage": True}
    if role != "critic":
        return cast(Any, AutoModelForCausalLM).from_pretrained(path, **settings)[0]
    lm, report = cast(Any, AutoModelForTokenClassification).from_pretrained(path, num_labels=1, **settings)
    if "score.weight" in report["missing_keys"]:
        nn.init.zeros_(lm.score.weight)
        nn.init.zeros_(lm.score.bias)
    return lm


def _shape(config: Any, role: Role, settings: dict[str, Any]) -> PreTrainedModel:
    # Built on the host and not on the meta device: buffers that no file holds, such as rotary frequencies, are right.
    with no_init_weights():
        if role != "critic":
            lm = AutoModelForCausalLM.from_config(config, **settings)
        else:
            config.num_labels = 1
            lm = AutoModelForTokenClassification.from_config(config, **settings)
    lm.tie_weights()
    return lm


def _settings(dtype: torch.dtype, trust_remote_code: bool) -> dict[str, Any]:
    return {"dtype": dtype, "attn_implementation": NAME, "trust_remote_code": trust_remote_code}


def _refuse_unsupported(config: Any) -> None:
    text = config.get_text_config()
    for key in CHANGES_LOGITS:
        if text.to_dict().get(key) not in (None, 1, 1.0):
            raise UserError(
                f"model.path is of architecture {config.model_type!r} with {key}, which the fsdp2 engine does not have",
                "choose a model of a plain decoder architecture, such as qwen2, qwen3, llama or mistral",
                exit_code=PREFLIGHT,
            )
