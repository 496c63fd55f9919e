"""Rank program: the program of every rank as a Python file that runs, with random weights and inputs.

class Program(torch.nn.Module): ...      # the graph of a rank, as calls of operators
def inputs(): ...                        # of the whole sequence, alike on all ranks
torchrun --nproc-per-node 2 program.py   # prints loss and gradient norm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from cpcompile.capture.lowering import placeholders
from cpcompile.errors import ConfigError
from cpcompile.inspect.graph_listing import source_line
from cpcompile.inspect.planned_step import Planned
from cpcompile.inspect.program import INDENT, Program, Ref, Source, Step, indented
from cpcompile.inspect.program_capture import calls_of, program_of
from cpcompile.runtime import own_backward
from cpcompile.runtime.tiles import by_rows, loss_body

cp = torch.ops.cpcompile
GROUPS = {"group": "GROUP", "inner_group": "INNER_GROUP", "outer_group": "OUTER_GROUP"}
KEYS = ("body", "function")  # by which operators know what they run
FEW = 4096  # values of a buffer that are written down; more are random

HEAD = '''"""The program of each of {world_size} ranks, as cpcompile made it. Weights and long inputs are random.

    torchrun --nproc-per-node {world_size} program.py      # whatever this file is called

Change what you like. Nothing is computed again in backward, also where the model has checkpoints.
"""

import operator
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cpcompile.runtime  # its operators
{imports}
DEVICE = torch.device({device})
GROUP = INNER_GROUP = OUTER_GROUP = ""  # names of process groups: of all ranks, and of both dims of their grid
'''

MAIN = """

# Whole on every rank, which has the gradient of its tokens.
SUMMED = [
{summed}]


def main():
    global GROUP, INNER_GROUP, OUTER_GROUP
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(f"start the ranks: torchrun --nproc-per-node {world_size} {{__file__}}")
    if DEVICE.type != "cpu":
        torch.accelerator.set_device_index(DEVICE)
    mesh = init_device_mesh(DEVICE.type, {grid}, mesh_dim_names=("outer", "inner"))
    GROUP = dist.group.WORLD.group_name
    OUTER_GROUP, INNER_GROUP = (mesh.get_group(name).group_name for name in ("outer", "inner"))
    register_bodies()
    program = Program().to(DEVICE)
    results = program(**{{name: x.to(DEVICE) for name, x in inputs().items()}})
    results = results if isinstance(results, tuple) else (results,)
    losses = [x for x in results if x.dim() == 0 and x.requires_grad]
    if losses:
        losses[0].backward()
        grads = []
        for name, parameter in program.named_parameters():
            if parameter.requires_grad:
                grads.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                if name in SUMMED:
                    dist.all_reduce(grads[-1])
        norm = torch.cat([grad.flatten().double() for grad in grads]).norm() if grads else torch.zeros(())
    if dist.get_rank() == 0:
        print(f"loss {{losses[0].item():.6f}}, gradient norm {{norm.item():.6f}}" if losses else "no loss")
        print("results of this rank:", ", ".join(f"{{x.dtype}} {{list(x.shape)}}" for x in results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
"""


def rank_program(planned: Planned) -> str:
    """Return the program of every rank of a plan as Python.

    Args:
        planned: before its equal layers are outlined.

    Raises:
        ConfigError: parameters are sharded by FSDP.
        CPError: the graph holds what cannot be written as calls.
    """
    if planned.shards:
        raise ConfigError("a program for you to run holds whole parameters: leave fully_sharded out.")
    transformed = planned.transformed
    plan, gm = transformed.plan, transformed.graph
    tensors = [x for x in planned.inputs if isinstance(x, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    kind = "cuda" if device == "meta" else device
    program = program_of(gm, planned.inputs, {})
    bodies = Bodies(device)
    nodes = calls_of(gm)  # the last steps, behind those that read sizes
    lines = [""] * (len(program.steps) - len(nodes)) + [source_line(node) for node in nodes]
    steps = tuple(
        _on_ranks(replace(s, line=line), device, bodies) for s, line in zip(program.steps, lines, strict=True)
    )
    program = replace(program, steps=steps, sources=tuple(map(_made, program.sources)))
    names = {id(x): name for name, x in zip(_names(gm, planned.inputs, program), tensors, strict=True)}
    inner = plan.inner_size or 1
    words = {
        "world_size": plan.world_size,
        "device": '"cpu"' if device == "cpu" else f'"{kind}", int(os.environ.get("LOCAL_RANK", "0"))',
        "imports": "".join(f"{line}\n" for line in sorted(bodies.imports)),
        "grid": (plan.world_size // inner, inner),
        "summed": "".join(f'{INDENT}"{names[id(planned.inputs[i])]}",\n' for i in planned.summed),
    }
    return (
        HEAD.format(**words) + bodies.text + "\n\n" + bodies.registration + "\n\n" + program.text + MAIN.format(**words)
    )


def _names(gm: fx.GraphModule, inputs: Sequence[Any], program: Program) -> list[str]:
    """Return the name in the program of each input that is a tensor; placeholders come first in a program."""
    count = sum(isinstance(x, torch.Tensor) for _, x in zip(placeholders(gm), inputs, strict=True))
    return [source.name for source in program.sources[:count]]


def _made(source: Source) -> Source:
    """Write down how a source is made: what is small and no weight as it is, other integers within their range."""
    value = source.value.detach()
    is_known = value.device.type != "meta"
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if is_known and value.numel() <= FEW and (is_integer or source.kind == "buffer"):
        made = source.literal
    elif is_integer:  # below 0 are numbers with a meaning of their own, such as labels that are ignored
        highest = int(value.max()) if is_known else 0
        made = (
            f"torch.randint(0, {max(highest, 0) + 1}, {tuple(value.shape)}, dtype={value.dtype}, generator=generator)"
        )
    elif source.kind == "parameter" and value.dim() > 1:
        made = f"({source.random} / {max(1, value.shape[-1]) ** 0.5:.4g})"
    else:
        made = source.random
    on_cpu = torch.empty((), dtype=value.dtype).expand(value.shape)
    return replace(source, made=made, value=on_cpu.requires_grad_(source.value.requires_grad))


def _on_ranks(step: Step, device: str, bodies: Bodies) -> Step:
    """Let a call name the process groups of the ranks, their device, and the bodies of the file."""

    def placed(x: Any) -> Any:
        return Ref("DEVICE") if isinstance(x, torch.device) and x.type == device else x

    args, kwargs = tree_map(placed, (list(step.args), dict(step.kwargs)))
    if isinstance(step.target, torch._ops.OpOverload) and step.target.namespace == "cpcompile":
        for i, argument in enumerate(step.target._schema.arguments):
            within: Any = args if i < len(args) else kwargs
            at: Any = i if i < len(args) else argument.name
            if argument.name in GROUPS:
                within[at] = Ref(GROUPS[argument.name])
            elif argument.name in KEYS:
                within[at] = Ref(bodies.name_of(step.target, within[at]))
    return replace(step, args=tuple(args), kwargs=kwargs)


class Bodies:
    """What operators know by a key: losses of chunks, functions of tiles, and backwards of the model's own.

    Attributes:
        text: the modules.
        imports: the lines that these need.
    """

    def __init__(self, device: str) -> None:
        self.text = ""
        self._device, self._known = device, list[str]()
        self.imports: set[str] = set()
        self._names: dict[str, str] = {}

    @property
    def registration(self) -> str:
        """The function that makes them known, once the names of the groups are, which they hold."""
        lines = [f"global {', '.join(self._names.values())}", *self._known] if self._known else ["pass"]
        return "\n".join(["def register_bodies():", *indented(lines, 1)]) + "\n"

    def name_of(self, target: Callable[..., Any], key: str) -> str:
        """Return the name that a key has in the file."""
        if key not in self._names:
            number = len(self._names) + 1
            self._names[key] = f"BODY_{number}"
            self.text += self._written(target, key, f"Body{number}", f"BODY_{number}")
        return self._names[key]

    def _written(self, target: Callable[..., Any], key: str, kind: str, name: str) -> str:
        traced = f"torch.fx.symbolic_trace({kind}())"
        if target is cp.own_backward.default:
            graph = own_backward.backward_body_of(key)
            self.imports.add("from cpcompile.runtime.own_backward import add_body as add_backward")
            known = f"add_backward({traced})"
        elif target is cp.by_rows.default:
            function = by_rows.function_of(key)
            graph = function.function
            self.imports.add("from cpcompile.runtime.tiles.by_rows import RowFunction, add_function")
            known = f"add_function(RowFunction({traced}, {function.results!r}))"
        else:
            body = loss_body.body_of(key)
            graph = body.function
            self.imports.add("from cpcompile.runtime.tiles.loss_body import Body, Result, add_body")
            results = "".join(f"Result({r.inner}, {r.dtype}, {r.has_gradient}), " for r in body.results)
            known = f"add_body(Body({traced}, ({results.strip()}), {body.provider!r}))"
        program = _function(graph)
        program = replace(program, steps=tuple(_on_ranks(step, self._device, self) for step in program.steps))
        self._known.append(f"{name} = {known}")
        return f"\n\n{program.module(kind, returns_list=True)}"


def _function(gm: fx.GraphModule) -> Program:
    """Return a graph of which nothing is known but its calls, as a program of inputs."""
    count = len(placeholders(gm))
    program = program_of(gm, [torch.empty(0)] * count, {})
    inputs = [replace(source, kind="input") for source in program.sources[:count]]
    return replace(program, sources=(*inputs, *map(_made, program.sources[count:])))
