"""Ledger: the bytes that a training step holds on a rank, by phase and by kind, predicted without running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.capture.lowering import placeholders
from cpcompile.compile.deferred_outputs import defer_outputs
from cpcompile.compile.inner import finish_graph, prepare_for_autograd
from cpcompile.compile.transform import Transformed
from cpcompile.errors import source_place
from cpcompile.ir.annotation import annotation
from cpcompile.memory.timeline import Moment, Timeline, bytes_of, root_of
from cpcompile.memory.workspace import workspace
from cpcompile.options.config import Config

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "inputs",
    "gathered parameters",
    "saved",
    "temporary",
    "workspace",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """The moment of a phase at which a rank holds most.

    Attributes:
        name: `forward`, `backward` or `optimizer`.
        held: bytes by kind, of `KINDS`. "saved" is kept from forward to backward, "workspace" is what an operator needs beside its
            operands and results: blocks of keys that travel, the logits of a chunk.
        place: the user's line that runs then, or ''.
    """

    name: str
    held: Mapping[str, int]
    place: str

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.held.values())


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a training step holds on a rank, by phase. The peak of torch's allocator is that of the largest phase."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        return max(phase.total for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return asdict(self) | {"peak": self.peak}


@dataclass(frozen=True, slots=True)
class Held:
    """What is there before a step, in bytes: parameters and buffers, the gradients of a step, optimizer state."""

    parameters: int
    gradients: int
    optimizer: int


def ledger_of(
    transformed: Transformed,
    inputs: Sequence[Any],
    config: Config,
    held: Held,
    *,
    summed: Sequence[int] = (),
    parameters: Collection[int] = (),
    bytes_ahead: int = 0,
) -> Ledger:
    """Predict the memory of a step. The graph is not changed.

    Args:
        transformed: a graph of every rank.
        inputs: fake values of its placeholders, which take gradients where the step needs them.
        config: the options that it was transformed by.
        held: what is there before the step.
        summed: which inputs have gradients that are summed over the axis.
        parameters: which inputs are parameters and buffers; the others are what the user passes.
        bytes_ahead: of parameters that are gathered before they are used.
    """
    gm = copy.deepcopy(transformed.graph)
    defer_outputs(gm)
    finish_graph(gm, summed, 0)
    joint_pass = prepare_for_autograd(gm, config)
    mode = next(x.fake_mode for x in inputs if isinstance(x, torch._subclasses.FakeTensor))
    forward, backward = _torch.divide(gm, inputs, mode, joint_pass)
    given = sum(bytes_of_value(x) for i, x in enumerate(inputs) if i not in set(parameters))
    fixed = {"parameters": held.parameters, "optimizer": held.optimizer, "inputs": given}
    phases = [largest("forward", Timeline(forward.graph, forward_kinds(forward), workspace, never).run(), fixed, bytes_ahead)]
    if backward is not None:
        saved = saved_values(forward, backward)
        of_backward = Timeline(backward.graph, backward_kinds(backward, saved), workspace, saved.__contains__).run()
        phases.append(largest("backward", of_backward, fixed, bytes_ahead))
    if held.gradients:
        phases.append(Phase("optimizer", fixed | {"gradients": held.gradients}, ""))
    return Ledger(tuple(phases))


def bytes_of_value(value: Any) -> int:
    """Return the bytes of a tensor, 0 of anything else."""
    return int(value.untyped_storage().nbytes()) if isinstance(value, torch.Tensor) else 0


def never(node: fx.Node) -> bool:
    """Tell that an input is not freed."""
    return False


def largest(name: str, moments: Sequence[Moment], fixed: Mapping[str, int], bytes_ahead: int) -> Phase:
    """Return the moment that holds most, with what is held all the time."""
    moment = max(moments, key=lambda m: m.total)
    held = {kind: n for kind, n in moment.held.items() if kind != "external" and n}
    if bytes_ahead:
        held["gathered parameters"] = held.get("gathered parameters", 0) + bytes_ahead
    return Phase(name, {kind: n for kind in KINDS if (n := fixed.get(kind, 0) + held.get(kind, 0))}, "" if moment.node is None else source_place(moment.node))


def forward_kinds(forward: fx.GraphModule) -> Callable[[fx.Node], str]:
    """Return what kind each stored value of a forward is of."""
    (output,) = forward.graph.find_nodes(op="output")
    returned = {root_of(node) for node in output.all_input_nodes}

    def kind(node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return "external"
        if is_gathered(node):
            return "gathered parameters"
        return "saved" if node in returned else "temporary"

    return kind


def saved_values(forward: fx.GraphModule, backward: fx.GraphModule) -> set[fx.Node]:
    """Return the inputs of a backward that hold what its forward has computed, one for each piece of memory."""
    made = {node.name: root_of(node) for node in forward.graph.nodes}
    found: dict[fx.Node, fx.Node] = {}
    for node in placeholders(backward):
        root = made.get(node.name)
        if root is not None and root.op == "call_function":
            found.setdefault(root, node)
    return set(found.values())


def backward_kinds(backward: fx.GraphModule, saved: Collection[fx.Node]) -> Callable[[fx.Node], str]:
    """Return what kind each stored value of a backward is of."""
    (output,) = backward.graph.find_nodes(op="output")
    returned = {root_of(node) for node in output.all_input_nodes}

    def kind(node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return "saved" if node in saved else "external"
        if node in returned:
            return "gradients"
        return "gathered parameters" if is_gathered(node) else "temporary"

    return kind


def is_gathered(node: fx.Node) -> bool:
    """Tell whether a value is a parameter that was gathered."""
    return "all_gather_into_tensor" in str(node.target)
