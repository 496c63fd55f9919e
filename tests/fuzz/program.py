"""Programs: small random models as source code, and what became of one."""

from __future__ import annotations

import dataclasses
import linecache
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import cpcompile

VOCABULARY, WIDTH, LONGEST = 13, 8, 64
HAS_STRICT = "strict" in {f.name for f in dataclasses.fields(cpcompile.Config)}

# Float64 rounding is far below, and no mistake that a test of this size can show is as small.
TOLERANCE = 1e-9

HEADER = """\
import math
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
"""

# Each input by name; `S` tokens, `B` rows, `M` entries of a second, unsharded sequence.
INPUTS = {
    "input_ids": "torch.randint({V}, ({B}, {S}))",
    "labels": "torch.where(torch.rand({B}, {S}) < 0.3, -100, torch.randint({V}, ({B}, {S})))",
    "classes": "torch.randint({V}, ({B},))",
    "targets": "torch.randn({B}, {S}, {D}, dtype=torch.float64)",
    "mask": "(torch.arange({S}) < torch.randint(1, {S} + 1, ({B}, 1))).long()",
    "documents": "(torch.rand({B}, {S}) < 0.3).long().cumsum(1)",
    "position_ids": "torch.randint({S}, ({B}, {S}))",
    "memory": "torch.randn({B}, {M}, {D}, dtype=torch.float64)",
    "memory_ids": "torch.randint({V}, ({B}, {M}))",
}

_NAMES = count()


@dataclass(frozen=True)
class Program:
    """A model as source code with the sizes of its inputs and the options under which it is sharded."""

    setup: tuple[str, ...]
    forward: tuple[str, ...]
    batch: int = 2
    length: int = 7
    memory: int = 5
    world_size: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def inputs(self) -> dict[str, str]:
        """The inputs that the code uses, as expressions."""
        text = "\n".join(self.forward)
        sizes = {"V": VOCABULARY, "D": WIDTH, "B": self.batch, "S": self.length, "M": self.memory}
        used = {name: code for name, code in INPUTS.items() if re.search(rf"\b{name}\b", text)}
        return {name: code.format(**sizes) for name, code in used.items()}

    def model_source(self) -> str:
        """Return the class as source code."""
        head = ["super().__init__()", *self.setup]
        lines = [
            "class Model(nn.Module):",
            "    def __init__(self):",
            *(textwrap.indent(line, " " * 8) for line in head),
            "",
            f"    def forward(self, {', '.join(self.inputs)}):",
            *(textwrap.indent(line, " " * 8) for line in self.forward),
        ]
        return "\n".join([HEADER, *lines, ""])

    def __repr__(self) -> str:
        """Return a script that shows what became of this program."""
        inputs = "".join(f"    {name!r}: {code},\n" for name, code in self.inputs.items())
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"\nimport cpcompile\n{self.model_source()}\n"
            f"torch.manual_seed({self.seed})\nmodel = Model().double()\n"
            f"for parameter in model.parameters():\n    parameter.data += 0.1 * torch.randn_like(parameter)\n"
            f"inputs = {{\n{inputs}}}\n"
            f"print(cpcompile.verify(model, inputs, world_size={self.world_size}, dtype=torch.float64{options}))\n"
        )

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model and its inputs."""
        source = self.model_source()
        name = f"program_{next(_NAMES)}.py"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        space: dict[str, Any] = {"__name__": "program"}
        exec(compile(source, name, "exec"), space)
        torch.manual_seed(self.seed)
        model = space["Model"]().double()
        for parameter in model.parameters():  # no bias of exactly 0 and no gain of exactly 1, whose errors would cancel
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model, {name: eval(code, {"torch": torch}) for name, code in self.inputs.items()}


def objective(output: Any) -> Tensor:
    """Return a fixed random projection of everything that a model returns, integers included."""
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
    parts = [(x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in tensors]
    return torch.stack(parts).sum()


def has_gradients(program: Program) -> bool:
    """Tell whether a program has finite gradients on one device, and more of them than rounding."""
    model, inputs = program.build()
    objective(model(**inputs)).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return all(bool(g.isfinite().all()) for g in gradients) and any(g.norm() > 1e-6 for g in gradients)


class Wrong(AssertionError):
    """The sharded program computes something else, or fails with an error that is not ours."""


REFUSALS: Counter[str] = Counter()
EXACT = "exact"


def outcome(program: Program) -> str:
    """Return `exact`, or why the program is refused. Raises `Wrong` for everything else."""
    torch._dynamo.reset()
    model, inputs = program.build()
    options = {name: value for name, value in program.options.items() if name != "strict" or HAS_STRICT}
    try:
        found = cpcompile.verify(
            model,
            inputs,
            world_size=program.world_size,
            dtype=torch.float64,
            tolerance=TOLERANCE,
            objective=objective,
            **options,
        )
    except cpcompile.VerificationError:
        raise
    except cpcompile.CPError as error:
        return tally(reason_of(error))
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}\n{program!r}") from error
    if not found.ok:
        raise Wrong(f"{found}\n{program!r}")
    return tally(EXACT)


def tally(result: str) -> str:
    REFUSALS[result] += 1
    return result


def reason_of(error: cpcompile.CPError) -> str:
    """Return the kind of a refusal: its first line without numbers."""
    first = str(error).strip().splitlines()[0]
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', first)[:110]}"
