"""A small random model of every class of causal language models that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models.conftest import VOCABULARY

__all__ = ["NOT_BUILT", "OWN", "build", "families"]

_BLOCKS, _WIDTH, _HEADS, _INNER, _HEAD, _EXPERTS = 2, 16, 4, 24, 4, 4

# What configurations call these sizes. A setting that a configuration has not, or that is no number there, is left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim_model"], _WIDTH),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], _BLOCKS),
    **dict.fromkeys(["decoder_layers", "encoder_layers"], _BLOCKS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], _HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], _HEADS),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_heads", "linear_num_value_heads"], _HEADS),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "dff", "d_inner"], _INNER),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], _INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 8),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "dense_intermediate_size", "moe_latent_size"], 8),
    **dict.fromkeys(["head_dim", "dim_head", "swa_head_dim", "linear_head_dim", "rotary_dim"], _HEAD),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"], _HEAD),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], _HEAD),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "hidden_size_per_layer_input"], _HEAD),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], _EXPERTS),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 64),
    "mamba_d_ssm": 32,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LATENT = {"num_key_value_heads": _HEADS, "index_head_dim": 8, "head_dim": None}  # attention with latent keys
_FULL = ["full_attention"] * _BLOCKS

# What a family needs beside that; None leaves a setting as it is.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"], _LATENT),
    **dict.fromkeys(["minicpm3", "youtu"], _LATENT),
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": _EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _FULL, "activation_sparsity_pattern": [0.0] * _BLOCKS}
    | {"intermediate_size": [_INNER] * _BLOCKS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"head_dim": _HEAD, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 8), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2]},
    "zaya": {"num_experts_per_tok": 1},
}

_IMAGES = "images or sound are a part of it; without them it is the text model, which is tested"
_CONFIGURATION = "its configuration cannot be made small with a few settings"

NOT_BUILT = {
    **dict.fromkeys(["blt", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2"], _IMAGES),
    **dict.fromkeys(["moss_transcribe_diarize", "phi4_multimodal"], _IMAGES),
    **dict.fromkeys(["cohere_compass_text", "dbrx", "dots3_note", "longcat_flash"], _CONFIGURATION),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "it drafts for another model"),
}


def families() -> list[str]:
    """Names of model types, one for each class of causal language models."""
    classes: dict[object, str] = {}
    for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        classes.setdefault(kind, name)
    return list(classes.values())


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A small random model; changes are settings of its configuration."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model_class = getattr(transformers, kind if isinstance(kind, str) else kind[0])
    config_class = model_class.config_class
    default = config_class()
    settings = {name: size for name, size in _SIZES.items() if _has_number(default, name)}
    settings.update(OWN.get(family, {}) | changes)
    config = config_class(**{name: value for name, value in settings.items() if value is not None})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert size < 2e7, f"{family} has {size} parameters; give it settings of its own"
    torch.manual_seed(0)
    return model_class(config).eval()


def _has_number(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name)
    except AttributeError:
        return False
    except Exception:  # settings that differ between the layers of some models cannot be read
        return True
    return isinstance(value, (int, float)) or (value is None and (name.endswith("_token_id") or name == "head_dim"))
