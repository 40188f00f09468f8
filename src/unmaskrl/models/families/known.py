"""Released checkpoints that are known by name: their family, and their config.json as far as it
sets sizes and ids.

Recipes can so be costed and rehearsed without a download. Sizes of LLaDA-8B as its converters check
them (GSAI-ML/ LLaDA-8B-Instruct, config.json); Dream's are Qwen2.5-7B's
(Dream-org/Dream-v0-Instruct-7B, config.json), and DiffuCoder starts from Qwen2.5-Coder-7B. The
files themselves could not be downloaded here: when one is at hand, it is what counts.
"""

from __future__ import annotations

from typing import Any

# the start of a hub id -> the model_type in its config.json (DiffuCoder's is Dream's)
KNOWN = {
    "GSAI-ML/LLaDA-8B-": "llada",
    "GSAI-ML/LLaDA-1.5": "llada",
    "Dream-org/Dream-v0-": "Dream",
    "apple/DiffuCoder-7B-": "Dream",
}
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "llada": {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "max_sequence_length": 4096,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    },
    "Dream": {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "vocab_size": 152064,
        "mask_token_id": 151666,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
    },
}


def known_config(hub_id: str) -> dict[str, Any] | None:
    """The config of a released checkpoint by its hub id (or of a family by its model_type); None if
    it is not known.
    """
    family = next((family for start, family in KNOWN.items() if hub_id.startswith(start)), hub_id)
    config = KNOWN_CONFIGS.get(family)
    return None if config is None else dict(config)
