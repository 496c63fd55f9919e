"""Inner compiler: from the graph that Dynamo hands over to a callable that runs this rank's part."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.analysis.gradient_flow import needs_no_gradient
from cpcompile.capture.faults import faults_of
from cpcompile.capture.lowering import capture, placeholders
from cpcompile.capture.stages import stage
from cpcompile.choose.machine import Machine
from cpcompile.compile.attention_layers import name_layers
from cpcompile.compile.joined_transfers import join_transfers
from cpcompile.compile.layer_names import LayerNames
from cpcompile.compile.offload import move_to_host, note_tokens
from cpcompile.compile.outline_layers import outline_layers, pass_operands_by
from cpcompile.compile.overlap import overlapped
from cpcompile.compile.parameter_writes import keep_copy, return_parameter_writes
from cpcompile.compile.saved_results import is_recomputed, tag_saved_results, tags_of
from cpcompile.compile.transform import Transformed, transform
from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call, value_of
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.ir.plan import Lengths
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes import sum_gradients
from cpcompile.runtime.tiles.by_rows import function_of
from cpcompile.runtime.tiles.loss_body import body_of

INNER_REMEDY = (
    "The transformed program is right, but this compiler cannot compile it: inner='aot_eager' or 'eager' runs it without. "
    "Please report it with the error above; dynamic=False, which compiles each length by itself, may help as well."
)
COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd")
KEPT = (
    "inner='eager' computes nothing again in backward: activation checkpoints and reshard_after_forward change no result, but "
    "save no memory either. inner='inductor' and 'aot_eager' do as they say."
)
NOT_MOVED = (
    "offload=%r moves nothing to host memory: it moves what blocks keep that are computed again in backward, but for the last of "
    "them, and there are no two. Have blocks computed again: memory_budget=0, or torch.utils.checkpoint in the model "
    "(gradient_checkpointing_enable of transformers)."
)
cp = torch.ops.cpcompile
_log = logging.getLogger(__name__)
_ARGUMENT = re.compile(r"\['?(\w+)'?\]")


def input_names(gm: fx.GraphModule) -> dict[str, str]:
    """Return, for each placeholder that is an input of the model (no parameter, no buffer), the user's argument name.

    Dynamo's source of an input reads `L['input_ids']` or `L['kwargs']['input_ids']`; a positional one in
    `L['args'][0]` is called `args[0]`.
    """
    names: dict[str, str] = {}
    for node in placeholders(gm):
        text = _torch.source_name(node)
        if re.search(r"_parameters|_buffers|_modules|\.\w", text) or not text.startswith("L["):
            continue
        parts = _ARGUMENT.findall(text)
        names[node.name] = parts[-1] if not parts[-1].isdigit() else f"{parts[-2]}[{parts[-1]}]"
    return names


def transform_dynamo_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    config: Config,
    axis: Axis,
    shards: Mapping[int, ParameterShard] | None = None,
    machine: Machine | None = None,
) -> Transformed:
    """Capture and transform the graph of a whole model.

    `shards` says which inputs are parameters that FSDP shards, `machine` what costs are estimated for, by default this one.
    """
    with stage("sharding the graph"):
        captured = capture(gm, example_inputs)
        refuse_collectives(captured, axis)
        nodes = placeholders(captured)
        of_node = {nodes[i].name: shard for i, shard in (shards or {}).items()}
        return transform(
            captured, config=config, axis=axis, inputs=input_names(captured), shards=of_node, machine=machine
        )


def refuse_collectives(gm: fx.GraphModule, axis: Axis) -> None:
    """Refuse collectives of the model's own between ranks that share a sequence, each of which holds some of its tokens.

    Raises:
        NoRule: with the line of the first.
    """
    together = set(axis.ranks)
    for node in gm.graph.nodes:
        if getattr(node.target, "namespace", "") not in COLLECTIVES:
            continue
        for name in (x for x in node.args if isinstance(x, str) and x in _torch.group_names()):
            common = together & set(torch.distributed.get_process_group_ranks(_torch.resolve_group(name)))
            if len(common) > 1:
                raise NoRule(
                    f"{node.target} is a collective of the model's own between ranks {sorted(common)}, which share a sequence: "
                    f"each holds some of its tokens, and on one device there is no such thing.\n\n{where(node)}\n\n"
                    "Put experts, shards of weights or batches on another axis of the mesh than the context-parallel one."
                )


def compile_parts(gm: fx.GraphModule, options: Mapping[str, Any]) -> int:
    """Have Inductor compile what runs for some tokens after the other, and return how many there are.

    Values are still those of the whole model.
    """
    parts = [node for target in PARTS for node in gm.graph.find_nodes(op="call_function", target=target)]
    for number, node in enumerate(parts, 1):
        name, compile_part = PARTS[node.target]
        with stage(f"compiling {number} of {len(parts) + 1} ({name})"):
            compile_part(Call.of(node), options)
        node.args = (*node.args[:-1], True)
    gm.recompile()
    return len(parts)


def compile_chunked_loss(call: Call, options: Mapping[str, Any]) -> None:
    body = body_of(call["body"])
    if body.provider:
        return  # its kernels are its own
    hidden, weight = call.tensor("hidden"), call.tensor("weight")
    chunk = call["chunk"]  # kernels are chosen for as many tokens
    rows = [of_tokens(value_of(x), chunk) for x in call["rows"]]
    logits = hidden.new_empty(chunk, weight.shape[0])
    body.compile(logits, rows, [value_of(x) for x in call["others"]], options)


def compile_by_rows(call: Call, options: Mapping[str, Any]) -> None:
    first, *rest = call["rows"]
    rows = [
        value_of(first).new_empty(call["tile"], value_of(first).shape[-1]),
        *[of_tokens(value_of(x), call["tile"]) for x in rest],
    ]
    needs = [not needs_no_gradient(x) for x in (first, *rest, *call["others"])]
    function_of(call["function"]).compile(rows, [value_of(x) for x in call["others"]], needs, options)


PARTS = {
    cp.chunked_loss.default: ("a loss in chunks", compile_chunked_loss),
    cp.by_rows.default: ("an MLP by tiles", compile_by_rows),
}


def of_tokens(value: torch.Tensor, count: int) -> torch.Tensor:
    """Return a tensor like `value`, `[T, ...]`, of `count` tokens."""
    return value.new_empty(count, *value.shape[1:])


@functools.cache
def warn_of_kept_results() -> None:
    """Say, once, that a compiler does not do what was asked for."""
    _log.warning(KEPT)


def move_and_count(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, *, transformed: Transformed, offload: str
) -> None:
    """Have what blocks keep wait in host memory, and note how much does."""
    with transformed.counting(move_to_host.__name__) as count:
        count.places = move_to_host(forward, backward, num_outputs, offload=offload)


def move_or_tell(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, *, transformed: Transformed, offload: str
) -> None:
    """Have what blocks keep wait in host memory, or say that there is none."""
    move_and_count(forward, backward, num_outputs, transformed=transformed, offload=offload)
    if not transformed.changes[move_to_host.__name__]:
        warn_of_nothing_moved(offload)


@functools.cache
def warn_of_nothing_moved(offload: str) -> None:
    """Say, once, that nothing waits in host memory."""
    _log.warning(NOT_MOVED, offload)


def finish_graph(graph: fx.GraphModule, summed: Sequence[int], site: int) -> None:
    """Have the graph sum the gradients of its inputs `summed`, and return what it writes to parameters and document bounds."""
    return_parameter_writes(graph)
    keep_overwritten(graph)
    names = [node.name for node in placeholders(graph)]
    sum_gradients(graph, summed=[names[i] for i in summed], site=site)
    (output,) = graph.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *Lengths.bounds_of(graph)),)
    graph.recompile()


def keep_overwritten(graph: fx.GraphModule) -> None:
    """Have what reads a buffer that the model overwrites read a copy, which is kept for backward.

    Compilers compute small values again in backward from what they read, and by then the buffer has been overwritten.
    """
    writes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    for buffer in dict.fromkeys(write.args[0] for write in writes if write.args[0].op == "placeholder"):
        if annotation(buffer).takes_gradient:
            continue
        readers = [user for user in buffer.users if user not in writes or user.args[0] is not buffer]
        if not readers:
            continue
        copied = keep_copy(min(readers), buffer)
        buffer.replace_all_uses_with(copied, delete_user_cb=set(readers).__contains__)


def prepare_for_autograd(
    transformed: Transformed,
    config: Config,
    move: Callable[..., Any] = move_and_count,
    *,
    outlines: bool = False,
    units: Mapping[int, str] | None = None,
) -> tuple[_torch.JointPass, _torch.HalvesPass | None]:
    """Return what tells the compiler of forward and backward which results are kept, and which of them in host memory.

    Only inputs are left with values: those are of the whole model, and what runs here is local. `move` is `move_and_count`, or
    calls it. With `outlines`, equal layers become calls of one function. `units` says which inputs travel together.
    """
    graph = transformed.graph
    tags = tags_of(graph.graph)
    if config.offload != "none":
        note_tokens(graph.graph)
    name_layers(graph)
    if outlines:
        with transformed.counting(outline_layers.__name__) as count:
            count.places = outline_layers(graph)
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop("val", None)
    joint_pass = _torch.JointPass(keep_results, f"{tags} {outlines}")
    halves_passes = []
    if config.offload != "none":
        moving = functools.partial(move, transformed=transformed, offload=config.offload)
        halves_passes.append(_torch.HalvesPass(moving, config.offload))
    if units:
        # A layer that is one call has all its gradients at once.
        join = functools.partial(join_transfers, units=units, joins_sums=outlines)
        halves_passes.append(_torch.HalvesPass(join, repr((sorted(units.items()), outlines))))
    return joint_pass, _torch.HalvesPass.of(halves_passes)


def keep_results(graph: fx.Graph) -> None:
    """Say, on the graph of forward and backward, what is kept between the two."""
    tag_saved_results(graph)
    pass_operands_by(graph)
    _torch.rename_sizes(graph)


def compile_inner(
    transformed: Transformed,
    example_inputs: Sequence[Any],
    config: Config,
    summed: Sequence[int] = (),
    site: int = 0,
    shards: Mapping[int, ParameterShard] | None = None,
    bytes_ahead: int = 0,
) -> Callable[..., Any]:
    """Compile the transformed graph with the inner compiler. The gradients of its inputs `summed` are summed at `site`.
    `bytes_ahead` of parameters, those inputs that `shards` tells of, are gathered before they are used.

    Behind its own outputs it returns what it writes to parameters, `parameter_writes`, and where the documents begin that the
    layout follows; there are as many as `Lengths.bounds_of` finds.
    """
    graph = transformed.graph
    finish_graph(graph, summed, site)
    options = config.inductor_options
    num_parts = compile_parts(graph, options) if config.inner == "inductor" else 0
    if config.inner == "eager" and is_recomputed(graph.graph):
        warn_of_kept_results()
    layers = LayerNames(graph)
    shards = shards or {}
    units = {i: shard.unit for i, shard in shards.items()}
    joint_pass, halves_pass = prepare_for_autograd(
        transformed, config, move_or_tell, outlines=config.outlines, units=units
    )
    # The code that is generated names the layers, and the code of a graph does not.
    joint_pass = replace(joint_pass, key=f"{joint_pass.key} {layers.key}")
    if bytes_ahead and config.inner == "inductor":
        groups = frozenset(shard.group for shard in shards.values())
        options = _torch.OverlapPass(overlapped, bytes_ahead, groups).options | options
    program = f"compiling {num_parts + 1} of {num_parts + 1} (forward and backward)"
    with stage(program), faults_of(f"the inner compiler ({config.inner})", INNER_REMEDY):
        again = config.recompute_elementwise
        compiler = _torch.inner_compiler(config.inner, options, joint_pass, halves_pass, again, layers.marks())
        return compiler(graph, example_inputs)
