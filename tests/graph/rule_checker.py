"""A rule is right when an operator run whole equals the operator run by every rank on its own tokens, gradients included.

The operator is put into a graph of its own, placed by the real passes, and run for all ranks in lockstep.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.errors import NoRule
from cpcompile.inspect.lockstep import Lockstep, whole_value
from cpcompile.inspect.model_runs import token_orders
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.passes.place_tokens import Placer
from cpcompile.passes.rewrite_attention import rewrite_attention
from cpcompile.passes.rewrite_reductions import rewrite_reductions

cp = torch.ops.cpcompile


class WrongRuleError(AssertionError):
    """A rule that does not hold."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an operator, on whole tensors."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    has_values: bool = True  # False: the result is uninitialised memory
    strategy: str = ""  # how an attention is computed
    buffers: tuple[int, ...] = ()  # tensor operands without gradients


@dataclass(frozen=True, slots=True)
class Setting:
    """How the sequence is sharded."""

    length: int
    world_size: int
    layout: str

    @property
    def order(self) -> TokenOrder:
        """The tokens of all ranks."""
        return TokenOrder.of(self.length, self.world_size, self.layout)


def is_member_list(argument: object) -> bool:
    return isinstance(argument, list | tuple) and any(isinstance(member, torch.Tensor) for member in argument)


class Program:
    """A graph of one operator, whose tensor operands are its inputs."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting = case, setting
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.inputs: list[torch.Tensor] = []
        names = iter(range(100))

        def placeholder(x: torch.Tensor) -> fx.Node:
            node = self.graph.placeholder(f"x{next(names)}")
            node.meta["val"] = self.fake(x)
            self.inputs.append(x)
            return node

        def bind(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                return placeholder(argument)
            if is_member_list(argument):
                return [placeholder(m) if isinstance(m, torch.Tensor) else m for m in argument]
            return argument

        args = tuple(bind(a) for a in case.args)
        kwargs = {name: bind(a) for name, a in case.kwargs.items()}
        self.node = self.graph.call_function(case.target, args, kwargs)
        self.whole = self.run_whole(self.inputs)
        values = [self.fake(x) for x in self.whole]
        self.node.meta["val"] = tuple(values) if self.is_tuple else values[0]
        self.outputs = [self.node]
        if self.is_tuple:
            self.outputs = [self.graph.call_function(operator.getitem, (self.node, i)) for i in range(len(self.whole))]
            for node, value in zip(self.outputs, values, strict=True):
                node.meta["val"] = value
        self.graph.output(tuple(self.outputs))
        self.gm = fx.GraphModule({}, self.graph)
        self.lengths = Lengths(setting.length, setting.length, local_length(*self.axis))
        self.gm.meta["cpcompile_lengths"] = (self.lengths,)
        if case.strategy:
            annotate(self.node, strategy=case.strategy)

    def fake(self, x: Any) -> Any:
        return self.mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

    @property
    def axis(self) -> tuple[int, int, str]:
        return self.setting.length, self.setting.world_size, self.setting.layout

    @property
    def orders(self) -> list[TokenOrder | Arrangement]:
        """Which elements each rank holds, of the tokens and of what they were exchanged for."""
        return token_orders(self.gm, Plan(self.setting.world_size, "", self.setting.layout, {}))

    def run_whole(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the operator on whole tensors; operands that it writes are copied first."""
        copies = iter([x.clone() for x in inputs])

        def bound(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                return next(copies)
            if is_member_list(argument):
                return [next(copies) if isinstance(m, torch.Tensor) else m for m in argument]
            return argument

        args = [bound(a) for a in self.case.args]
        result = self.case.target(*args, **{name: bound(a) for name, a in self.case.kwargs.items()})
        self.is_tuple = isinstance(result, tuple | list)
        return list(result) if self.is_tuple else [result]

    def shard(self, operand: fx.Node, at: Sharded) -> fx.Node:
        with self.graph.inserting_before(self.node):
            arguments = (
                operand,
                at.dim,
                at.inner,
                self.setting.length,
                self.setting.layout,
                self.setting.world_size,
                "",
            )
            node = self.graph.call_function(cp.shard_tokens.default, arguments)
        node.meta["val"] = operand.meta["val"]
        annotate(node, placement=at)
        return node

    def placer(self) -> Placer:
        plan = Plan(self.setting.world_size, "", self.setting.layout, {})
        return Placer(self.gm, plan, {})

    def push(self, sharded: Mapping[str, Sharded]) -> None:
        """Shard these operands and let the rule place the rest. Raises `NoRule`."""
        call = Call.of(self.node)
        changes = {name: self.shard(node, sharded[name]) for name, node in call.operands() if name in sharded}
        self.node.args, self.node.kwargs = call.rebound(changes)
        placer = self.placer()
        for node in (self.node, *(self.outputs if self.is_tuple else ())):
            placer.place(node)
        placer.refuse()
        rewrite_reductions(self.gm, plan=placer.plan)
        rewrite_attention(self.gm, plan=placer.plan)

    def pull(self, wanted: Sharded) -> bool:
        """Ask for the tokens of the result; tells whether the rule computes them from tokens of the operands."""
        placer = self.placer()
        if placer.localiser.pull(self.node, wanted) is None:
            return False
        (output,) = self.graph.find_nodes(op="output")
        output.args = ((placer.localiser.localise(self.node, wanted),),)
        return True

    def check(self) -> None:
        """Compare what the ranks hold together with the whole result, and the gradients of both."""
        (output,) = self.graph.find_nodes(op="output")
        placements = [annotation(node).placement for node in output.args[0]]
        leaves, whole_leaves = (
            [leaf(x, i not in self.case.buffers) for i, x in enumerate(self.inputs)] for _ in range(2)
        )
        self.gm.recompile()
        results = Lockstep(self.gm, self.setting.world_size).run(*leaves)
        whole = self.run_whole(whole_leaves)
        found = [
            whole_value([rank[i] for rank in results], placement, self.orders) for i, placement in enumerate(placements)
        ]
        for value, expected in zip(found, whole, strict=False):
            require(value.shape == expected.shape, f"shape {list(value.shape)} is not {list(expected.shape)}")
            require(value.dtype == expected.dtype, f"{value.dtype} is not {expected.dtype}")
            if self.case.has_values:
                require(is_close(value, expected), f"values differ: {placements}")
        if self.case.has_values:
            compare_gradients(found, leaves, whole, whole_leaves)


def leaf(x: torch.Tensor, is_differentiable: bool) -> torch.Tensor:
    return x.detach().clone().requires_grad_(is_differentiable and x.is_floating_point())


def require(condition: bool, text: str) -> None:
    if not condition:
        raise WrongRuleError(text)


def is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    is_exact = not (a.is_floating_point() or a.is_complex())
    return torch.equal(a, b) if is_exact else torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


def gradients(results: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor | None] | None:
    """Return the gradients of a fixed projection of the results, or None when torch has none."""
    generator = torch.Generator().manual_seed(0)
    results = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in results]
    terms = [
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
        for x in results
        if x.is_floating_point() and x.requires_grad
    ]
    wanted = [x for x in leaves if x.requires_grad]
    if not terms or not wanted:
        return None
    try:
        return list(torch.autograd.grad(torch.stack(terms).sum(), wanted, allow_unused=True))
    except RuntimeError as error:
        if "not implemented" in str(error) or "not differentiable" in str(error) or "derivative for" in str(error):
            return None
        raise


def compare_gradients(
    found: list[torch.Tensor], leaves: list[torch.Tensor], whole: list[torch.Tensor], whole_leaves: list[torch.Tensor]
) -> None:
    expected = gradients(whole[: len(found)], whole_leaves)
    if expected is None:
        return
    actual = gradients(found, leaves)
    require(actual is not None, "the ranks have no gradient")
    assert actual is not None
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        a, b = torch.broadcast_tensors(a, b.to(a.dtype))
        require(is_close(a, b), f"gradient {i} differs")


def token_places(x: torch.Tensor, length: int) -> Iterator[Sharded]:
    """Yield every way in which `x` may hold the tokens: in any dim that they divide, with any factor inside."""
    for dim, size in enumerate(x.shape):
        if size and size % length == 0:
            rest = size // length
            yield from (Sharded(dim, inner) for inner in range(1, rest + 1) if rest % inner == 0)


def check_push(case: Case, setting: Setting, sharded: Mapping[str, Sharded]) -> bool:
    """Check one push; tells whether the rule accepted it. Raises `WrongRuleError`."""
    program = Program(case, setting)
    try:
        program.push(sharded)
    except NoRule:
        return False
    settled(program, f"push of {case.target} with {sharded} in {setting}")
    return True


def check_pull(case: Case, setting: Setting, wanted: Sharded) -> bool:
    """Check one pull; tells whether the rule accepted it. Raises `WrongRuleError`."""
    program = Program(case, setting)
    if program.is_tuple or not program.pull(wanted):
        return False
    settled(program, f"pull of {case.target} for {wanted} in {setting}")
    return True


def settled(program: Program, what: str) -> None:
    """Run the check of a program; whatever goes wrong is the rule's fault."""
    shapes = [list(x.shape) for x in program.inputs]
    try:
        program.check()
    except WrongRuleError as error:
        raise WrongRuleError(f"{what}, operands {shapes}: {error}") from None
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WrongRuleError(f"{what}, operands {shapes}: {type(error).__name__}: {error}") from error


def check_case(case: Case, setting: Setting) -> int:
    """Check every push of one, two or the first three operands and every pull; return how many the rule accepted."""
    program = Program(case, setting)
    places = {
        name: list(token_places(node.meta["val"], setting.length)) for name, node in Call.of(program.node).operands()
    }
    accepted = sum(check_push(case, setting, {name: at}) for name, ats in places.items() for at in ats)
    for (a, ats), (b, bts) in itertools.combinations(places.items(), 2):
        accepted += sum(check_push(case, setting, {a: at, b: bt}) for at in ats for bt in bts)
    first = dict(itertools.islice(places.items(), 3))
    if len(first) == 3:
        common = [at for at in first[next(iter(first))] if all(at in ats for ats in first.values())]
        accepted += sum(check_push(case, setting, dict.fromkeys(first, at)) for at in common)
    if isinstance(program.whole[0], torch.Tensor):
        accepted += sum(check_pull(case, setting, at) for at in token_places(program.whole[0], setting.length))
    return accepted
