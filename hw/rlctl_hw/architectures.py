"""What the `config.json` of an architecture leaves unsaid: biases, norms, windows and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Windows = Literal["none", "all", "above", "alternate", "pattern"]
"""Layers with a sliding window where the config has a window and no `layer_types`: none; all; those from
`max_window_layers` on (with `use_sliding_window`); every second, the first included; all but every sixth."""


@dataclass(frozen=True)
class Architecture:
    """A switch is on, off, or the name of the config key that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    norms_per_layer: int = 2
    router_bias: bool = False
    shared_gate: bool = False
    expert_bias: bool = False
    sinks: bool = False
    latent: bool = False
    tied: bool = False
    """Whether the embeddings are tied where the config does not say."""
    windows: Windows = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that published configs leave out."""


_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_GEMMA: dict[str, Any] = {**_ATTENTION_BIAS, "tied": True}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture(qkv_bias=True, windows="above", defaults={"num_key_value_heads": 32}),
    "qwen2_moe": Architecture(qkv_bias="qkv_bias", shared_gate=True, defaults={"qkv_bias": True}),
    "qwen3": Architecture(
        **_ATTENTION_BIAS, qk_norm=True, windows="above", defaults={"num_key_value_heads": 32, "head_dim": 128}
    ),
    "qwen3_moe": Architecture(**_ATTENTION_BIAS, qk_norm=True),
    "llama": Architecture(**_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "mistral": Architecture(windows="all", defaults={"num_key_value_heads": 8}),
    "mixtral": Architecture(windows="all", defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2}),
    "gemma": Architecture(**_GEMMA, defaults={"head_dim": 256}),
    "gemma2": Architecture(
        **_GEMMA, norms_per_layer=4, windows="alternate", defaults={"head_dim": 256, "sliding_window": 4096}
    ),
    "gemma3_text": Architecture(
        **_GEMMA,
        norms_per_layer=4,
        qk_norm=True,
        windows="pattern",
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "glm": Architecture(
        qkv_bias="attention_bias", defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2}
    ),
    "glm4": Architecture(
        qkv_bias="attention_bias",
        norms_per_layer=4,
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2},
    ),
    "glm4_moe": Architecture(qkv_bias="attention_bias", qk_norm="use_qk_norm", router_bias=True),
    "deepseek_v2": Architecture(**_ATTENTION_BIAS, mlp_bias="mlp_bias", latent=True),
    "deepseek_v3": Architecture(**_ATTENTION_BIAS, latent=True, router_bias=True),
    "phi3": Architecture(windows="all"),
    "granite": Architecture(**_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "seed_oss": Architecture(
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"attention_bias": True, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "smollm3": Architecture(**_ATTENTION_BIAS, mlp_bias="mlp_bias", tied=True, defaults={"num_key_value_heads": 4}),
    "ernie4_5": Architecture(
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        tied=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128},
    ),
    "gpt_oss": Architecture(
        **_ATTENTION_BIAS,
        router_bias=True,
        expert_bias=True,
        sinks=True,
        windows="alternate",
        defaults={"attention_bias": True, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
    ),
}

SAME_AS = {
    "kimi_k2": "deepseek_v3",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_moe_text": "glm4_moe",
}
"""Decoders that go by another name, most of them as part of a model that also sees."""
