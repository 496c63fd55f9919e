"""The graph of forward and backward, divided as Inductor divides it, without compiling either half (torch 2.11 to 2.14)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from cpcompile._torch.inductor import recomputing
from cpcompile._torch.joint_graph import HalvesPass, JointPass, Partitioner


def divide(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: FakeTensorMode,
    joint_pass: JointPass | None,
    halves_pass: HalvesPass | None = None,
    recomputes_elementwise: bool = False,
) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """Return the forward and the backward of a graph; None for the latter where nothing takes a gradient.

    Args:
        gm: of fake tensors.
        inputs: fake, or numbers.
        mode: of these.
        joint_pass: runs on the graph of both.
        halves_pass: runs on the halves.
        recomputes_elementwise: as `inner_compiler` has it.
    """
    halves: dict[str, fx.GraphModule] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(half: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            halves[name] = half
            return half.forward

        return compiler

    min_cut = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    with (
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        recomputing(recomputes_elementwise),
        tracing(TracingContext(mode)),
    ):
        aot_module_simplified(
            gm,
            list(inputs),
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            inference_compiler=keep("forward"),
            partition_fn=Partitioner(min_cut, joint_pass, halves_pass),
            decompositions=select_decomp_table(),
        )
    return halves["forward"], halves.get("backward")
