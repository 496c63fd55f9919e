"""Search: a program made smaller as long as it fails alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from cpcompile.errors import CPError
from cpcompile.inspect.failure import Failure, failure_of
from cpcompile.inspect.program import Program
from cpcompile.inspect.verify import verify
from cpcompile.options.config import Config


class OutOfTimeError(Exception):
    """The search has no time left."""


class Search:
    """Makes a program smaller as long as it fails alike.

    Attributes:
        best: the smallest program so far.
    """

    def __init__(
        self,
        program: Program,
        values: Mapping[str, Any],
        token_dims: Mapping[str, Sequence[int]],
        wanted: Failure,
        arguments: Mapping[str, Any],
        deadline: float,
    ) -> None:
        self.values, self.token_dims, self.wanted, self.arguments = values, token_dims, wanted, arguments
        self.deadline, self.num_trials, self.best = deadline, 0, program
        self._tried: set[str] = set()  # what is tried again would not fail again

    def run(self) -> None:
        """Search.

        Raises:
            CPError: the whole program does not fail as the model does.
        """
        found = self.failure(self.best)
        if not self.wanted.is_like(found):
            raise CPError(
                f"the graph written as calls does not show {self.wanted}, but {found or 'nothing'}: what makes the model fail is "
                "not in its calls (a module path, an activation checkpoint, a backward of the model's own, the user's objective)."
            )
        with contextlib.suppress(OutOfTimeError):
            self.try_(self.best.pruned(keeps_acts=False))
            self.end_early()
            self.begin_late()
            while self.replace_calls() or self.drop_acts():
                pass
            self.shrink()
            self.draw()
        self.best = self.written_down(self.best)

    def options_of(self, program: Program) -> dict[str, Any]:
        """Return the arguments of `verify` that are not its defaults."""
        defaults: dict[str, Any] = {field.name: getattr(Config(), field.name) for field in fields(Config)}
        defaults |= {"inner_size": 0, "dtype": None, "tolerance": None}
        names = {x.name for x in program.sources}
        own = {**self.arguments, "token_dims": program.token_dims}
        own["constants"] = tuple(name for name in self.arguments.get("constants", ()) if name in names)
        return {name: x for name, x in own.items() if name not in defaults or x != defaults[name]}

    def failure(self, program: Program) -> Failure | None:
        """Return how a program fails."""
        self.num_trials += 1

        def run() -> Any:
            module, inputs = program.build()
            return verify(module, inputs, **self.options_of(program))

        return failure_of(run)

    def try_(self, program: Program) -> bool:
        """Take a program if it fails as it should, and tell whether it does.

        Raises:
            OutOfTimeError: the time is over.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        key = identity(program)
        if key == identity(self.best):
            return True
        if key in self._tried:
            return False
        self._tried.add(key)
        does = self.wanted.is_like(self.failure(program))
        if does:
            self.best = program
        return does

    def end_early(self) -> None:
        """Return the earliest value with which the program fails."""
        program = self.best
        names = [step.name for step in program.steps if is_trained(self.values.get(step.name))]
        low, high = 0, len(names)
        if self.wanted.node in names and self.try_(program.returning(self.wanted.node)):
            return
        while low < high:
            middle = (low + high) // 2
            if self.try_(program.returning(names[middle])):
                high = middle
            else:
                low = middle + 1

    def begin_late(self) -> None:
        """Give the program the values of as many of its first calls as possible."""
        program = self.best
        names = [step.name for step in program.steps]

        def fails_from(number: int) -> bool:
            return self.try_(self.given(program, names[:number], multiplied=True))

        kept = 1
        while kept < len(names) and not fails_from(len(names) - kept):
            kept *= 2
        low, high = max(0, len(names) - kept), len(names) - kept // 2
        while high - low > 1:
            middle = (low + high) // 2
            if fails_from(middle):
                low = middle
            else:
                high = middle

    def replace_calls(self) -> bool:
        """Give the program the value of one call after the other, or one of its operands; tell whether one could be."""
        changed = False
        for step in reversed(self.best.steps):
            if step.name in self.best.results or step not in self.best.steps:
                continue
            dims = [*self.token_dims.get(step.name, ()), None]
            smaller = [self.given(self.best, [step.name], {step.name: dim}) for dim in dims]
            smaller.append(self.given(self.best, [step.name], multiplied=True))
            smaller += [self.best.without(step.name, name) for name in step.reads if self.are_alike(step.name, name)]
            changed |= any(self.try_(program) for program in smaller if len(program.steps) < len(self.best.steps))
        return changed

    def are_alike(self, name: str, other: str) -> bool:
        """Tell whether two values are tensors of one shape and dtype."""
        a, b = self.values.get(name), self.values.get(other)
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return False
        return (a.shape, a.dtype) == (b.shape, b.dtype)

    def drop_acts(self) -> bool:
        """Drop calls that nothing reads; tell whether one could be."""
        unread = [step for step in self.best.steps if step.acts and not self.best.is_read(step)]
        return any(
            self.try_(replace(self.best, steps=tuple(other for other in self.best.steps if other is not step)).pruned())
            for step in unread
        )

    def given(
        self,
        program: Program,
        names: Sequence[str],
        token_dims: Mapping[str, int | None] | None = None,
        *,
        multiplied: bool = False,
    ) -> Program:
        dims = {name: self.token_dims[name][0] for name in names if self.token_dims.get(name)}
        return program.given(names, self.values, {**dims, **(token_dims or {})}, multiplied=multiplied)

    def shrink(self) -> None:
        """Make every size as small as it may be."""
        enough = self.arguments["world_size"] + 1  # tokens that the ranks share unequally
        sizes = {size for x in self.best.sources for size in x.value.shape}
        for size in sorted(sizes, reverse=True):
            any(self.try_(self.best.resized(size, n)) for n in sorted({1, 2, enough, size // 2}) if 0 < n < size)

    def draw(self) -> None:
        """Draw values from a generator where the program fails with any."""
        numbers = range(len(self.best.sources))
        floats = [i for i in numbers if self.best.sources[i].value.is_floating_point()]
        if self.try_(drawn(self.best, numbers)):
            return
        self.try_(drawn(self.best, floats))
        for number in numbers:
            if not self.best.sources[number].made:
                self.try_(drawn(self.best, [number]))

    def written_down(self, program: Program) -> Program:
        """Return the program with all values that it still has to be given."""
        return replace(program, sources=tuple(x if x.made else replace(x, made=x.literal) for x in program.sources))


def identity(program: Program) -> str:
    """Return a text that tells two programs apart, but for the values that they are given."""
    return f"{program.token_dims} {[list(x.value.shape) for x in program.sources]}\n{program.text}"


def drawn(program: Program, numbers: Sequence[int]) -> Program:
    """Return a program some of whose sources are drawn at random."""
    sources = [replace(x, made=x.random) if i in numbers else x for i, x in enumerate(program.sources)]
    return replace(program, sources=tuple(sources))


def is_trained(value: Any) -> bool:
    """Tell whether a value has a gradient, so that a program may return it."""
    return isinstance(value, torch.Tensor) and value.requires_grad
