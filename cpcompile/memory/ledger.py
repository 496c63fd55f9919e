"""Ledger: the bytes that a training step holds on a rank, by phase and by kind, predicted without running it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.capture.faults import faults_of
from cpcompile.capture.lowering import placeholders
from cpcompile.compile.deferred_outputs import defer_outputs
from cpcompile.compile.inner import finish_graph, prepare_for_autograd
from cpcompile.compile.offload import is_in_host_memory
from cpcompile.compile.result_memory import root_of
from cpcompile.compile.transform import Transformed
from cpcompile.errors import source_place
from cpcompile.ir.operator_call import value_of, values_of
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.memory.timeline import Moment, Timeline, bytes_of, bytes_of_value
from cpcompile.memory.workspace import workspace
from cpcompile.options.config import Config

REMEDY = "memory='' runs the step without a prediction, memory=False explains without one. Please report it with the error above."
KINDS = (
    "parameters",
    "gradients",
    "buckets",
    "optimizer",
    "inputs",
    "gathered parameters",
    "saved",
    "returned",
    "temporary",
    "workspace",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """The moment of a phase at which a rank holds most.

    Attributes:
        name: `forward`, `backward` or `optimizer`.
        held: bytes by kind, of `KINDS`. "saved" is kept from forward to backward, "workspace" is what an operator needs
            beside its operands and results: blocks of keys that travel, the logits of a chunk; "returned" is what the model
            returns, which the caller holds; "buckets" are the copies of gradients that `DistributedDataParallel` sums.
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
    """What a training step holds on a rank, by phase. The peak of torch's allocator is that of the largest phase.

    Attributes:
        phases: forward, backward and optimizer; only the first for what has no gradients.
        host: bytes that wait in host memory from forward to backward (`offload`), of this rank alone.
    """

    phases: tuple[Phase, ...]
    host: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        return max(phase.total for phase in self.phases)

    @property
    def resident(self) -> int:
        """What is there before a step: parameters, buffers, buckets and optimizer state."""
        return sum(self.phases[0].held.get(kind, 0) for kind in ("parameters", "buckets", "optimizer"))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return asdict(self) | {"peak": self.peak}


@dataclass(frozen=True, slots=True)
class Divided:
    """The graph of a rank divided into forward and backward, which is None where nothing takes a gradient.

    Attributes:
        inputs: fake, as a rank holds them.
        num_outputs: how many outputs of forward are not kept for backward.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    inputs: Sequence[Any]
    num_outputs: int


def divided(
    transformed: Transformed,
    inputs: Sequence[Any],
    config: Config,
    *,
    shards: Mapping[int, ParameterShard],
    summed: Sequence[int],
    outlines: bool,
) -> Divided:
    """Divide the graph of a rank as the inner compiler does; with `outlines`, equal layers are calls. The graph is used up."""
    gm = transformed.graph
    nodes = placeholders(gm)
    mode = next(x.fake_mode for node in nodes for x in values_of(node) if isinstance(x, torch._subclasses.FakeTensor))
    with mode:
        values = [
            fake_input(value_of(node), x, shards.get(i)) for i, (node, x) in enumerate(zip(nodes, inputs, strict=True))
        ]
    defer_outputs(gm)
    finish_graph(gm, summed, 0)
    units = {i: shard.unit for i, shard in shards.items()}
    joint_pass, halves_pass = prepare_for_autograd(transformed, config, outlines=outlines, units=units)
    (output,) = gm.graph.find_nodes(op="output")
    forward, backward = _torch.divide(gm, values, mode, joint_pass, halves_pass, config.recompute_elementwise)
    return Divided(forward, backward, values, len(output.args[0]))


@faults_of("the prediction of memory", REMEDY)
def ledger_of(
    transformed: Transformed,
    inputs: Sequence[Any],
    config: Config,
    *,
    shards: Mapping[int, ParameterShard],
    summed: Sequence[int] = (),
    bytes_ahead: int = 0,
    buckets: int = 0,
) -> Ledger:
    """Predict the memory of a training step on a rank. The graph is used up.

    Args:
        transformed: a graph of every rank.
        inputs: what Dynamo called the compiler with.
        config: the options that the graph was transformed by.
        shards: how FSDP shards some of the inputs.
        summed: which inputs have gradients that are summed over the axis.
        bytes_ahead: of parameters that are gathered before they are used.
        buckets: bytes of gradients that a wrapper holds copies of, from before the first step on.
    """
    halves = divided(transformed, inputs, config, shards=shards, summed=summed, outlines=config.outlines)
    return ledger_of_halves(halves, inputs, config, shards=shards, bytes_ahead=bytes_ahead, buckets=buckets)


@faults_of("the prediction of memory", REMEDY)
def ledger_of_halves(
    halves: Divided,
    inputs: Sequence[Any],
    config: Config,
    *,
    shards: Collection[int],
    bytes_ahead: int = 0,
    buckets: int = 0,
) -> Ledger:
    """Predict the memory of a training step on a rank from its graphs; the arguments are those of `ledger_of`."""
    forward, backward, values = halves.forward, halves.backward, halves.inputs
    sizes = [bytes_of_value(x) for x in values]
    is_state = [isinstance(x, torch.nn.Parameter | torch.nn.Buffer) or i in shards for i, x in enumerate(inputs)]
    trained = sum(size for size, x in zip(sizes, values, strict=True) if takes_gradient(x))
    fixed = {
        "parameters": sum(size for size, held in zip(sizes, is_state, strict=True) if held),
        "buckets": buckets,
        "optimizer": config.optimizer_states * trained,
        "inputs": sum(size for size, held in zip(sizes, is_state, strict=True) if not held),
    }
    moments = Timeline(forward.graph, forward_kinds(forward), workspace, never).run()
    phases = [largest("forward", moments, fixed, bytes_ahead)]
    if backward is not None:
        saved = saved_values(forward, backward)
        returned = returned_bytes(forward, saved, halves.num_outputs)
        late = sums_under_way(backward.graph, bytes_ahead) if bytes_ahead else {}
        moments = Timeline(backward.graph, backward_kinds(backward, saved), workspace, saved.__contains__, late).run()
        phases.append(largest("backward", moments, fixed | {"returned": returned}, bytes_ahead))
        phases.append(largest("optimizer", [Moment(None, {"gradients": trained})], fixed, 0))
    in_host = [value_of(node) for node in forward.graph.nodes if is_in_host_memory(node)]
    return Ledger(tuple(phases), sum(map(bytes_of_value, in_host)))


def fake_input(value: Any, given: Any, shard: ParameterShard | None) -> Any:
    """Return what the graph takes in the place of an input: a tensor that takes gradients where that one does."""
    if not isinstance(value, torch.Tensor):
        return value
    requires_grad = takes_gradient(given)
    if shard is not None:
        return torch.empty(
            shard.local_shape, dtype=shard.stored_dtype, device=value.device, requires_grad=requires_grad
        )
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device, requires_grad=requires_grad
    )


def takes_gradient(value: Any) -> bool:
    """Tell whether an input is a tensor that takes a gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def never(node: fx.Node) -> bool:
    """Tell that an input is not freed."""
    return False


def largest(name: str, moments: Sequence[Moment], fixed: Mapping[str, int], bytes_ahead: int) -> Phase:
    """Return the moment that holds most, with what is held all the time."""
    moment = max(moments, key=lambda m: m.total)
    held = dict(moment.held) | {"external": 0}
    if bytes_ahead:
        held["gathered parameters"] = held.get("gathered parameters", 0) + bytes_ahead
    total = {kind: fixed.get(kind, 0) + held.get(kind, 0) for kind in KINDS}
    place = "" if moment.node is None else source_place(moment.node)
    return Phase(name, {kind: size for kind, size in total.items() if size}, place)


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


def returned_bytes(forward: fx.GraphModule, saved: Collection[fx.Node], num_outputs: int) -> int:
    """Return the bytes of what the model returns, as far as nothing else holds it."""
    (output,) = forward.graph.find_nodes(op="output")
    names = {node.name for node in saved}
    kept = {root_of(node) for node in output.all_input_nodes if node.name in names}
    results = {root_of(node) for node in output.args[0][:num_outputs] if isinstance(node, fx.Node)}
    return sum(bytes_of(node) for node in results - kept if node.op == "call_function")


def backward_kinds(backward: fx.GraphModule, saved: Collection[fx.Node]) -> Callable[[fx.Node], str]:
    """Return what kind each stored value of a backward is of."""
    (output,) = backward.graph.find_nodes(op="output")
    returned = {root_of(node) for node in output.all_input_nodes}

    def kind(node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            is_incoming = node.name.startswith("tangents")
            return "saved" if node in saved else "temporary" if is_incoming else "external"
        if node in returned:
            return "gradients"
        if node.target is torch.ops.cpcompile.from_host.default:
            return "saved"
        return "gathered parameters" if is_gathered(node) else "temporary"

    return kind


def sums_under_way(graph: fx.Graph, limit: int) -> dict[fx.Node, fx.Node]:
    """Return whole gradients whose sum is waited for later than the graph says, with the node behind which they are freed.

    As `compile.overlap` orders it: the first sum under way is waited for once those behind it are more than `limit` bytes.
    """
    under_way: list[fx.Node] = []
    found = {}
    for node in graph.nodes:
        if "reduce_scatter_tensor" in str(node.target):
            under_way += map(root_of, node.all_input_nodes)
            while sum(map(bytes_of, under_way[1:])) > limit:
                found[under_way.pop(0)] = node
    return found


def is_gathered(node: fx.Node) -> bool:
    """Tell whether a value is a parameter that was gathered."""
    made_by = node.all_input_nodes[0] if node.target is operator.getitem else node  # parameters that travel together
    return "all_gather_into_tensor" in str(made_by.target)
