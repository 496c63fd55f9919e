"""Arguments: calls of a model that cannot be right, each with what was meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cpcompile.errors import InputError

ALMOST = 0.8  # as alike as `labelz` and `labels`


def takes(signature: inspect.Signature, name: str) -> bool:
    """Tell whether a function has a parameter of that name, or takes any."""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def refuse_unnamed(forward: Callable[..., Any], kwargs: object) -> None:
    """Refuse what is no mapping of names: one tensor, a list of them."""
    if not isinstance(kwargs, Mapping):
        first = next(iter(inspect.signature(forward).parameters), "input_ids")
        raise InputError(f"the inputs are a {type(kwargs).__name__}: give them by name, {{{first!r}: ...}}.")


def describe_call(signature: inspect.Signature, given: Mapping[str, Any], reason: str) -> str:
    """Return the text for a call with other arguments than a function takes."""
    names = list(signature.parameters)
    unknown = [name for name in given if not takes(signature, name)]
    meant = did_you_mean(signature, given) or "."
    if not unknown:
        named = ", ".join(given) or "none"
        return f"the model cannot be called so: {reason}{meant} Its inputs are: {', '.join(names)}; given by name: {named}."
    return f"the model takes no input {', '.join(unknown)}{meant} Its inputs are: {', '.join(names)}."


def describe_call_inside(model: object, inputs: Mapping[str, Any], error: BaseException | None) -> str:
    """Return the text for inputs that a model passes on to a module inside of it, which does not know them, or ''.

    Args:
        error: what the call of that module raised.
    """
    if not isinstance(error, TypeError) or not isinstance(model, torch.nn.Module):
        return ""
    words = re.findall(r"\w+", str(error))
    unknown: list[str] = []
    if "unexpected keyword argument" in str(error).lower():
        unknown = [name for name in inputs if name in words]
    elif "missing" in words:
        unknown = [n for n in inputs if n not in words and difflib.get_close_matches(n, words, 1, ALMOST)]
    inside = [inspect.signature(module.forward) for module in model.modules()]
    inside = [signature for signature in inside if not any(takes(signature, name) for name in unknown)]
    if not unknown or not inside:
        return ""

    def given(signature: inspect.Signature) -> dict[str, Any]:
        return {name: x for name, x in inputs.items() if name in unknown or name in signature.parameters}

    # It is the one that takes the others, or what was meant.
    found = max(inside, key=lambda signature: (len(given(signature)), did_you_mean(signature, given(signature)) != ""))
    return describe_call(found, given(found), str(error))


def did_you_mean(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """Return a question for the names that a function does not know but that look like some it does, or ''."""
    known = [name for name in signature.parameters if name not in given]
    found = {name: difflib.get_close_matches(name, known, 1, ALMOST) for name in given}
    meant = [f"{close[0]} for {name}" for name, close in found.items() if close and name not in signature.parameters]
    return f": did you mean {', '.join(meant)}?" if meant else ""


def refuse_earlier_tokens(inputs: Mapping[str, Any]) -> None:
    """Refuse to decode: a cache of keys and values holds tokens that come before those of the call.

    Raises:
        InputError: with the ways out.
    """
    for name, value in inputs.items():
        length = getattr(value, "get_seq_length", None)
        if callable(length) and int(length()) > 0:
            raise InputError(
                f"{name} is a cache that holds {int(length())} tokens already: decoding token by token is not sharded. "
                "model.generate() runs the untouched model; for a loop of your own call cpcompile.remove(model) first."
            )
