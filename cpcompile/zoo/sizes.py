"""Sizes: what makes any transformers config tiny. A config takes those settings that it has a field for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
WIDE = 96
VOCABULARY = 128
POSITIONS = 128
EXPERTS = 4
WINDOW = 8
CHUNK = 8

# The names of one size; a config has some of them.
_NAMES: tuple[tuple[str, str], ...] = (
    ("hidden", "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim dim emb_dim lru_width"),
    ("layers", "num_hidden_layers n_layer n_layers num_layers"),
    ("layers", "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    ("heads", "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    ("heads", "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads"),
    ("kv_heads", "num_key_value_heads linear_num_key_heads"),
    ("head_dim", "head_dim d_kv attention_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim"),
    ("head_dim", "linear_value_head_dim mamba_d_head mamba_d_state hidden_size_per_layer_input"),
    (
        "wide",
        "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim d_inner ffn_hidden_size",
    ),
    ("vocabulary", "vocab_size vocab_size_per_layer_input"),
    ("positions", "max_position_embeddings n_positions max_seq_len"),
    ("experts", "num_experts n_routed_experts num_local_experts"),
    ("window", "sliding_window block_size"),
    ("chunk", "mamba_chunk_size index_topk"),
)

_SIZES: Mapping[str, int] = {
    "hidden": HIDDEN,
    "layers": LAYERS,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "wide": WIDE,
    "vocabulary": VOCABULARY,
    "positions": POSITIONS,
    "experts": EXPERTS,
    "window": WINDOW,
    "chunk": CHUNK,
}


def sizes_by_name(**sizes: int) -> dict[str, int]:
    """Return the sizes under all names that configs have for them; those that are not given are the zoo's."""
    values = {**_SIZES, **sizes}
    return {name: values[size] for size, names in _NAMES for name in names.split()}


SHARED: Mapping[str, Any] = {
    **sizes_by_name(),
    # Mixture of experts.
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    # Latent attention, indexers.
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "index_n_heads": 2,
    # State spaces, linear attention.
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "linear_conv_kernel_dim": 4,
    "attention_chunk_size": 16,
    # Everything else.
    "image_size": 40,
    "patch_size": 8,
    "type_vocab_size": 2,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# Lists that say what each layer is: every kind that the default config has must occur.
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def tiny_settings(config_class: Any, changes: Mapping[str, Any], shared: Mapping[str, Any] = SHARED) -> dict[str, Any]:
    """Return the arguments that make a tiny `config_class`: the shared sizes that it knows, layers of every kind, `changes`.

    A change to None leaves the config's own default.
    """
    names = field_names(config_class)
    settings = {name: value for name, value in shared.items() if name in names and not is_alias(config_class, name)}
    settings.update(layers_of_every_kind(config_class, names, shared["num_hidden_layers"]))
    if "qk_rope_head_dim" in names:
        # Latent attention: `head_dim` is that of the rotary part, and every head has its own keys.
        latent = {"head_dim": shared["qk_rope_head_dim"], "num_key_value_heads": shared["num_attention_heads"]}
        settings.update(latent)
        settings = {name: value for name, value in settings.items() if name in names}
    settings.update(changes)
    return {name: value for name, value in settings.items() if value is not None}


def field_names(config_class: Any) -> set[str]:
    """Return the names of the arguments of a config class."""
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def is_alias(config_class: Any, name: str) -> bool:
    """Tell whether `name` is another name of a field that gets its own value."""
    return config_class.attribute_map.get(name) in field_names(config_class)


def layers_of_every_kind(config_class: Any, names: set[str], least: int = LAYERS) -> dict[str, Any]:
    """Return the lists of layer kinds, shortened to one layer of each kind, and the number of layers that they need."""
    lists = {name: kinds(config_class, name) for name in _LAYER_KINDS if name in names}
    lists = {name: value for name, value in lists.items() if value}
    count = max([least, *map(len, lists.values())])
    settings: dict[str, Any] = {}
    for name, value in lists.items():
        # Dense layers come first, then those with experts; attention kinds alternate.
        filler = [value[-1]] * count if name == "mlp_layer_types" else value * count
        settings[name] = (value + filler)[:count] if name != "block_types" else value
    if count > least and "num_hidden_layers" in names:
        settings["num_hidden_layers"] = count
    return settings


def kinds(config_class: Any, name: str) -> list[str]:
    """Return the distinct kinds of layers of the default config, in their order."""
    try:
        default = config_class()
    except Exception:  # some configs have required parts, and none of those has kinds of layers
        return []
    return list(dict.fromkeys(getattr(default, name, None) or ()))
