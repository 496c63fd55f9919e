"""Program: a captured graph as data and as Python, whose parts can be cut off and replaced by inputs."""

from __future__ import annotations

import keyword
import linecache
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from cpcompile.errors import CPError

aten = torch.ops.aten
INDENT = " " * 4
LARGE = 8  # sizes that hardly divide others by chance
TAKEN = {"self", "torch", "operator", "cpcompile", "generator", *keyword.kwlist, *dir(torch.nn.Module())}


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of a source or of a call, as an argument of a call."""

    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that the calls begin with.

    Attributes:
        name: in the program.
        kind: `input`, `parameter` or `buffer`.
        value: what it holds.
        token_dim: the dim of its tokens, if it is an input that has some.
        made: the expression that makes the value, or '' for one that is not written down yet.
    """

    name: str
    kind: str
    value: torch.Tensor
    token_dim: int | None = None
    made: str = ""

    @property
    def expression(self) -> str:
        """What makes it in the program; before it is written down, it is found in `GIVEN`."""
        made = self.made or f"GIVEN[{self.name!r}]"
        device = "" if self.value.device.type == "cpu" or not self.made else f'.to("{self.value.device}")'
        is_trained = self.value.requires_grad and self.kind != "parameter"
        return f"{made}{device}" + (".requires_grad_()" if is_trained else "")

    @property
    def random(self) -> str:
        """The expression of a random value of this shape and dtype, with integers of this range."""
        shape, dtype = tuple(self.value.shape), self.value.dtype
        if dtype == torch.bool:
            return f"torch.rand({shape}, generator=generator) < 0.5"
        if dtype.is_floating_point or dtype.is_complex:
            return f"torch.randn({shape}, dtype={dtype}, generator=generator)"
        low, high = (int(self.value.min()), int(self.value.max())) if self.value.numel() else (0, 0)
        return f"torch.randint({low}, {high + 1}, {shape}, dtype={dtype}, generator=generator)"

    @property
    def literal(self) -> str:
        """The expression of this very value."""
        values = re.sub(r"\b(nan|inf)\b", r'float("\1")', repr(self.value.detach().flatten().tolist()))
        return f"torch.tensor({values}, dtype={self.value.dtype}).reshape({tuple(self.value.shape)})"


@dataclass(frozen=True, slots=True)
class Step:
    """A call. Its arguments are plain values, lists of them, and `Ref`s; `line` is the line of a model that it is of."""

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    acts: bool  # it changes a tensor or a mode, so that it counts though nothing reads its value
    line: str = ""

    @property
    def reads(self) -> list[str]:
        """The names of what it reads."""
        return [x.name for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Ref)]

    @property
    def text(self) -> str:
        """The call in Python."""
        if self.target is aten.sym_size.int:
            return f"{written(self.args[0])}.size({written(self.args[1])})"
        arguments = [*map(written, self.args), *(f"{name}={written(x)}" for name, x in self.kwargs.items())]
        return f"{name_of_target(self.target)}({', '.join(arguments)})"


@dataclass(frozen=True, slots=True)
class Program:
    """Calls in order, what they begin with, and what is returned."""

    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]

    def pruned(self, *, keeps_acts: bool = True) -> Program:
        """Return the program without what does not lead to a result."""
        live, kept = set(self.results), list[Step]()
        for step in reversed(self.steps):
            if step.name in live or (step.acts and keeps_acts):
                kept.append(step)
                live.update(step.reads)
        return replace(self, sources=tuple(x for x in self.sources if x.name in live), steps=tuple(reversed(kept)))

    def returning(self, name: str) -> Program:
        """Return the program that ends with one of its calls."""
        end = next(i for i, step in enumerate(self.steps) if step.name == name)
        return replace(self, steps=self.steps[: end + 1], results=(name,)).pruned()

    def given(
        self,
        names: Collection[str],
        values: Mapping[str, Any],
        token_dim: Mapping[str, int | None],
        *,
        multiplied: bool = False,
    ) -> Program:
        """Return the program that is given the values of some calls instead of making them.

        An input is sharded where a product meets it: with `multiplied`, each value with tokens is one, of the input.
        """
        names = set(names)
        for step in self.steps:  # of a call with several results, each is given by itself
            if any(isinstance(values.get(name), list | tuple) and name in names for name in step.reads):
                names.add(step.name)
        new, products = dict[str, Source](), list[Step]()
        for name in (step.name for step in self.steps if step.name in names):
            value, dim = values[name], token_dim.get(name)
            if not isinstance(value, torch.Tensor):
                continue
            if multiplied and value.is_floating_point() and dim is not None and dim < value.dim() - 1:
                width = value.shape[-1]
                matrix = Source(f"matrix_{width}", "buffer", torch.eye(width, dtype=value.dtype, device=value.device))
                given = Source(f"{name}_input", "input", value, dim)
                new |= {given.name: given, matrix.name: matrix}
                products.append(Step(name, aten.matmul.default, (Ref(given.name), Ref(matrix.name)), {}, False))
            else:
                new[name] = Source(name, "input", value, dim)
        new = {name: source for name, source in new.items() if name not in {x.name for x in self.sources}}

        def known(x: Any) -> Any:
            is_number = isinstance(x, Ref) and x.name in names and not isinstance(values[x.name], torch.Tensor)
            return values[x.name] if is_number else x

        steps = [
            replace(step, args=tree_map(known, step.args), kwargs=tree_map(known, dict(step.kwargs)))
            for step in self.steps
            if step.name not in names
        ]
        return replace(self, sources=(*self.sources, *new.values()), steps=(*products, *steps)).pruned()

    def without(self, name: str, instead: str) -> Program:
        """Return the program in which another value is read in the place of that of a call."""

        def other(x: Any) -> Any:
            return Ref(instead) if x == Ref(name) else x

        steps = [
            replace(step, args=tree_map(other, step.args), kwargs=tree_map(other, dict(step.kwargs)))
            for step in self.steps
            if step.name != name
        ]
        return replace(self, steps=tuple(steps)).pruned()

    def resized(self, size: int, smaller: int) -> Program:
        """Return the program in which every dim and number that is `size` is `smaller`, indices included.

        A large size is also found where it is merged with others: its multiples become those of `smaller`.
        """

        def number(x: Any) -> Any:
            is_size = type(x) is int and x and (x == size or (size >= LARGE and x % size == 0))
            return x // size * smaller if is_size else x

        def cut(source: Source) -> Source:
            value = source.value.detach()
            for dim, found in enumerate(value.shape):
                value = value.narrow(dim, 0, number(found))
            if not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
                value = torch.where((value >= smaller) & (value < size), value % smaller, value)
            return replace(source, value=value.clone().requires_grad_(source.value.requires_grad))

        steps = [
            replace(step, args=tree_map(number, step.args), kwargs=tree_map(number, dict(step.kwargs)))
            for step in self.steps
        ]
        return replace(self, sources=tuple(map(cut, self.sources)), steps=tuple(steps))

    @property
    def token_dims(self) -> dict[str, int]:
        """The dim of the tokens of each input that has some."""
        return {x.name: x.token_dim for x in self.sources if x.token_dim is not None}

    def module(self, name: str = "Program", *, returns_list: bool = False) -> str:
        """Return the class of the module that makes the calls; one with a single result returns it, or a list of it."""
        kept = [x for x in self.sources if x.kind != "input"]
        made = [
            f"self.{x.name} = torch.nn.Parameter({x.expression}, requires_grad={x.value.requires_grad})"
            if x.kind == "parameter"
            else f'self.register_buffer("{x.name}", {x.expression})'
            for x in kept
        ]
        first = [f"{x.name} = self.{x.name}" for x in kept]
        calls, line = list[str](), ""
        for step in self.steps:
            if step.line not in ("", line):
                line = step.line
                calls += ["", f"# {line}"]
            calls.append(f"{step.name} = {step.text}" if self.is_read(step) else step.text)
        inputs, results = [x.name for x in self.sources if x.kind == "input"], ", ".join(self.results)
        lines = [
            f"class {name}(torch.nn.Module):",
            *(indented(["def __init__(self):"], 1) if made else []),
            *(indented(["super().__init__()", *generators(0, made), *made], 2) if made else []),
            *([""] if made else []),
            *indented([f"def forward({', '.join(['self', *inputs])}):"], 1),
            *indented([*first, *calls, f"return [{results}]" if returns_list else f"return {results}"], 2),
        ]
        return "\n".join(lines) + "\n"

    @property
    def text(self) -> str:
        """The module `Program`, and a function that makes its inputs."""
        given = [f'{INDENT}"{x.name}": {x.expression},' for x in self.sources if x.kind == "input"]
        lines = ["def inputs():", *indented([*generators(1, given), "return {", *given, "}"], 1)]
        return "\n".join([self.module(), "", *lines]) + "\n"

    def is_read(self, step: Step) -> bool:
        """Tell whether something reads the value of a call."""
        return step.name in self.results or any(step.name in other.reads for other in self.steps)

    def build(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """Return the module and its inputs, made by running the text."""
        global _number
        _number += 1
        file, text = f"program_{_number}.py", self.text
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for messages that show lines
        own = {x.name: x.value.detach().clone() for x in self.sources}
        found: dict[str, Any] = {"torch": torch, "operator": operator, "GIVEN": own}
        exec(compile(text, file, "exec"), found)
        return found["Program"](), found["inputs"]()


_number = 0


def indented(lines: Iterable[str], levels: int) -> list[str]:
    """Return lines with so many levels of indentation."""
    return [INDENT * levels + line if line else "" for line in lines]


def generators(seed: int, lines: Sequence[str]) -> list[str]:
    """Return the line that makes the generator of these, if one of them draws."""
    is_drawn = any("generator=generator" in line for line in lines)
    return [f"generator = torch.Generator().manual_seed({seed})"] if is_drawn else []


def written(x: Any) -> str:
    """Return an argument of a call in Python.

    Raises:
        CPError: it cannot be written.
    """
    match x:
        case Ref(name):
            return name
        case float() if not math.isfinite(x):
            return f'float("{x}")'
        case bool() | int() | float() | complex() | str() | None:
            return repr(x)
        case torch.device():
            return f'torch.device("{x}")'
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(x)
        case slice():
            return f"slice({written(x.start)}, {written(x.stop)}, {written(x.step)})"
        case tuple():
            return f"({''.join(f'{written(each)}, ' for each in x)})"
        case list():
            return f"[{', '.join(map(written, x))}]"
    raise CPError(f"an argument of type {type(x).__name__} cannot be written as a program.")


def name_of_target(target: Callable[..., Any]) -> str:
    """Return what a program calls a function.

    Raises:
        CPError: it is of no module that a program imports.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    name = getattr(target, "__name__", "")
    for prefix, module in (("operator", operator), ("torch", torch), ("torch._C", torch._C), ("math", math)):
        if getattr(module, name, None) is target:
            return f"{prefix}.{name}"
    raise CPError(f"a call of {target} cannot be written as a program.")


def kept(x: Any) -> Any:
    """Return a tensor with memory of its own, that is a leaf."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
