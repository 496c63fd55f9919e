"""Minify: the smallest program of ATen calls that still fails as a model does, as a Python file to report."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from cpcompile.capture.dynamo import by_name, compile_whole, uncompiled
from cpcompile.capture.token_inputs import find_token_dims
from cpcompile.compile.inner import input_names
from cpcompile.errors import CPError
from cpcompile.inspect.failure import Failure, failure_of
from cpcompile.inspect.model_runs import LockstepBackend, Objective, run_and_differentiate, seeded
from cpcompile.inspect.program import Program
from cpcompile.inspect.program_capture import program_of, recorded, write_out_backwards
from cpcompile.inspect.search import Search
from cpcompile.inspect.verify import Runs, verify
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

NOTHING = "nothing is WRONG, refused or failing, so that there is nothing to make smaller."


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
        write_out_backwards(gm)
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
