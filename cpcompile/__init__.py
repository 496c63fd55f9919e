"""cpcompile: a compiler pass that makes single-device PyTorch models train on sequences sharded over several devices."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpcompile.analysis.regions import token_local
    from cpcompile.errors import (
        ConfigError,
        CPError,
        DebuggerQuit,
        GraphBreakError,
        InputError,
        InternalError,
        NoRule,
        NotFiniteError,
        RankFailed,
        RanksDiffer,
        VerificationError,
    )
    from cpcompile.front.apply import apply, explanation, no_sync, remove, shard, unshard
    from cpcompile.front.data import rank_and_replicas
    from cpcompile.front.loss import cross_entropy
    from cpcompile.front.messages import last_messages, print_messages_on
    from cpcompile.front.show import show
    from cpcompile.inspect.explain import explain
    from cpcompile.inspect.explanation import Explanation
    from cpcompile.inspect.minify import minify
    from cpcompile.inspect.sweep import verify_sweep
    from cpcompile.inspect.verification import Verification
    from cpcompile.inspect.verify import verify
    from cpcompile.inspect.visualize import visualize
    from cpcompile.memory.fully_sharded import FullySharded
    from cpcompile.options.config import Config
    from cpcompile.processes.verify_real import verify_real

__version__ = "0.1.0"

_MODULES = {
    "front.apply": ("apply", "explanation", "no_sync", "remove", "shard", "unshard"),
    "front.data": ("rank_and_replicas",),
    "front.loss": ("cross_entropy",),
    "front.messages": ("last_messages", "print_messages_on"),
    "front.show": ("show",),
    "options.config": ("Config",),
    "errors": (
        "CPError",
        "ConfigError",
        "DebuggerQuit",
        "GraphBreakError",
        "InputError",
        "InternalError",
        "NoRule",
        "RankFailed",
        "RanksDiffer",
        "NotFiniteError",
        "VerificationError",
    ),
    "inspect.explanation": ("Explanation",),
    "memory.fully_sharded": ("FullySharded",),
    "analysis.regions": ("token_local",),
    "inspect.explain": ("explain",),
    "inspect.verification": ("Verification",),
    "inspect.verify": ("verify",),
    "inspect.visualize": ("visualize",),
    "inspect.sweep": ("verify_sweep",),
    "inspect.minify": ("minify",),
    "processes.verify_real": ("verify_real",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use: importing torch and the passes takes seconds, and a command's --help should not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


__all__ = [
    "CPError",
    "Config",
    "ConfigError",
    "DebuggerQuit",
    "Explanation",
    "FullySharded",
    "GraphBreakError",
    "InputError",
    "InternalError",
    "NoRule",
    "NotFiniteError",
    "RankFailed",
    "RanksDiffer",
    "Verification",
    "VerificationError",
    "apply",
    "cross_entropy",
    "explain",
    "explanation",
    "last_messages",
    "minify",
    "no_sync",
    "print_messages_on",
    "rank_and_replicas",
    "remove",
    "shard",
    "show",
    "token_local",
    "unshard",
    "verify",
    "verify_real",
    "verify_sweep",
    "visualize",
]
