"""Model runs: run and differentiate a model here, as it is or as all of its ranks in lockstep."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.capture.dynamo import token_length
from cpcompile.capture.lowering import capture
from cpcompile.compile.inner import input_names
from cpcompile.compile.transform import Transformed, transform
from cpcompile.errors import InputError, VerificationError, where
from cpcompile.inspect.float64 import widen_graph
from cpcompile.inspect.lockstep import Lockstep, whole_value, written_inputs
from cpcompile.ir.operator_call import Call, size_hint
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes.finish_outputs import output_placements

aten = torch.ops.aten


@contextlib.contextmanager
def seeded(model: torch.nn.Module) -> Iterator[None]:
    """Begin with the same random numbers each time; leave the generators as they were."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield


def run_and_differentiate(
    model: torch.nn.Module,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    objective: Callable[[Any], torch.Tensor],
    config: Config | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the objective and the gradient of every parameter that requires one; leaves `.grad` as it was."""
    before = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    try:
        if config is not None:
            token_length(inputs, config, mark_dynamic=config.dynamic)
        loss = objective(forward(**inputs))
        _torch.run_backward(loss)
        zeros = {
            name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        }
        return loss.detach(), zeros | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finally:
        for name, p in model.named_parameters():
            p.grad = before[name]


class Objective:
    """The scalar that is differentiated: a function of the output that the user gives, or `default_objective`.

    Attributes:
        stand_in: what stands for the loss that the last output did not have, '' where there was one.
    """

    def __init__(self, function: Callable[[Any], torch.Tensor] | None = None) -> None:
        self.function, self.stand_in = function, ""

    def __call__(self, output: Any) -> torch.Tensor:
        if self.function is not None:
            return self.function(output)
        tensors = {} if loss_in(output) is not None else differentiable(output)
        shapes = [f"{name} {list(x.shape)}" for name, x in tensors.items()]
        self.stand_in = f"a fixed random projection of {', '.join(shapes)}" if shapes else ""
        return default_objective(output)


def default_objective(output: Any) -> torch.Tensor:
    """Return the loss of a model output, or a fixed random projection of its floating-point tensors.

    Raises:
        InputError: there is neither.
    """
    loss = loss_in(output)
    if loss is not None:
        return loss
    tensors = differentiable(output)
    if not tensors:
        raise InputError(
            f"the model returns nothing to differentiate ({type(output).__name__}): no floating-point tensor that depends on a "
            "parameter, or on an input that requires a gradient."
        )
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [(x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in tensors.values()]
    ).sum()


def loss_in(output: Any) -> torch.Tensor | None:
    """Return what a model output calls its loss, or the only number that it is; None if there is neither."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    tensors = list(differentiable(output).values())
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 0 else None


def differentiable(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model output that have a gradient, by their place in it."""
    leaves = torch.utils._pytree.tree_leaves_with_path(output)
    return {
        re.sub(r"\W+", " ", torch.utils._pytree.keystr(path)).strip() or "the output": x
        for path, x in leaves
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad
    }


class LockstepBackend:
    """A Dynamo backend that runs all ranks in lockstep and hands the joined outputs back to the model's own code.

    After `aim`, the next run is of the same graph, transformed again. Why a graph cannot be transformed is raised when it runs:
    what Dynamo traced stays.
    """

    def __init__(self, config: Config, axis: Axis, is_wide: bool) -> None:
        self.config, self.axis, self.is_wide = config, axis, is_wide
        self.captured: fx.GraphModule | None = None
        self.transformed: Transformed | None = None
        self._make: Callable[[], Transformed] | None = None
        self._traced_with: Sequence[Any] = ()
        self.inputs: tuple[Any, ...] = ()  # of the last run, as they were before it
        self._held: list[list[torch.Tensor]] = []  # what each rank has of results and of inputs that it wrote

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.captured = captured = capture(gm, example_inputs)
        if not self.config.exact_dropout:
            refuse_dropout(captured)
        if self.is_wide:
            widen_graph(captured)
        names, compilation = input_names(captured), _torch.this_compilation()
        self._traced_with = example_inputs  # what the graph knows of them ends with them

        def make() -> Transformed:
            with compilation():
                gm = copy.deepcopy(captured)
                transformed = transform(gm, config=self.config, axis=self.axis, inputs=names)
            refuse_noise(transformed.graph)
            return transformed

        self.transformed, self._make = None, make
        return self._run

    def aim(self, config: Config, axis: Axis) -> None:
        """Let the next run be that of another axis, or of options that do not matter before the passes."""
        self.config, self.axis, self.transformed = config, axis, None

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        if self.transformed is None:
            assert self._make is not None
            self.transformed = self._make()
        graph = self.transformed.graph
        written = written_inputs(graph)
        placeholders = graph.graph.find_nodes(op="placeholder")
        self.inputs = tuple(x.clone() if node in written else x for node, x in zip(placeholders, inputs, strict=True))
        lockstep = Lockstep(graph, self.axis.world_size)
        outputs = lockstep.run(*inputs)
        self._held = [[value.detach() for value in values] for values in lockstep.written.values()]
        orders = orders_of(self.transformed, inputs, lockstep)
        joined = []
        for placement, *values in zip(output_placements(graph), *outputs, strict=True):
            if isinstance(placement, Sharded):
                joined.append(whole_value(values, placement, orders))
            else:
                is_trained = isinstance(placement, Full) and values[0].requires_grad
                joined.append(_OfFirstRank.apply(*values) if is_trained else values[0])  # type: ignore[no-untyped-call]
                if isinstance(placement, Full):
                    self._held.append([joined[-1].detach(), *(value.detach() for value in values[1:])])
        return tuple(joined)

    def of_ranks(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what each rank holds of a result of the last run, or of a buffer; `x` is that of the first."""
        return next((held for held in self._held if held[0].is_set_to(x)), [x])


class _OfFirstRank(torch.autograd.Function):
    """The value of the first rank; every rank back-propagates its own."""

    @staticmethod
    def forward(ctx: Any, *values: torch.Tensor) -> torch.Tensor:
        ctx.num_ranks = len(values)
        return values[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads * ctx.num_ranks


class OneDevice:
    """A Dynamo backend that runs the program of one device in which documents are separated, as the option `documents` says."""

    def __init__(self, config: Config, is_wide: bool) -> None:
        # How ranks would share the work is not asked here.
        self.config, self.is_wide = replace(config, strategy="auto", balancer="auto"), is_wide

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        if self.is_wide:
            widen_graph(captured)
        axis, names = Axis.in_process(1), input_names(captured)
        return transform(captured, config=self.config, axis=axis, inputs=names).original


def orders_of(transformed: Transformed, inputs: Sequence[Any], lockstep: Lockstep) -> list[TokenOrder | Arrangement]:
    """Return which tokens each rank holds of each sequence of these flat inputs, which the ranks have started to run."""
    given = sequence_lengths(transformed, inputs)  # of none in a graph without tokens, where no value needs an order
    return token_orders(transformed.graph, transformed.plan, given, lockstep.bounds)


def token_orders(
    gm: fx.GraphModule,
    plan: Plan,
    given: Sequence[int] = (),
    bounds: Mapping[fx.Node, torch.Tensor] = MappingProxyType({}),
) -> list[TokenOrder | Arrangement]:
    """Return which tokens each rank holds of each sequence of a graph; `given` are the lengths of the first ones.

    What a model makes of its sequences is as long as it was when it was compiled.
    """
    orders: list[TokenOrder | Arrangement] = []
    for number, lengths in enumerate(Lengths.all_of(gm)):
        tokens = given[number] if number < len(given) else size_hint(lengths.value)
        if lengths.parts:
            parts = tuple((orders[sequence].length, elements) for sequence, elements in lengths.parts)
            orders.append(Arrangement(parts, plan.world_size, plan.layout))
        else:
            found = None if lengths.bounds is None else bounds.get(lengths.bounds)
            orders.append(TokenOrder.of(tokens, plan.world_size, lengths.layout or plan.layout, found))
    return orders


def sequence_lengths(transformed: Transformed, inputs: Sequence[Any]) -> list[int]:
    """Return the number of tokens of each sequence in these flat inputs."""
    names = [node.name for node in transformed.graph.graph.find_nodes(op="placeholder")]
    of_sequence: dict[int, int] = {}
    for name, sequence in transformed.sequences.items():
        of_sequence[sequence] = int(inputs[names.index(name)].shape[transformed.plan.token_dims[name]])
    return [of_sequence[sequence] for sequence in sorted(of_sequence)] or [transformed.plan.num_tokens]


def refuse_noise(gm: fx.GraphModule) -> None:
    """Refuse random numbers that are drawn by place: one device draws others."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.noise_tokens.default):
        raise VerificationError(
            f"random numbers are drawn for tokens, so that no two runs agree.\n\n{where(node)}\n\n"
            "Call model.eval(), or pass exact_dropout=True to draw what one device draws."
        )


def refuse_dropout(gm: fx.GraphModule) -> None:
    """Refuse active dropout: no two runs agree then."""
    for node in gm.graph.nodes:
        if node.target in (aten.dropout.default, aten.native_dropout.default):
            call = Call.of(node)
            active = call["p"] > 0 and call["train"]
        elif node.target is aten.scaled_dot_product_attention.default:
            active = Call.of(node)["dropout_p"] > 0
        else:
            continue
        if active:
            raise VerificationError(
                f"dropout is active, so that no two runs agree.\n\n{where(node)}\n\n"
                "Call model.eval(), set the rate to 0, or pass exact_dropout=True to draw what one device draws."
            )
