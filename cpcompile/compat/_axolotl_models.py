"""Which models can be called with a part of the sequence: those in which only attention and the loss know of other tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from cpcompile.compat._axolotl_register import is_ours
from cpcompile.errors import ConfigError

# Positions come from position_ids, masks from mask functions, which are read.
LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# Their frequencies follow from the largest position, which is another one on each rank.
ROTARY = ("dynamic", "longrope")
MIXERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.batchnorm._BatchNorm)


def transformers_model(model: nn.Module) -> Any:
    """Return the outermost model of transformers in `model`, refused if a part of the sequence is not enough for it.

    Raises:
        ConfigError: there is none, or what it does with tokens beside attention; all reasons at once.
    """
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} holds no model of transformers. Use cpcompile.apply(model, mesh).")
    reasons = list(_reasons(found))
    if reasons:
        raise ConfigError(
            f"{type(found).__name__} cannot be called with a part of the sequence: {'; '.join(reasons)}. "
            "Use cpcompile.apply(model, mesh), which transforms the whole model."
        )
    return found


def num_layers(model: Any) -> int:
    """Return how many layers attend, at least."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))


def _reasons(model: Any) -> Iterator[str]:
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    used = config._attn_implementation
    if not is_ours(AttentionInterface._global_mapping.get(used)):
        yield f"its attn_implementation {used!r} is not substituted (names that are loaded later need another registration)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        yield "it takes no position_ids"
    if config.is_encoder_decoder:
        yield "it has an encoder and a decoder"
    others = sorted({each for each in getattr(config, "layer_types", None) or () if each not in LAYERS})
    if others:
        yield f"it has layers of {', '.join(others)}"
    for name, module in model.named_modules():
        if isinstance(module, MIXERS):
            yield f"{name} ({type(module).__name__}) mixes tokens"
            break
    rotary = sorted(_rope_types(getattr(config, "rope_parameters", None)) & set(ROTARY))
    if rotary:
        yield f"its rotary embedding ({', '.join(rotary)}) depends on the largest position"
    if getattr(config, "attn_temperature_tuning", None):
        yield "attn_temperature_tuning counts a rank's tokens from 0"
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits adds a loss that is not a sum over tokens"


def _rope_types(parameters: Any) -> set[str]:
    """Return the kinds of rotary embeddings in a config's parameters, which may be of each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(value) for key, value in parameters.items() if key in ("rope_type", "type")}
    return found.union(*(_rope_types(value) for value in parameters.values()))
