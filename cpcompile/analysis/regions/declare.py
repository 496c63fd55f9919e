"""Declare: which modules and functions are token-local.

A mixture of experts sorts its tokens by expert, multiplies in groups and sorts back. No rule lets a sort over the
tokens pass, yet each row of the result depends on its own row only: that has to be said, here or by `token_local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, TypeVar

import torch.fx.traceback
from torch import fx

from cpcompile.errors import clean_path

_MARK = "_cpcompile_token_local"
_KEY = "cpcompile_token_local"
Declared = TypeVar("Declared", bound=Any)


def token_local(declared: Declared) -> Declared:
    """Declare a module class or a function token-local: a row of its results depends on that row of its inputs only.

    The rows are the tokens, and results keep their order: where an input is `[B, S, D]` or `[B*S, D]`, a result is
    `[B, S, ...]` or `[B*S, ...]`. Every other input is a parameter or holds the same tokens.

        @cpcompile.token_local
        class MyExperts(nn.Module): ...

    The declaration is taken at its word: a false one gives wrong results, which `cpcompile.verify` finds.
    """
    if isinstance(declared, type):
        setattr(declared, _MARK, True)
        return declared

    name = declared.__qualname__  # read here: while Dynamo traces, the attribute of a function is its descriptor

    @wraps(declared)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with torch.fx.traceback.annotate({_KEY: name}):
            return declared(*args, **kwargs)

    return marked  # type: ignore[return-value]


def declared_region(node: fx.Node, patterns: Sequence[str]) -> tuple[str, str] | None:
    """Return what tells apart the calls of the declared module or function that made `node`, and its path or name.

    `patterns` are paths of modules (`model.layers.*.mlp`) or names of classes. The outermost declared module counts.
    """
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        place = clean_path(str(path))
        name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
        if is_declared(kind, name) or any(p == name or fnmatchcase(place, p) for p in patterns):
            return str(key), place
    function = (node.meta.get("custom") or {}).get(_KEY)
    return None if function is None else (function, function)


def is_declared(kind: Any, name: str) -> bool:
    """Tell whether a class is token-local: that of experts in transformers is, which get rows of tokens and their routes."""
    home = kind.__module__ if isinstance(kind, type) else str(kind)
    return getattr(kind, _MARK, False) or (home.startswith("transformers.models.") and name.endswith("Experts"))
