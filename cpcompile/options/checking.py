"""Checking: is each option of the type that its field declares, and what name was meant by one that does not exist."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from cpcompile.errors import ConfigError

_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "None",
    Any: "any value",
}


def check_types(options: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ConfigError: with all that do not fit.
    """
    hints = get_type_hints(type(options))
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    wrong = [
        f"{name}={value!r} is {an(type(value).__name__)}, and this option is {in_words(hints[name])}."
        for name, value in values.items()
        if not fits(value, hints[name])
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type. A bool is no number, and a string is no sequence of strings."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(fits(value, one) for one in of)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(fits(k, of[0]) and fits(x, of[1]) for k, x in value.items())
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(x, of[0]) for x in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def in_words(hint: Any) -> str:
    """Return an annotated type for people."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(in_words, of))
    if kind is Mapping:
        return f"a mapping, each time {in_words(of[0])} to {in_words(of[1])}"
    if kind is Sequence:
        return f"a list, each time {in_words(of[0])}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def an(word: str) -> str:
    """Return a word with its article."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def did_you_mean(wrong: object, known: Iterable[str]) -> str:
    """Return ` Did you mean 'ring'?` for a name that is close to a known one, or ''."""
    near = difflib.get_close_matches(str(wrong).lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
