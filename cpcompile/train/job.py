"""Job: what a run computes, as its checkpoints record it, so that another one does not take them up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.errors import InputError
from cpcompile.train.options import TrainOptions

SETTINGS = ("length", "batch_size", "learning_rate", "max_norm", "dtype", "seed")
# Entries of a transformers configuration that say nothing of what the model computes; the dtype is one of the settings.
_ASIDE = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "quantization_config")
_MISSING = "not there"


def describe_job(options: TrainOptions, model: torch.nn.Module, text: str) -> dict[str, Any]:
    """Return the settings, the model's class and configuration, and the digest of the text, as JSON gives them back."""
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator,union-attr]
    job = {name: getattr(options, name) for name in SETTINGS}
    job["text"] = text
    job["transformers"] = config.get("transformers_version")
    job["model"] = {"class": type(model).__name__} | {
        name: value for name, value in config.items() if name not in _ASIDE and not name.startswith("_")
    }
    return json.loads(json.dumps(job))  # type: ignore[no-any-return]


def check_same_job(saved: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Refuse to resume a run with other settings or another model than it began with: its loss curve would not continue."""
    changed = differences(saved, wanted)
    if saved.get("transformers") != wanted.get("transformers"):
        # Another version may know more or fewer entries.
        changed = {
            field: pair for field, pair in changed.items() if field != "transformers" and repr(_MISSING) not in pair
        }
    if changed:
        listed = "; ".join(f"{field} was {before} and is {now}" for field, (before, now) in changed.items())
        raise InputError(f"{name} belongs to another run: {listed}.")


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Return the fields that differ, by their dotted names, with both values."""
    found: dict[str, tuple[str, str]] = {}
    for name in {**saved, **wanted}:
        before, now = saved.get(name, _MISSING), wanted.get(name, _MISSING)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found[prefix + name] = (repr(before), repr(now))
    return found
