"""Write the reference: `python docs/write_reference.py` writes docs/passes.md, docs/rules.md and docs/api.md from docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

import cpcompile
from cpcompile import rules
from cpcompile.passes import ANALYSIS, MEMORY, PARAMETERS, PIPELINE, SHARDING
from cpcompile.rules.along_tokens import ExtendedRule
from cpcompile.rules.pointwise import UNTAGGED, pointwise
from cpcompile.rules.refusals import REFUSED
from cpcompile.rules.registry import IndexedRule

DOCS = Path(__file__).parent
BY_HAND = "<!-- Written by docs/write_reference.py (make reference): edit the docstrings instead. -->"

PASSES = """# Passes

{by_hand}

A pass is a plain function on the graph in a file of its name in `passes/`; `cpcompile/compile/transform.py` runs them in this
order, and after each one it checks the graph and counts what was changed. What one tells another is an annotation of a node or a
field of the plan. `cp` are the operators of `cpcompile.runtime`, `aten` those of PyTorch. [how_it_works.md](how_it_works.md)
tells the story, and [architecture.md](architecture.md#a-pass) says how to add one.
"""

RULES = """# Rules

{by_hand}

One rule for each operator says how placements pass through it; each family has a file in `cpcompile/rules/`. The notation names
dims: those of one name run together, so that where one holds the tokens, the others do, and nothing else changes. A dim with a
prime (`d'`), or along which a rule is called closed, is mixed: it must not hold the tokens, unless the last column says what
happens then. A dim that only operands have is contracted: the result of each rank is an addend of a partial sum. What no rule
covers is refused with your line, or gathered with `strict=False`. [architecture.md](architecture.md#a-rule) says how to add one;
`tests/graph/test_rules.py` runs every rule whole and by rank.
"""

API = """# API

{by_hand}

All names are those of `cpcompile`. Options of `apply`, `verify` and `explain` are the fields of [`Config`](#config). Three
modules have pages of their own: `cpcompile.integrations` ([integrations.md](integrations.md)), `cpcompile.compat`
([compat.md](compat.md)) and `cpcompile.balance` ([balance.md](balance.md)).
"""

REFUSALS = """
## Refused along the tokens

`refusals.py`. These say why there is no other way, and what to do instead; those that have a rule for other dims keep it.
"""


def sections(text: str) -> dict[str, str]:
    """Return the parts of a docstring: '' is its first paragraph, "Needs", "Gives", "Raises" what these say, "also" the rest."""
    first, *paragraphs = inspect.cleandoc(text).split("\n\n")
    found, also = {"": joined(first)}, []
    for paragraph in paragraphs:
        parts = re.split(r"^(Needs|Gives|Raises):", paragraph, flags=re.MULTILINE)
        also += [joined(parts[0])] if parts[0].strip() else []
        for name, said in zip(parts[1::2], parts[2::2], strict=True):
            found[name] = errors(said) if name == "Raises" else joined(said)
    return found | ({"also": "\n\n".join(also)} if also else {})


def joined(text: str) -> str:
    """Return a paragraph as one line."""
    return " ".join(text.split())


def errors(text: str) -> str:
    """Return what a function raises as one line."""
    each = re.split(r"\n(?=    \w+: )", text)
    return "; ".join(re.sub(r"^(\w+):", r"`\1`:", joined(x)).rstrip(".") for x in each if x.strip()) + "."


def pass_section(function: Callable[..., int]) -> str:
    """Return what there is to say of one pass."""
    name, module = function.__name__, importlib.import_module(function.__module__)
    title, graph, *others = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    while others and others[0].startswith("  "):  # the graph in another case
        graph += "\n\n" + others.pop(0)
    parts, sentence = sections(function.__doc__ or ""), joined(title).partition(": ")[2]
    options = [f"`{p.name}`" for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    told = {"Needs": "needs", "Gives": "gives", "Raises": "refuses"}
    rows = [f"- **{word}** {parts[key]}" for key, word in told.items() if key in parts]
    rows += [f"- **returns** {parts[''].removeprefix('Return ')}", f"- **takes** {', '.join(['`gm`', *options])}"]
    return "\n\n".join(
        [
            f"### {name}",
            sentence[:1].upper() + sentence[1:],
            f"```python\n{graph}\n```",
            *map(joined, others),
            *([parts["also"]] if "also" in parts else []),
            "\n".join(rows),
        ]
    )


def passes_page() -> str:
    """Return docs/passes.md."""
    between = [function for function in PIPELINE if function not in {*ANALYSIS, *SHARDING, *MEMORY, *PARAMETERS}]
    kinds = (
        ("What the model says", "Still a program of one device.", ANALYSIS),
        ("What was asked for and chosen", "Documents that the user names; one strategy for each attention.", between),
        ("From one device to the ranks of an axis", "Each takes the plan.", SHARDING),
        ("Memory", "Each runs where it is asked for, changes no result, and saves memory.", MEMORY),
        ("Parameters", "For models that `fully_shard` wrapped.", PARAMETERS),
    )
    out = [PASSES.format(by_hand=BY_HAND).rstrip()]
    for title, sentence, functions in kinds:
        out += [f"## {title}", sentence, *map(pass_section, functions)]
    return "\n\n".join(out) + "\n"


@dataclass(frozen=True, slots=True)
class Row:
    """Operators that share a rule; `along` is what happens along the tokens, and in which family, where that is another rule."""

    family: str
    notation: str
    along: str

    @classmethod
    def of(cls, rule: rules.Rule) -> Row:
        """Return the row of a rule."""
        along = ""
        while isinstance(rule, ExtendedRule):
            says = inspect.cleandoc(rule.along.__doc__ or "").splitlines()[0]
            family = last(rule.along.__module__)
            refused = "refused, [see below](#refused-along-the-tokens)"
            along = refused if family == "refusals" else f"{says} (`{family}.py`)"
            rule = rule.base
        module = rule.indices.__module__ if isinstance(rule, IndexedRule) else type(rule).__module__
        return cls(last(module), rule.notation, along)


def last(module: str) -> str:
    """Return the last part of the name of a module."""
    return module.rpartition(".")[2]


def is_tagged(target: torch._ops.OpOverload, rule: object) -> bool:
    """Tell whether torch says by a tag that an operator is pointwise: which do depends on its version."""
    while isinstance(rule, ExtendedRule):
        rule = rule.base
    return isinstance(rule, IndexedRule) and rule.indices is pointwise and target not in UNTAGGED


def shown(targets: Iterable[object]) -> str:
    """Return the names of operators."""
    return ", ".join(f"`{name}`" for name in sorted(str(target).removesuffix(".default") for target in targets))


def notation_of(rule: str) -> str:
    """Return a rule as code as far as it is indices."""
    found = re.match(r"(?:-> |\[[^\]]*\](?:, | -> |; | or )?|mask |_(?:, | -> )?)+", rule)
    if found is None:
        return rule
    indices = found.group().rstrip(" ,")
    return f"`{indices}`{rule[len(indices) :]}"


def cell(text: str) -> str:
    """Return text as it may stand in a table."""
    return text.replace("|", "\\|")


def families() -> Iterator[ModuleType]:
    """Yield the modules of rules."""
    for name in sorted(rules.__all__):
        if isinstance(module := getattr(rules, name), ModuleType):
            yield module


def rules_page() -> str:
    """Return docs/rules.md."""
    rows: dict[Row, list[object]] = {}
    for target, rule in rules.RULES.items():
        rows.setdefault(Row.of(rule), []).extend([] if is_tagged(target, rule) else [target])
    out = [RULES.format(by_hand=BY_HAND)]
    for module in families():
        family = last(module.__name__)
        own = sorted((row.notation, row.along, shown(targets)) for row, targets in rows.items() if row.family == family)
        own = [row for row in own if row[2]]
        if not own:
            continue
        title, *paragraphs = inspect.cleandoc(module.__doc__ or "").split("\n\n")
        out += [f"\n## {family}\n", joined(title), *(f"\n{code_or_prose(paragraph)}" for paragraph in paragraphs)]
        if module is rules.pointwise:
            out.append("\nThe first rule below is also that of every operator that torch tags as pointwise.")
        out += ["\n| operators | rule | along the tokens |\n|---|---|---|"]
        out += [f"| {names} | {cell(notation_of(notation))} | {cell(along)} |" for notation, along, names in own]
    out += [REFUSALS, "| operators | reason and remedy |\n|---|---|"]
    out += [f"| {shown(f'aten.{name}' for name in names)} | {cell(reason)} |" for reason, names in REFUSED.items()]
    return "\n".join(out) + "\n"


def code_or_prose(paragraph: str) -> str:
    """Return a paragraph of a docstring; graphs keep their lines."""
    return f"```python\n{paragraph}\n```" if paragraph.startswith("before") else joined(paragraph)


HEADINGS = {"Args": "Arguments", "Attributes": "Fields", "Returns": "Returns", "Raises": "Raises"}


def api_page() -> str:
    """Return docs/api.md."""
    everything = {name: getattr(cpcompile, name) for name in cpcompile.__all__}
    errors = {name: x for name, x in everything.items() if isinstance(x, type) and issubclass(x, Exception)}
    functions = {name: x for name, x in everything.items() if isinstance(x, FunctionType)}
    others = {name: x for name, x in everything.items() if name not in errors.keys() | functions.keys()}
    out = [API.format(by_hand=BY_HAND).rstrip()]
    for title, members in (("Functions", functions), ("Options and results", others), ("Errors", errors)):
        out.append(f"## {title}")
        for name, member in members.items():
            out += [f"### {name}", *api_section(name, member)]
    out.append("[diagnostics.md](diagnostics.md) has messages, with a model and a remedy for each.")
    return "\n\n".join(out) + "\n"


def api_section(name: str, member: Any) -> Iterator[str]:
    """Yield the paragraphs on one public name."""
    if isinstance(member, type) and issubclass(member, Exception):
        yield inspect.getdoc(member) or ""
        yield f"A kind of `{member.__bases__[0].__name__}`."
        return
    yield f"```python\n{signature_of(name, member)}\n```"
    for paragraph in inspect.cleandoc(member.__doc__ or "").split("\n\n"):
        word, colon, text = paragraph.partition(":\n")
        if word not in HEADINGS or not colon:
            yield paragraph if paragraph.startswith("    ") else joined(paragraph)
        elif word == "Returns":
            yield f"**{HEADINGS[word]}** {joined(text)}"
        else:
            entries = [joined(x).partition(": ") for x in re.split(r"\n(?=    \w+: )", text) if x.strip()]
            yield f"**{HEADINGS[word]}**"
            yield "\n".join(f"- `{entry}`: {said}" for entry, _, said in entries)
    if isinstance(member, type):
        told = [f"- `{key}`: {joined(inspect.getdoc(x).split(chr(10) * 2)[0])}" for key, x in methods_of(member)]
        if told:
            yield "**Methods and properties**"
            yield "\n".join(told)


def methods_of(member: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties of a class, and what has their docstrings."""
    kinds = (FunctionType, property, classmethod)
    return [(key, x) for key, x in vars(member).items() if key[0] != "_" and isinstance(x, kinds) and inspect.getdoc(x)]


def signature_of(name: str, member: Any) -> str:
    """Return how something is called, one argument a line where they are many."""
    kinds = inspect.Parameter
    arguments, is_marked = [], False
    for parameter in inspect.signature(member).parameters.values():
        if parameter.kind is kinds.KEYWORD_ONLY and not is_marked:
            arguments.append("*")
            is_marked = True
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is kinds.empty else f": {parameter.annotation}"
        default = "" if parameter.default is kinds.empty else f" = {default_of(parameter.default)}"
        arguments.append(f"{stars}{parameter.name}{kind}{default}")
    line = f"cpcompile.{name}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"cpcompile.{name}(\n" + "".join(f"    {x},\n" for x in arguments) + ")"


def default_of(value: object) -> str:
    """Return a default as code; what a field makes for itself is left out."""
    return "..." if repr(value).startswith("<") else repr(value)


PAGES = {"passes.md": passes_page, "rules.md": rules_page, "api.md": api_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
