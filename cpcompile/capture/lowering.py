"""Lowering: the graph that Dynamo hands to a backend becomes the pre-dispatch ATen graph that the passes work on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from cpcompile import _torch
from cpcompile.capture.block_masks import unread_nodes
from cpcompile.capture.checkpoint_policies import ask_policies
from cpcompile.capture.faults import faults_of
from cpcompile.capture.writes.aliases import same_layout, storages
from cpcompile.errors import TORCH, CPError, GraphBreakError, where
from cpcompile.ir.annotation import annotate
from cpcompile.ir.operator_call import value_of
from cpcompile.runtime import own_backward  # noqa: F401  (registers the operators)

FLASH_REMEDY = (
    "This is the package flash-attn: use attn_implementation='sdpa' (packed documents are read from position_ids, or from "
    "cu_seq_lens_q with documents='cu_seqlens'). cpcompile runs its kernels itself, with kernel='flash_attn'."
)

LEAF_REMEDY = (
    "Gradients of parameters do not need this call: leave it out (model.disable_input_require_grads() in transformers), or do "
    "not return the value (output_hidden_states=False)."
)
REENTRANT_REMEDY = (
    "Use use_reentrant=False (CheckpointImpl.NO_REENTRANT), or let its inputs take gradients (model.enable_input_require_grads() "
    "in transformers)."
)
FSDP_REMEDY = (
    "The model, or a part of it, is wrapped by fully_shard, whose hooks do not trace. Use cpcompile.apply(model, mesh), before "
    "or after fully_shard: it takes the sharded parameters over. If fully_shard came after the first call of the model, call "
    "cpcompile.remove(model) and apply it again; torch.compile(backend='cpcompile') takes models without it."
)
POSITIONS_REMEDY = (
    "Pass position_ids. In transformers: model.model.get_rope_index(input_ids, mm_token_type_ids=..., image_grid_thw=..., "
    "attention_mask=...)[0], before the call."
)
BRANCH = re.compile(r"\b(if|elif|while)\b")
BRANCH_REMEDY = (
    "This line decides by values which operators run, and ranks hold the values of other tokens. Write "
    "torch.where(condition, a, b), which computes both sides, or move the decision out of the model. torch.cond takes what every "
    "rank holds whole (a loss), not tokens."
)
BREAK_REMEDY = (
    "A part of a model cannot be sharded safely. Change this line so that it traces, or move the call out of the model "
    "(torch.compile(model, fullgraph=True) shows the full explanation)."
)
VALUES_REMEDY = (
    "If the number follows from sizes, dynamic=False traces it: sizes are known then. If it follows from the values of an "
    "input (grids or sizes of images), constants=['image_grid_thw'] makes these known, and compiles each combination."
)
VALUE_SIZE = "a size depends on the values of a tensor, which Dynamo loses"

_KEPT_INPUT_META = ("tensor_dict", "grapharg")


@faults_of("the capture")
def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Return `gm` as ATen before dispatch, with the same inputs in the same order.

    Every node carries `stack_trace`, `nn_module_stack` and `val`. Raises `GraphBreakError` when `gm` is a
    part of the model, and `CPError` for checkpoints whose policy cannot be asked and for gradients of the model's own.
    """
    reason = _torch.dynamo_break_reason(gm)
    if reason is not None:
        raise GraphBreakError(describe_break(reason))
    refuse_flash_attention(gm)
    refuse_returned_leaves(gm)
    refuse_lost_gradients(gm)
    mode, inputs = _torch.fake_inputs(example_inputs)
    try:
        traced, policies = _torch.trace_pre_dispatch(gm, mode, inputs, unread_nodes(gm))
    except _torch.TransformError as error:
        raise CPError(
            f"a transform of torch.func (torch.vmap, torch.func.grad, ...) cannot be traced: {error.reason}.\n\n"
            f"{where(error.node)}\n\nWrite this with operators on whole tensors."
        ) from None
    ask_policies(traced, policies, mode, inputs)
    for new, old, given in zip(placeholders(traced), placeholders(gm), example_inputs, strict=True):
        new.name = old.name
        annotate(new, takes_gradient=isinstance(given, torch.Tensor) and given.requires_grad)
        new.meta.update({key: old.meta[key] for key in _KEPT_INPUT_META if key in old.meta})
    refuse_untraced_tensors(traced)
    # Flex attention holds the functions of its scores as graphs inside the graph.
    for graph in (module for module in traced.modules() if isinstance(module, fx.GraphModule)):
        drop_metadata_asserts(graph)
        detach_out_of_place(graph)
        drop_own_memory(graph)
        graph.recompile()
    return traced


def refuse_untraced_tensors(gm: fx.GraphModule) -> None:
    """Refuse a graph that holds a tensor which exists only while tracing: it has no value.

    Raises:
        CPError: with the user's line.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if isinstance(value, torch.Tensor) and _torch.is_only_traced(value):
            user = next(iter(node.users), node)
            raise CPError(
                f"{user.target} reads a tensor that cannot be followed through the model.\n\n{where(user)}\n\n"
                "No trace sees what made it: compute it with operators on tensors, outside the model, or use another "
                "implementation of the layer."
            )


def refuse_flash_attention(gm: fx.GraphModule) -> None:
    """Refuse a call of the package flash-attn that takes gradients: its kernels see the tokens of one rank only.

    Raises:
        CPError: with the user's line.
    """
    for graph in (module for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in graph.graph.nodes:
            is_flash = _torch.is_own_function(node.target) and "flash_attn" in (node.meta.get("stack_trace") or "")
            if is_flash and any(
                getattr(given.meta.get("example_value"), "requires_grad", False) for given in node.all_input_nodes
            ):
                raise CPError(f"flash-attn attends to the tokens of one rank only.\n\n{where(node)}\n\n{FLASH_REMEDY}")


def refuse_returned_leaves(gm: fx.GraphModule) -> None:
    """Refuse to return a value that the model made a leaf of autograd: its `.grad` would stay empty.

    Raises:
        CPError: with the user's line.
    """
    (output,) = gm.graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        if _torch.is_new_leaf(node):
            raise CPError(
                "the model returns a value on which it calls requires_grad_(), whose .grad would stay empty.\n\n"
                f"{where(node)}\n\n{LEAF_REMEDY}"
            )


def refuse_lost_gradients(gm: fx.GraphModule) -> None:
    """Refuse a reentrant checkpoint whose parameters get no gradients on one device, since none of its inputs takes any.

    Raises:
        CPError: with the user's line.
    """
    for node in gm.graph.find_nodes(op="call_function", target=tag_activation_checkpoint):
        takes = [x for x in node.all_input_nodes if getattr(x.meta.get("example_value"), "requires_grad", False)]
        given = [getattr(x.meta.get("grapharg"), "example", None) for x in takes]
        is_lost = bool(given) and all(isinstance(x, torch.nn.Parameter) for x in given)
        if is_lost and node.kwargs.get("use_reentrant") and torch.is_grad_enabled():
            raise CPError(
                "no input of a reentrant activation checkpoint takes gradients, so that on one device its parameters get "
                f"none.\n\n{where(node)}\n\n{REENTRANT_REMEDY}"
            )


def describe_break(reason: Any) -> str:
    """Return the text for a graph that Dynamo ended early, with the user's line."""
    return break_text(str(reason.reason), reason.user_stack)


def break_text(reason: str, stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the text for a graph break: why, the innermost line outside torch, and what to do."""
    if "FSDP" in reason:
        return FSDP_REMEDY
    if any(frame.name == "get_rope_index" for frame in stack):
        return f"Positions of images are counted by a loop, which does not trace.{line_of(stack)}\n\n{POSITIONS_REMEDY}"
    return (
        f"The model does not trace as one graph: {reason.splitlines()[0].rstrip('.')}.{line_of(stack)}\n\n"
        f"{break_remedy(reason, stack)}"
    )


def break_remedy(reason: str, stack: Sequence[traceback.FrameSummary]) -> str:
    """Return what to do about a graph break."""
    is_of_value = "ata-dependent" in reason or reason == VALUE_SIZE
    is_branch = is_of_value and BRANCH.search(line_of(stack)) is not None
    remedy = BRANCH_REMEDY if is_branch else BREAK_REMEDY
    return f"{remedy} {VALUES_REMEDY}" if is_of_value else remedy


def line_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return a paragraph with the innermost line outside torch, or ''."""
    frames = [frame for frame in stack if not frame.filename.startswith(TORCH)] or list(stack)
    return f"\n\n  {frames[-1].line or '':<60} {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs of the graph."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def drop_metadata_asserts(gm: fx.GraphModule) -> None:
    """Remove the checks of dtype and device that tracing leaves: they hold of any shard, and pin nothing else."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)


def detach_out_of_place(gm: fx.GraphModule) -> None:
    """Make `detach_` a `detach`: it changes no data, and what comes after it in the graph already reads its result.

    Before torch 2.13 every tensor made from a number in the model is traced with one.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.target = torch.ops.aten.detach.default


def drop_own_memory(gm: fx.GraphModule) -> None:
    """Remove what puts a tensor's own memory under it, as `x.data += y` does behind its sum."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.set_.source_Tensor):
        x, source = node.args
        if storages(x) == storages(source) and same_layout(value_of(x), value_of(source)):
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
