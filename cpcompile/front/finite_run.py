"""Finite run: a rank's graph operator by operator, ending on all ranks at the first value or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from cpcompile.compile.transform import Transformed
from cpcompile.errors import NotFiniteError, where
from cpcompile.front.held_tokens import HeldTokens
from cpcompile.front.rank_agreement import device_of, named
from cpcompile.inspect.not_finite import UNWRITTEN, is_meant, kind_of, name_of
from cpcompile.options.mesh import Axis
from cpcompile.runtime.tokens.show import summary

Tensor = torch.Tensor
cp = torch.ops.cpcompile
KINDS = ("", "infinite", "NaN")


class FiniteRun(fx.Interpreter):
    """Runs the transformed graph of a rank and compares, behind each operator and each of its gradients, what the ranks found."""

    def __init__(self, transformed: Transformed, axis: Axis) -> None:
        super().__init__(transformed.graph)
        self.extra_traceback = False  # the message has the user's line
        self._transformed, self._axis = transformed, axis
        self._kinds: dict[fx.Node, str] = {}
        self._bounds: dict[fx.Node, Tensor] = {}
        self._held: HeldTokens | None = None  # while it runs

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        """Return the outputs of the graph.

        Raises:
            NotFiniteError: a value of any rank is not finite. A gradient that is not ends backward with it.
        """
        self._kinds, self._bounds = {}, {}
        self._held = HeldTokens(self._transformed, self._axis.rank, inputs, self._bounds)
        try:
            return super().run(*inputs)
        finally:
            self._held = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, check what it computes, and have its gradient checked when that comes."""
        value = super().run_node(n)
        if n.target in UNWRITTEN:
            value.zero_()  # what is in new memory means nothing
        if n.target is cp.document_bounds.default:
            self._bounds[n] = value
        if n.op == "output" or not isinstance(value, Tensor) or not is_number(value):
            return value
        if n.op == "placeholder" and value.is_leaf and value.requires_grad:
            value = value.view_as(value)  # a hook of the user's own tensor would stay there
        assert self._held is not None, "it runs"
        held = self._held.of(n)
        kind = kind_of(held(value.detach()))
        if kind:
            self._kinds[n] = kind
        if kind == "infinite" and is_meant(n, self._kinds):
            kind = ""
        self._agree(kind, lambda: self._told_value(n, kind))
        if value.requires_grad and not any(user.target is cp.sum_gradient.default for user in n.users):
            self._check_gradient(n, value, held)
        return value

    def _check_gradient(self, node: fx.Node, value: Tensor, held: Callable[[Tensor], Tensor]) -> None:
        """Have the gradient of a value checked when backward has it."""
        users = [user for user in node.users if user.op != "output"]

        def check(grad: Tensor | None) -> None:
            kind = "" if grad is None else kind_of(held(grad))
            self._agree(kind, lambda: told_gradient(node, users, kind))

        value.register_hook(check)  # type: ignore[no-untyped-call]

    def _agree(self, kind: str, text: Callable[[], str]) -> None:
        """Tell the other ranks of the axis what this one found. Collective.

        Raises:
            NotFiniteError: one of them found something, which all raise.
        """
        found = KINDS.index(kind)
        if self._axis.world_size == 1:
            if found:
                raise NotFiniteError(text())
            return
        group, device = self._axis.process_group, device_of(self._axis)
        most = torch.tensor(found, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        if not int(most):
            return
        texts: list[str | None] = [None] * self._axis.world_size
        dist.all_gather_object(texts, text() if found else None, group=group)
        ranks = [rank for rank, of_rank in enumerate(texts) if of_rank is not None]
        raise NotFiniteError(f"{named(ranks)} of {self._axis.world_size}: {texts[ranks[0]]}")

    def _told_value(self, node: fx.Node, kind: str) -> str:
        made = "an input" if node.op == "placeholder" else str(node.target)
        operands = [
            f"  {name_of(x)}: {summary(self.env[x])}"
            for x in node.all_input_nodes
            if isinstance(self.env.get(x), Tensor)
        ]
        of_what = "\n".join(["", "It is computed from", *operands]) if operands else ""
        return f"the value of {name_of(node)} ({made}) is {kind}.\n\n{where(node)}\n{of_what}"


def told_gradient(node: fx.Node, users: list[fx.Node], kind: str) -> str:
    """Return where a gradient stops being finite: in backward of what uses the value."""
    source = (
        node.args[0] if node.target is cp.sum_gradient.default else node
    )  # of a parameter, before the ranks add theirs
    assert isinstance(source, fx.Node)
    head = f"the gradient of {name_of(source)} is {kind}"
    if not users:
        return f"{head}, and no operator of the model makes it: the caller's own objective does.\n\n{where(node)}"
    places = "\n".join(dict.fromkeys(where(user) for user in users))
    return f"{head}, which backward of {' or '.join(map(name_of, users))} makes of finite gradients.\n\n{places}"


def is_number(x: Tensor) -> bool:
    """Tell whether a tensor holds numbers that may be no numbers."""
    return x.is_floating_point() or x.is_complex()
