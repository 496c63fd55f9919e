"""Minify: the smallest program of ATen calls that still fails as a model does, as a Python file to report."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from cpcompile.capture.dynamo import by_name, compile_whole, uncompiled
from cpcompile.capture.faults import node_at
from cpcompile.capture.token_inputs import find_token_dims
from cpcompile.compile.inner import input_names
from cpcompile.errors import CPError, InternalError
from cpcompile.inspect.model_runs import LockstepBackend, Objective, run_and_differentiate, seeded
from cpcompile.inspect.program import Program, program_of, recorded
from cpcompile.inspect.sweep import WRONG
from cpcompile.inspect.verify import Runs, verify
from cpcompile.ir.annotation import annotation
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

_OPERATOR = re.compile(r"\b(?:aten|cp|cpcompile|prims|higher_order)\.\w+")
NOTHING = "nothing is WRONG, refused or failing, so that there is nothing to make smaller."


@dataclass(frozen=True, slots=True)
class Failure:
    """How a verification fails: two are of one kind if all but the text is equal.

    Attributes:
        kind: `WRONG`, or the class of the error (and of its cause, where that is no error of ours).
        operator: the operator that the error names first, or ''.
        text: what is said of it.
        node: the first value that differs, or at which the error came up.
    """

    kind: str
    operator: str
    text: str
    node: str = ""

    def is_like(self, other: Failure | None) -> bool:
        """Tell whether the other is of this kind."""
        return other is not None and (self.kind, self.operator) == (other.kind, other.operator)

    def __str__(self) -> str:
        return f"{self.kind} of {self.operator}" if self.operator else self.kind


@dataclass(frozen=True, slots=True)
class Minified:
    """The smallest program that was found.

    Attributes:
        text: the Python file.
        failure: what it shows.
        num_calls: how many calls of operators it has.
        num_trials: how many programs were tried.
    """

    text: str
    failure: Failure
    num_calls: int
    num_trials: int

    def __str__(self) -> str:
        return f"{self.num_calls} call(s) that show {self.failure} (of {self.num_trials} programs tried)"


def minify(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    world_size: int,
    path: Path | str | None = None,
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seconds: float = 300.0,
    **options: Any,
) -> Minified:
    """Return the smallest program of ATen calls that fails as `verify` does of this model: WRONG, or with the same error.

    The captured graph is cut behind the first value that fails, what comes before is replaced by inputs, and sizes are made
    smaller, as long as `verify` of the program fails alike.

    Args:
        model, inputs, world_size, inner_size, dtype, tolerance, options: those of `verify`.
        path: a Python file to write the program to.
        seconds: when to stop, with what was found until then.

    Raises:
        CPError: nothing fails, or not in the graph (when tracing, or in the model on one device), or only in the whole model.
    """
    arguments = {"world_size": world_size, "inner_size": inner_size, "dtype": dtype, "tolerance": tolerance, **options}
    wanted = failure_of(lambda: verify(model, inputs, **arguments))
    if wanted is None:
        raise CPError(NOTHING)
    backend = Recording(Config.of({**options, "kernel": "auto"}), world_size, inner_size, dtype == torch.float64)
    program, values, token_dims = backend.record(uncompiled(model), inputs, dtype, wanted)
    search = Search(program, values, token_dims, wanted, arguments, time.monotonic() + seconds)
    search.run()
    found = search.best
    name = Path(path).name if path is not None else "program.py"
    text = file_of(found, wanted, search.options_of(found), name)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return Minified(text, wanted, len(found.steps), search.num_trials)


def failure_of(run: Callable[[], Any]) -> Failure | None:
    """Return how a verification fails, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run()
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InternalError) else None
        kind = type(error).__name__ + (f" ({type(cause).__name__})" if cause is not None else "")
        operator, node = _OPERATOR.search(str(error).partition("\n\n")[0]), node_at(error.__traceback__)
        at = "" if node is None else annotation(node).origin or node.name
        return Failure(kind, operator[0] if operator else "", str(error), at)
    if not found.is_wrong:
        return None
    first = found.first_difference
    return Failure(WRONG, "", str(found), first.node if first is not None else "")


class Recording(LockstepBackend):
    """Keeps the captured graph and what it is given."""

    def __init__(self, config: Config, world_size: int, inner_size: int, is_wide: bool) -> None:
        super().__init__(config, Axis.in_process(world_size, inner_size), is_wide)
        self.given: tuple[Any, ...] = ()

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        self.given = inputs
        return super()._run(*[x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs])

    def record(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None, wanted: Failure
    ) -> tuple[Program, dict[str, Any], dict[str, list[int]]]:
        """Return the program, the value of each of its calls, and the dims of these that may hold tokens.

        Raises:
            CPError: there is no graph, or it cannot be written as a program.
        """
        runs = Runs(model, inputs, dtype, Objective(), self.config)
        forward = compile_whole(runs.model.forward, self, self.config)
        given = by_name(runs.model.forward, runs.inputs, beside=self.config.told_by)
        with warnings.catch_warnings(), contextlib.suppress(Exception), seeded(runs.model):
            warnings.simplefilter("ignore")
            run_and_differentiate(runs.model, forward, given, Objective(), self.config)
        runs.state.restore()
        if self.captured is None or not self.given:
            raise CPError(f"there is no graph to make smaller: {wanted.text}")
        gm, names = self.captured, input_names(self.captured)
        try:
            dims = find_token_dims(gm, names, self.config.token_dims)
        except CPError:
            dims = {}
        program = program_of(gm, self.given, dims)
        with seeded(runs.model):
            steps = list(recorded(gm, program, self.given))
        sizes = {str(node.meta["val"].shape[dims[node.name]]) for node in token_nodes(gm, dims)}
        token_dims = {
            name: [dim for dim, size in enumerate(known.shape) if str(size) in sizes]
            for name, _, known in steps
            if isinstance(known, torch.Tensor)
        }
        runs.state.restore()
        return program, {name: value for name, value, _ in steps}, token_dims


def token_nodes(gm: fx.GraphModule, dims: Mapping[str, int]) -> list[fx.Node]:
    """Return the placeholders that have tokens."""
    return [node for node in gm.graph.find_nodes(op="placeholder") if node.name in dims]


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
                "not in its calls (a module path, an activation checkpoint, the user's objective)."
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


def file_of(program: Program, failure: Failure, options: Mapping[str, Any], name: str) -> str:
    """Return the Python file that shows the failure."""
    own = sys.modules["cpcompile"].__version__  # a name of the public face, which nothing in here imports
    versions = f"cpcompile {own}, torch {torch.__version__}, Python {platform.python_version()}"
    said = "\n".join(f"#   {line}".rstrip() for line in failure.text.splitlines()[:20])
    body = program.text
    modules = ["import operator"] if "operator." in body else []
    modules += ["import math"] if re.search(r"\bmath\.", body) else []
    imports = "\n".join([*modules, *([""] if modules else []), "import torch", "", "import cpcompile"])
    given = "".join(f"    {key!r}: {value!r},\n" for key, value in options.items()).replace("'", '"')
    return (
        f'"""{failure}, in {len(program.steps)} call(s). Run it: python {name}\n\n'
        f'Made by cpcompile.minify with {versions}, {platform.platform()}.\n"""\n\n'
        f"{imports}\n\n# The whole model says:\n{said}\n\n\n{body}\n\n"
        f"OPTIONS = {{\n{given}}}\n\n"
        'if __name__ == "__main__":\n'
        "    found = cpcompile.verify(Program(), inputs(), **OPTIONS)\n"
        "    print(found)\n"
        "    found.raise_if_wrong()\n"
    )
