"""Verify: all ranks of the transformed program, in this process, against the untouched model."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.annotation import annotation
from cpcompile.call import Call
from cpcompile.capture import capture
from cpcompile.compile import input_names
from cpcompile.config import Config
from cpcompile.dynamo import by_name, compile_whole, token_length
from cpcompile.errors import VerificationError, where
from cpcompile.lockstep import Lockstep, whole_value
from cpcompile.mesh import Axis
from cpcompile.order import Order
from cpcompile.passes.finish_outputs import output_placements
from cpcompile.placement import Full, Sharded
from cpcompile.plan import Lengths
from cpcompile.transform import Transformed, transform
from cpcompile.widen import Widen, widen_graph
from cpcompile.writes.aliases import written_arguments

aten = torch.ops.aten

# Relative, of norms, in units in the last place. Rounding errors of sums in another order grow like the root of
# their length times the depth of the network: a few hundred for the models that fit one process. In half precision
# sums are taken in float32 and every result is rounded once, so that errors stay near the rounding of one result.
TOLERANCE_ULPS = 256
HALF_TOLERANCE_ULPS = 8
# A gradient that cancels to nothing (a key bias under softmax) has only noise: it is measured against this
# part of the largest gradient.
NOISE_FLOOR = 1e-2


@dataclass(frozen=True, slots=True)
class Difference:
    """A node whose value differs: the captured node, its relative error, and the user's line."""

    node: str
    error: float
    place: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        world_size: ranks of the axis.
        loss: the transformed program's objective on each rank.
        reference_loss: the untouched model's.
        loss_error: largest relative difference between them.
        gradient_errors: relative difference of each parameter's gradient (norm of the difference over norm).
        tolerance: what both must stay under.
        first_difference: where the forward values first differ, if they do.
        transformed: the graphs and the plan.
    """

    world_size: int
    loss: tuple[float, ...]
    reference_loss: float
    loss_error: float
    gradient_errors: Mapping[str, float]
    tolerance: float
    first_difference: Difference | None
    transformed: Transformed

    @property
    def ok(self) -> bool:
        """Whether loss and every gradient agree."""
        return not math.isnan(self.loss_error) and max(self.loss_error, self.worst_gradient[1]) <= self.tolerance

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much; NaN counts as most."""
        return max(
            self.gradient_errors.items(),
            key=lambda item: math.inf if math.isnan(item[1]) else item[1],
            default=("", 0.0),
        )

    def raise_if_wrong(self) -> None:
        """Raise `VerificationError` unless `ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        plan, (name, error) = self.transformed.plan, self.worst_gradient
        lines = [
            f"{'exact' if self.ok else 'WRONG'} for {self.world_size} ranks, layout {plan.layout}, attention "
            f"{', '.join(sorted(set(self.transformed.choice.strategies))) or 'none'} (tolerance {self.tolerance:.1e}, relative)",
            f"  loss       {self.loss[0]:.10g}   single device {self.reference_loss:.10g}   error {self.loss_error:.1e}",
            f"  gradients  {len(self.gradient_errors)} compared   worst {name or '-'}   error {error:.1e}",
        ]
        if self.first_difference is not None:
            first = self.first_difference
            lines += [f"  first diverging node: {first.node}, error {first.error:.1e}", f"  {first.place}"]
        elif not self.ok:
            wrong = [n for n, e in self.gradient_errors.items() if not e <= self.tolerance]
            lines.append(f"  every forward value agrees; {len(wrong)} gradient(s) differ: {', '.join(wrong[:8])}")
        return "\n".join(lines)


def verify(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    world_size: int,
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    objective: Callable[[Any], torch.Tensor] | None = None,
    **options: Any,
) -> Verification:
    """Run `model` untouched, and as `world_size` ranks in lockstep, and compare loss and every gradient.

    Needs no processes and no GPU. The model's gradients are left as they were. With `documents`, the model is not untouched: the
    program of one device in which documents are separated is what the ranks are compared with.

    Args:
        model: the single-device model, on any device.
        inputs: its keyword arguments: the whole batch, labels included.
        world_size: ranks to simulate.
        inner_size: how many of them exchange heads in `strategy="usp"`, where they are a grid.
        dtype: run a copy of the model in this dtype; `torch.float64` separates errors from rounding (float32
            casts are widened too).
        tolerance: largest relative error; by default 256 units in the last place of the dtype, 8 for half precision.
        objective: from the model's output to the scalar to differentiate; by default its loss, or else a
            fixed random projection of all its floating-point outputs.
        options: the fields of `cpcompile.Config`. Attention is computed as it is defined, whatever `kernel` says.

    Returns:
        The comparison; `.ok` tells whether it is within the tolerance, `print` it for details.

    Raises:
        CPError: the model is refused, or dropout makes any two runs differ (not with `exact_dropout=True`).
    """
    axis, config = Axis.in_process(world_size, inner_size), replace(Config.of(options), kernel="auto")
    config.check_axis(inner_size)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
        inputs = {
            n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()
        }
    objective = objective or default_objective
    is_wide = dtype == torch.float64
    with Widen() if is_wide else contextlib.nullcontext(), seeded(model):
        if config.documents:
            whole = compile_whole(model.forward, OneDevice(config, is_wide), config)
            named = by_name(model.forward, inputs, beside=config.told_by)
            reference_loss, reference = run_and_differentiate(model, whole, named, objective, config)
        else:
            reference_loss, reference = run_and_differentiate(model, model.forward, inputs, objective)
    ranks = LockstepBackend(config, axis, is_wide)
    with seeded(model):
        loss, gradients = run_and_differentiate(
            model,
            compile_whole(model.forward, ranks, config),
            by_name(model.forward, inputs, beside=config.told_by),
            objective,
            config,
        )
    assert ranks.transformed is not None
    error = max(relative(value, reference_loss) for value in (loss, *ranks.scalars(loss)))
    largest = max((g.norm().item() for g in reference.values()), default=0.0)
    errors = {name: gradient_error(gradients.get(name), grad, largest) for name, grad in reference.items()}
    limit = tolerance if tolerance is not None else default_tolerance(model_dtype(model))
    result = Verification(
        world_size, (float(loss),), float(reference_loss), error, errors, limit, None, ranks.transformed
    )
    if result.ok:
        return result
    first = first_difference(model, ranks.transformed, ranks.inputs, world_size, limit)
    return Verification(world_size, result.loss, result.reference_loss, error, errors, limit, first, ranks.transformed)


@contextlib.contextmanager
def seeded(model: torch.nn.Module) -> Iterator[None]:
    """Begin with the same random numbers each time; leave the generators as they were."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the least precise floating-point dtype of the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding alone explains."""
    eps = torch.finfo(dtype).eps
    return eps * (TOLERANCE_ULPS if eps < torch.finfo(torch.float16).eps else HALF_TOLERANCE_ULPS)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative difference of two scalars; two NaNs agree (a batch without labels has no loss)."""
    if bool(a.isnan()) and bool(b.isnan()):
        return 0.0
    return ((a - b).abs() / b.abs().clamp(min=torch.finfo(b.dtype).tiny)).item()


def gradient_error(grad: torch.Tensor | None, reference: torch.Tensor, largest: float) -> float:
    """Return the norm of the difference, relative to the gradient's norm or the noise floor."""
    difference = reference if grad is None else grad - reference
    scale: float = max(reference.norm().item(), NOISE_FLOOR * largest)
    norm: float = difference.norm().item()
    if math.isnan(norm) and bool(reference.isnan().any()):
        return 0.0
    return norm / scale if scale else norm


def default_objective(output: Any) -> torch.Tensor:
    """Return the loss of a model output, or a fixed random projection of its floating-point tensors."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = torch.utils._pytree.tree_leaves(output)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad]
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [(x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in tensors]
    ).sum()


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


class LockstepBackend:
    """A Dynamo backend that runs all ranks in lockstep and hands the joined outputs back to the model's own code."""

    def __init__(self, config: Config, axis: Axis, is_wide: bool) -> None:
        self.config, self.axis, self.is_wide = config, axis, is_wide
        self.transformed: Transformed | None = None
        self.inputs: tuple[Any, ...] = ()
        self._scalars: list[list[torch.Tensor]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        if not self.config.exact_dropout:
            refuse_dropout(captured)
        if self.is_wide:
            widen_graph(captured)
        self.transformed = transform(captured, config=self.config, axis=self.axis, inputs=input_names(captured))
        return self._run

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        assert self.transformed is not None
        graph = self.transformed.graph
        self.inputs = inputs
        lockstep = Lockstep(graph, self.axis.world_size)
        outputs = lockstep.run(*inputs)
        orders = orders_of(self.transformed, inputs, lockstep)
        joined = []
        for placement, *values in zip(output_placements(graph), *outputs, strict=True):
            if isinstance(placement, Sharded):
                joined.append(whole_value(values, placement, orders))
            elif isinstance(placement, Full) and values[0].is_floating_point():
                # Every rank back-propagates its own copy; the value is the first rank's.
                joined.append(values[0] + sum(value - value.detach() for value in values[1:]))
                if values[0].dim() == 0:
                    self._scalars.append([value.detach() for value in values])
            else:
                joined.append(values[0])
        return tuple(joined)

    def scalars(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """Return what each rank returned as the scalar output `loss`."""
        return next((values for values in self._scalars if torch.equal(values[0], loss)), [])


class OneDevice:
    """A Dynamo backend that runs the program of one device in which documents are separated, as the option `documents` says."""

    def __init__(self, config: Config, is_wide: bool) -> None:
        self.config, self.is_wide = config, is_wide

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        if self.is_wide:
            widen_graph(captured)
        axis, names = Axis.in_process(1), input_names(captured)
        return transform(captured, config=self.config, axis=axis, inputs=names).original


def orders_of(transformed: Transformed, inputs: Sequence[Any], lockstep: Lockstep) -> list[Order]:
    """Return which tokens each rank holds of each sequence of these flat inputs, which the ranks have started to run."""
    plan = transformed.plan
    bounds = [None if x.bounds is None else lockstep.bounds.get(x.bounds) for x in Lengths.all_of(transformed.graph)]
    lengths = sequence_lengths(transformed, inputs)  # of none in a graph without tokens, where no value needs an order
    return [Order.of(n, plan.world_size, plan.layout, found) for n, found in zip(lengths, bounds, strict=False)]


def sequence_lengths(transformed: Transformed, inputs: Sequence[Any]) -> list[int]:
    """Return the number of tokens of each sequence in these flat inputs."""
    names = [node.name for node in transformed.graph.graph.find_nodes(op="placeholder")]
    of_sequence: dict[int, int] = {}
    for name, sequence in transformed.sequences.items():
        of_sequence[sequence] = int(inputs[names.index(name)].shape[transformed.plan.token_dims[name]])
    return [of_sequence[sequence] for sequence in sorted(of_sequence)] or [transformed.plan.num_tokens]


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


def first_difference(
    model: torch.nn.Module, transformed: Transformed, inputs: Sequence[Any], world_size: int, tolerance: float
) -> Difference | None:
    """Return the first node of the transformed graph whose joined value is not that of the captured graph."""
    values: dict[str, Any] = {}
    is_written = any(written_arguments(node) for node in transformed.original.graph.nodes)

    def kept(value: Any) -> Any:
        """Return a value as it is now: operators in place may change it later."""
        return value.clone() if is_written and isinstance(value, torch.Tensor) else value

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n.name] = kept(result)
            return result

    lockstep, orders = Lockstep(transformed.graph, world_size), list[Order]()
    with torch.no_grad(), seeded(model), filled_memory():
        Recorder(transformed.original).run(*map(kept, inputs))
    with torch.no_grad(), seeded(model), filled_memory():
        for node, ranks in lockstep.steps(*map(kept, inputs)):
            known = annotation(node)
            at, expected = known.placement, values.get(known.origin)
            if not isinstance(expected, torch.Tensor) or isinstance(at, tuple):
                continue
            if not all(isinstance(value, torch.Tensor) for value in ranks):
                continue
            if isinstance(at, Sharded):
                if at.reaches_outside:
                    continue
                # No value is sharded before the bounds of all documents are known.
                orders = orders or orders_of(transformed, inputs, lockstep)
            found = whole_value(ranks, at, orders)
            error = value_error(found, expected)
            if error > tolerance:
                return Difference(known.origin, error, where(node).strip())
    return None


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Let new memory hold NaN, so that tensors that are written part by part can be compared in between."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about algorithms that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def value_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a value; a value of another shape, or NaN for a number, is infinitely wrong."""
    if found.shape != expected.shape:
        return math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else math.inf
    both_finite = expected.isfinite() & found.isfinite()
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return math.inf
    scale: float = expected[both_finite].norm().item()
    error: float = (found - expected)[both_finite].norm().item()
    return error / scale if scale else error
