"""The options of `Config` on the command line, each with its choices and the first sentence of its description."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from cpcompile.commands.guard import guard
from cpcompile.errors import ConfigError
from cpcompile.options.config import CHOICES, Config

# Fields of `Config` that change no plan.
NOT_OF_A_PLAN = (
    "memory",
    "optimizer_states",
    "sync_weights",
    "check_inputs",
    "dynamic",
    "check_finite",
    "one_rank_compiles",
)
PANEL = "How the model is made context parallel (cpcompile.Config)"


def takes_config(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `Config`; it gets those that were given as the mapping `config`.

    Args:
        left_out: fields that are no options of this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        names = [each.name for each in fields(Config) if each.name not in left_out]
        added = [option_of(name) for name in names]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: x for name in names if (x := given.pop(name)) not in (None, [])}
            config: dict[str, Any] = {}
            guard(lambda: config.update({name: value_of(name, x) for name, x in chosen.items()}))
            command(**given, config=config)

        kept = [p for p in own.parameters.values() if p.name != "config"]
        run.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
        return run

    return decorate


def option_of(name: str) -> inspect.Parameter:
    """Return the parameter of a field, which is None where the option is not given."""
    hint, default = get_type_hints(Config)[name], {each.name: each for each in fields(Config)}[name].default
    shown = describe(name) + (f" [default: {words(default)}]" if default not in (MISSING, "", None) else "")
    flags = [f"--{name.replace('_', '-')}"]
    more: dict[str, Any] = {"help": shown, "rich_help_panel": PANEL, "show_default": False}
    kind: Any = hint
    if name == "balancer":  # groups of ranks are named by their number: balanced:4
        kind, more["autocompletion"] = str, lambda: list(CHOICES["balancer"])
        more["metavar"] = "|".join(CHOICES["balancer"])
    elif name in CHOICES:
        kind = choices(name, CHOICES[name])
    elif hint is bool:
        flags = [f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"]
    elif get_origin(hint) is Mapping:
        kind, more["metavar"] = list[str], "NAME=VALUE"
    elif get_origin(hint) is Sequence:
        kind = list[str]
    annotated = Annotated[kind | None, typer.Option(*flags, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotated)


def choices(name: str, of: Sequence[str]) -> type[Enum]:
    """Return an enumeration, as typer shows choices."""
    make: Any = Enum
    made: type[Enum] = make(name, {choice: choice for choice in of}, type=str)
    return made


def value_of(name: str, given: Any) -> Any:
    """Return an option as `Config` takes it.

    Raises:
        ConfigError: an entry of a mapping is no `name=value`.
    """
    if isinstance(given, Enum):
        return given.value
    if get_origin(get_type_hints(Config)[name]) is not Mapping:
        return given
    found = {}
    for entry in given:
        key, equals, text = entry.partition("=")
        if not equals:
            raise ConfigError(f"--{name.replace('_', '-')} {entry}: give it as name=value.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


@functools.cache
def descriptions() -> dict[str, str]:
    """Return what the docstring of `Config` says of each field."""
    text = inspect.cleandoc(Config.__doc__ or "").partition("Attributes:")[2]
    entries = re.split(r"(?m)^(?=\w+: )", inspect.cleandoc(text))
    return {name: " ".join(rest.split()) for name, _, rest in (entry.partition(": ") for entry in entries) if rest}


def describe(name: str) -> str:
    """Return the first sentence of the description of a field."""
    return re.split(r"(?<=[^.]{3}\.) |; where ", descriptions().get(name, ""))[0]


def words(value: Any) -> str:
    """Return a default for people."""
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
