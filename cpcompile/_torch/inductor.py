"""Inductor and the other compilers of a transformed graph, and Inductor's options."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from cpcompile._torch.joint_graph import HalvesPass, JointPass, Partitioner, in_inductor
from cpcompile._torch.layer_marks import LayerMarks, closing, in_generated_code, with_marks
from cpcompile._torch.repeated_calls import schemas_once, strides_as_they_are, values_once

# The order of the graph has what a product of weights reads freed at once. Inductor's own search for the least memory (torch 2.11
# to 2.14) does not, where attention follows: with activation checkpoints it takes a quarter more.
PLAIN_ORDER = {"reorder_for_peak_memory": False}
# For nobody: CUDA graphs alone read the partitions of a graph, and only those who run a generated file by hand its benchmark.
UNREAD = {"benchmark_harness": False}
UNREAD_WITHOUT_CUDA_GRAPHS = {"graph_partition": False}
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def inner_compiler(
    name: str,
    options: Mapping[str, Any] | None = None,
    joint_pass: JointPass | None = None,
    halves_pass: HalvesPass | None = None,
    recomputes_elementwise: bool = False,
    marks: LayerMarks | None = None,
) -> Compiler:
    """Return the function that compiles the transformed graph: `inductor` with these options, `aot_eager` or `eager`.

    `joint_pass` runs on the graph of forward and backward, which `eager` has not, and `halves_pass` on its halves. With
    `recomputes_elementwise` Inductor keeps no results of elementwise operators for backward that it can compute again.
    `marks` says which layers are told of while a profiler runs.
    """
    if name == "eager":
        return lambda gm, inputs: with_marks(gm, gm, marks)
    if name == "aot_eager":
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop
        from torch._functorch.partitioners import default_partition

        partition = Partitioner(default_partition, joint_pass, halves_pass)

        def compiler(gm: fx.GraphModule, inputs: Any, is_backward: bool) -> Any:
            boxed = nop(gm, inputs)
            return make_boxed_func(with_marks(gm, lambda *given: boxed(list(given)), marks, is_backward))

        halves = {f"{half}_compiler": functools.partial(compiler, is_backward=half == "bw") for half in ("fw", "bw")}
        return aot_autograd(**halves, partition_fn=partition)
    from torch._inductor.compile_fx import compile_fx

    options = options or {}
    has_graphs = bool(options.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))
    patches = {**PLAIN_ORDER, **UNREAD, **({} if has_graphs else UNREAD_WITHOUT_CUDA_GRAPHS), **options}

    def compile_both(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Otherwise a backward that does not compile is an error of the first backward, outside of our hands.
        with (
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            recomputing(recomputes_elementwise),
            torch._inductor.config.patch(patches),
            schemas_once(),
            values_once(),
            strides_as_they_are(),
            in_inductor(joint_pass, halves_pass),
            in_generated_code(marks),
        ):
            return closing(compile_fx(gm, inputs), marks)  # type: ignore[arg-type]

    return compile_both


def recomputing(elementwise: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the graph of forward and backward is divided so that elementwise results are computed again.

    By default torch keeps those that products read in backward, which have to be written then once more.
    """
    context: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(
        ban_recompute_materialized_backward=not elementwise
    )
    return context


def compile_by_rows(
    function: Callable[..., Sequence[torch.Tensor]],
    operands: Sequence[torch.Tensor],
    by_row: Sequence[bool],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """Return a function compiled by Inductor for operands of fewer rows as well: those that `by_row` says, all of as many.

    Args:
        function: of tensors to tensors; it may write to operands.
        operands: their values are not read. Inductor chooses kernels for as many rows as these have: of few it would divide
            the sums along each row.
        by_row: of each operand.
        options: of Inductor.
    """
    environment, source = ShapeEnv(), ConstantSource("rows")
    mode = FakeTensorMode(shape_env=environment)
    hint = next(int(x.shape[0]) for x, varies in zip(operands, by_row, strict=True) if varies)
    at_most = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(0, hint))  # few enough for indices of 32 bits
    symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC, at_most)
    rows = environment.create_symintnode(symbol, hint=hint, source=source)
    with mode:
        fakes: list[Any] = [
            torch.empty(
                (rows, *map(int, x.shape[1:])) if varies else tuple(map(int, x.shape)), dtype=x.dtype, device=x.device
            )
            for x, varies in zip(operands, by_row, strict=True)
        ]
        traced = make_fx(lambda *each: function(*each))(*fakes)
    # By itself torch 2.11 finds no sizes in this graph, and compiles it for any number of columns too: twice as slow.
    context = torch._guards.tracing(torch._guards.TracingContext(mode))
    with context, torch._inductor.config.patch(dict(options)):
        compiled: Callable[..., Any] = torch._inductor.standalone_compile(
            traced, fakes, dynamic_shapes="from_tracing_context"
        )
    return compiled


def trace_for_inductor(
    function: Callable[..., Sequence[torch.Tensor]], shapes: Sequence[tuple[Sequence[int], torch.dtype, torch.device]]
) -> fx.GraphModule:
    """Return the graph of a function of tensors of these shapes, in the operators that Inductor has kernels for."""
    from torch._inductor.decomposition import select_decomp_table

    with FakeTensorMode():
        fakes = [torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype, device in shapes]
        traced: fx.GraphModule = make_fx(lambda *each: list(function(*each)), select_decomp_table())(*fakes)
    return traced


def floating_point_operations(target: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return how many a product, a convolution or an attention of ATen takes, as torch counts them; 0 of others."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(getattr(target, "overloadpacket", None))
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def options_of_mode(mode: str) -> dict[str, Any]:
    """Return the options that a mode of `torch.compile` stands for.

    Raises:
        KeyError: there is no such mode; it holds those that there are.
    """
    import torch._inductor

    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise KeyError(list(modes))
    return dict(modes[mode])


def cache_folder() -> str:
    """Return where Inductor keeps what it compiled, for the next process; '' where it keeps nothing.

    Checked on torch 2.11 to 2.14.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir() if config.fx_graph_cache and not config.force_disable_caches else ""


def known_options() -> list[str]:
    """Return the names of Inductor's options."""
    import torch._inductor.config

    return list(torch._inductor.config.get_config_copy())


def option_fits(name: str, value: Any) -> bool:
    """Tell whether a value is of the type of an option of Inductor, as far as that is known."""
    import torch._inductor.config

    kind = torch._inductor.config.get_type(name)  # type: ignore[attr-defined]
    try:
        return isinstance(value, kind)
    except TypeError:  # a parameterised generic, as torch.compile does not check it either
        return True
