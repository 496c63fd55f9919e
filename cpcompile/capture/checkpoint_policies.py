"""Checkpoint policies: what selective activation checkpoints save, asked of their policies operator by operator.

A policy (`create_selective_checkpoint_contexts`) is asked in eager mode about each operator below autograd when it runs, in
order, and may count them. So the operators of a checkpoint are run once, in order, on fake values.

Attention is one operator here, whatever kernel computes it. Where a policy saves any kernel of attention, it is asked about
that one, once for each attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile import _torch
from cpcompile.errors import CPError, where
from cpcompile.ir.checkpoint_answers import set_answers

aten, higher_order = torch.ops.aten, torch.ops.higher_order

# Nodes that are attention, or may be: what policies call it below, or as torch.compile shows it to them.
ATTENTIONS = (aten.scaled_dot_product_attention.default, higher_order.flex_attention)
KERNELS = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
    *ATTENTIONS,
)
SAVES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)

ContextFn = Callable[[], Any]


def ask_policies(gm: fx.GraphModule, policies: Mapping[int, ContextFn], mode: Any, inputs: Sequence[Any]) -> int:
    """Note on each node what the policy of its checkpoint says, and return how many nodes were asked about.

    Args:
        gm: a captured graph, whose nodes have the number of their checkpoint (`ac_graph_id`).
        policies: the `context_fn` of checkpoints, by number.
        mode: the fake mode of the graph.
        inputs: what the placeholders were traced with.

    Raises:
        CPError: contexts that ask no policy, a policy that fails, or that moves results to the host; with the user's line.
    """
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)) if policies else {}
    count = 0
    for number, context_fn in policies.items():
        nodes = [node for node in gm.graph.nodes if node.meta.get("ac_graph_id") == number and node.op != "get_attr"]
        if nodes:
            _Region(gm, context_fn, nodes, mode, given).ask()
        count += len(nodes)
    return count


class _Region:
    """The nodes of one checkpoint."""

    def __init__(
        self, gm: fx.GraphModule, context_fn: ContextFn, nodes: list[fx.Node], mode: Any, given: Mapping[fx.Node, Any]
    ) -> None:
        self.gm, self.context_fn, self.nodes, self.mode, self.given = gm, context_fn, nodes, mode, given
        self.policy = self._new_policy()
        outside = {x for node in nodes for x in node.all_input_nodes} - set(nodes)
        with mode:
            self.values = {node: self._traced(node) for node in (*outside, *filter(is_not_run, nodes))}

    def _new_policy(self) -> _torch.Policy:
        try:
            return _torch.Policy(self.context_fn)
        except _torch.NoPolicyError:
            raise CPError(
                "an activation checkpoint has a context_fn that asks no policy, so that what it does cannot be known.\n\n"
                f"{where(self.nodes[0])}\n\nReturn torch.utils.checkpoint.create_selective_checkpoint_contexts(policy) from it."
            ) from None

    def ask(self) -> None:
        """Run all nodes in order."""
        with self.policy.asking(self.mode):
            for node in self.nodes:
                self.policy.answers.clear()
                try:
                    self._run(node)
                except _torch.PolicyFailedError as error:
                    raise CPError(
                        f"the policy of an activation checkpoint fails: {type(error.__cause__).__name__}: {error.__cause__}\n\n"
                        f"{where(node)}\n\nPolicies are asked once, when the model is compiled, with tensors that have no values."
                    ) from error.__cause__
                refuse_offloading(node, self.policy.answers)
                set_answers(node, self.policy.answers)

    def _run(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        kernel = self._saved_kernel(args, kwargs) if node.target in ATTENTIONS else None
        if kernel is not None or isinstance(node.target, torch._ops.HigherOrderOperator):
            self.policy.ask(kernel or node.target, *args, **kwargs)
        else:
            assert callable(node.target)
            self.values[node] = node.target(*args, **kwargs)

    def _saved_kernel(self, args: Any, kwargs: Any) -> Any | None:
        """Return the kernel of attention that the policy saves, at least every other time, or None."""
        for kernel in KERNELS:
            policy = self._new_policy()  # with counters of its own
            if any(policy.ask(kernel, *args, **kwargs) in SAVES for _ in range(2)):
                return kernel
        return None

    def _traced(self, node: fx.Node) -> Any:
        """Return the value that a node was traced with: no leaf, and with gradients as far as it is known."""
        if node.op == "get_attr":
            return getattr(self.gm, str(node.target))

        def recorded(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            requires_grad = getattr(self.given.get(node), "requires_grad", value.is_floating_point())
            return value.detach().requires_grad_(requires_grad).view_as(value)

        return torch.utils._pytree.tree_map(recorded, node.meta["val"])


def is_not_run(node: fx.Node) -> bool:
    """Tell whether a node may not run here: those that hold functions would trace them, and attention need not."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) or node.target in ATTENTIONS


def refuse_offloading(node: fx.Node, answers: Sequence[tuple[Any, CheckpointPolicy]]) -> None:
    """Refuse a policy that moves results to the host.

    Raises:
        CPError: with the operator and the user's line.
    """
    for target, answer in answers:
        if answer.name.endswith("CPU_OFFLOAD"):
            raise CPError(
                f"the policy of an activation checkpoint answers {answer.name} for {target}: results cannot be moved to the host "
                f"and back.\n\n{where(node)}\n\nAnswer MUST_SAVE, or PREFER_RECOMPUTE."
            )
