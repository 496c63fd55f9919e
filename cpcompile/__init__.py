"""cpcompile: a compiler pass that makes single-device PyTorch models train on sequences sharded over several devices."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpcompile.api import apply, no_sync, remove, shard, unshard
    from cpcompile.config import Config
    from cpcompile.errors import (
        ConfigError,
        CPError,
        GraphBreakError,
        InputError,
        NoRule,
        VerificationError,
    )
    from cpcompile.explanation import Explanation
    from cpcompile.regions import token_local
    from cpcompile.survey import explain
    from cpcompile.verification import Verification, verify

__version__ = "0.1.0"

_MODULES = {
    "api": ("apply", "no_sync", "remove", "shard", "unshard"),
    "config": ("Config",),
    "errors": (
        "CPError",
        "ConfigError",
        "GraphBreakError",
        "InputError",
        "NoRule",
        "VerificationError",
    ),
    "explanation": ("Explanation",),
    "regions": ("token_local",),
    "survey": ("explain",),
    "verification": ("Verification", "verify"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use: importing torch and the passes takes seconds, and a command's --help should not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


__all__ = [
    "CPError",
    "Config",
    "ConfigError",
    "Explanation",
    "GraphBreakError",
    "InputError",
    "NoRule",
    "Verification",
    "VerificationError",
    "apply",
    "explain",
    "no_sync",
    "remove",
    "shard",
    "token_local",
    "unshard",
    "verify",
]
