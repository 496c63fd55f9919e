"""Build: a tiny random model of an entry and one batch for it. Nothing is downloaded."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cpcompile.zoo.catalogue import ENTRIES, Entry
from cpcompile.zoo.composite import COMPOSITES
from cpcompile.zoo.flex import allow_flex_attention_on_cpu
from cpcompile.zoo.inputs import make_inputs
from cpcompile.zoo.sizes import SHARED, tiny_settings

# Large enough that attention, gates and experts differ between tokens: with the usual 0.02 the softmax of a tiny
# model is nearly flat, and a wrong mask would hardly show.
SIGMA = 0.2
NOISE = 0.1
MAX_PARAMETERS = 6_000_000


class NotAvailable(Exception):
    """This version of transformers has no such class, or the class does not offer this variant."""


def build(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, *, packed: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a tiny random model in training mode, without dropout, and its inputs.

    Args:
        name: key of an entry, e.g. `causal:llama`.
        attention: transformers' name of the attention implementation: sdpa, eager, flex_attention.
        dtype: of parameters and floating-point inputs.
        packed: pass positions that restart with each document.

    Raises:
        NotAvailable: transformers has no such class, or the class does not take this attention or positions.
    """
    entry = ENTRIES[name]
    if attention == "flex_attention" and entry.key in NO_FLEX_REFERENCE:
        raise NotAvailable(NO_FLEX_REFERENCE[entry.key])
    model = make_model(entry, attention).to(dtype)
    if packed and (entry.category != "causal" or "position_ids" not in inspect.signature(model.forward).parameters):
        raise NotAvailable("takes no positions")
    inputs = make_inputs(entry, packed=packed)
    return model, {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


# Models whose untouched form cannot be the truth: torch's flex attention, not compiled, has no gradient for a tensor that
# the function of the scores reads, and compiled it refuses how this one reads it.
NO_FLEX_REFERENCE = dict.fromkeys(
    (
        "audio:parakeet_encoder",
        "causal:doge",
        "causal:inkling_text",
        "s2s:mt5",
        "s2s:switch_transformers",
        "s2s:t5",
        "s2s:umt5",
    ),
    "one device has no gradient for the learned scores that it adds by score_mod",
)


def make_model(
    entry: Entry,
    attention: str,
    *,
    class_name: str | None = None,
    shared: Mapping[str, Any] = SHARED,
    changes: Mapping[str, Any] = {},
) -> nn.Module:
    """Return the random model of `entry` in float32.

    Args:
        entry: the architecture.
        attention: transformers' name of the attention implementation.
        class_name: the class, if not that of the entry.
        shared: what a config takes those settings of which it has fields for.
        changes: settings that hold whatever the entry says.

    Raises:
        NotAvailable: transformers has no such class, or the class does not offer this attention.
    """
    transformers = import_transformers()
    model_class = find_class(transformers, entry, class_name)
    config = make_config(transformers, entry, shared, changes)
    silence(config)
    if attention == "flex_attention":
        allow_flex_attention_on_cpu()
    with torch.device("meta"):
        size = sum(p.numel() for p in instantiate(model_class, copy.deepcopy(config), attention).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{entry.key}: {size} parameters are not tiny; its config needs an override.")
    torch.manual_seed(0)
    model = instantiate(model_class, config, attention)
    randomise(model)
    drop_dropout(model)
    return model.train()


def import_transformers() -> Any:
    """Return transformers, quiet and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def find_class(transformers: Any, entry: Entry, class_name: str | None = None) -> Any:
    """Return the class of an entry, or the one of this name. Raises `NotAvailable`."""
    auto = transformers.models.auto.modeling_auto
    mappings = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "mlm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "s2s": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    name = class_name or entry.class_name or mappings[entry.category].get(entry.model_type)
    if name is None or not hasattr(transformers, name):
        raise NotAvailable(f"transformers {transformers.__version__} has no {name or entry.model_type}")
    return getattr(transformers, name)


def make_config(
    transformers: Any, entry: Entry, shared: Mapping[str, Any] = SHARED, changes: Mapping[str, Any] = {}
) -> Any:
    """Return the tiny config of an entry, in which `changes` hold whatever the entry says."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING

    def tiny(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
        return tiny_settings(known[model_type], changes or {}, shared)

    if entry.name in COMPOSITES:
        return COMPOSITES[entry.name](transformers, tiny)
    if entry.model_type not in known:
        raise NotAvailable(f"transformers {transformers.__version__} has no config {entry.model_type}")
    settings = tiny(entry.model_type, {**entry.changes, **changes})
    if entry.category == "causal" and hasattr(known[entry.model_type](), "is_decoder"):
        settings["is_decoder"] = True
    return known[entry.model_type](**settings)


def instantiate(model_class: Any, config: Any, attention: str) -> nn.Module:
    """Return the model with its own initialisation. Raises `NotAvailable` when it does not offer this attention."""
    try:
        model: nn.Module = model_class._from_config(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        if "attn_implementation" in str(error) or "does not support" in str(error):
            raise NotAvailable(f"does not offer {attention}") from error
        raise
    return model


def silence(config: Any) -> None:
    """Set every dropout rate of a config and its parts to 0, and turn off caches."""
    for part in parts(config):
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        if hasattr(part, "use_cache"):
            part.use_cache = False


def parts(config: Any) -> Iterator[Any]:
    """Yield a config and the configs inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def drop_dropout(model: nn.Module) -> None:
    """Set the rates that the code of a model gives, past its config, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Make every parameter matter: constants (norms, zero-initialised gates) get noise, small matrices spread `SIGMA`."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.is_floating_point() or not p.numel():
            continue
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        largest = p.abs().max().item()
        spread = p.std().item() if p.numel() > 1 else 0.0
        if not largest < 1e3 or 0 < largest < 1e-6:  # memory that was never initialised
            p.copy_(SIGMA * noise)
        elif p.min() == p.max():
            p.add_(NOISE * noise)
        elif p.dim() > 1 and spread < SIGMA:
            p.mul_(SIGMA / spread)
