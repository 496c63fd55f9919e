"""cpcompile: a compiler pass that makes single-device PyTorch models train on sequences sharded over several devices."""

from cpcompile.api import apply, no_sync, remove, shard, unshard
from cpcompile.config import Config
from cpcompile.errors import (
    ConfigError,
    CPError,
    GraphBreakError,
    InputError,
    NoRule,
    UnsupportedAttention,
    VerificationError,
)
from cpcompile.explain import Explanation, explain
from cpcompile.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CPError",
    "Config",
    "ConfigError",
    "Explanation",
    "GraphBreakError",
    "InputError",
    "NoRule",
    "UnsupportedAttention",
    "Verification",
    "VerificationError",
    "apply",
    "explain",
    "no_sync",
    "remove",
    "shard",
    "unshard",
    "verify",
]
