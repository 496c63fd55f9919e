"""This project's strategies, through its operators, and what `auto` picks among them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, Case, Problem
from attention_systems import Autograd, Runner, System

OURS = {  # strategies and layouts for each kind of problem
    "causal": (("ring", "zig_zag"), ("gather", "zig_zag"), ("ulysses", "contiguous")),
    "packed": (
        ("ring", "balanced"),
        ("gather", "balanced"),
        ("ring", "zig_zag"),
        ("gather", "zig_zag"),
        ("ulysses", "contiguous"),
    ),
    "window": (
        ("halo", "contiguous"),
        ("halo", "zig_zag"),
        ("gather", "zig_zag"),
        ("ulysses", "contiguous"),
        ("ring", "contiguous"),
    ),
}
OUR_KERNELS = {"cuda": {"auto": "auto", "fa2": "flash"}, "cpu": {"auto": "auto", "fa2": "cpu_flash"}}


def own_systems(case: Case, world_size: int) -> list[System]:
    """Return the strategies that a case measures."""
    kernel = case.kernel or "auto"
    found = [our_system(*plan, kernel) for plan in OURS[case.kind]]
    if world_size >= 4 and case.kind != "window":
        found.append(our_system("usp", "zig_zag", kernel))
    return found


def our_system(strategy: str, layout: str, kernel: str) -> System:
    """Return one of this project's strategies."""

    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        documents = documents_of(problem)
        options: dict[str, Any] = {"layout": layout, "kernel": kernel, "documents": documents, "problem": problem}
        yield Autograd(lambda q, k, v: ours(strategy, q, k, v, **options))

    return System("cpcompile", strategy, layout, kernel, open_)


def ours(strategy: str, q: Any, k: Any, v: Any, *, problem: Problem, layout: str, kernel: str, documents: Any) -> Any:
    """Return out `BLHD` of local q, k and v; the only place that calls the operators."""
    operator = getattr(torch.ops.cpcompile, f"{strategy}_attention").default
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    values = {
        "q": q,
        "k": k,
        "v": v,
        "mask": None,
        "documents": documents,
        "key_padding": None,
        "scale": HEAD_DIM**-0.5,
        "is_causal": True,
        "window": problem.window,
        "softcap": 0.0,
        "bounds": starts_of(problem),
        "kernel_name": OUR_KERNELS[problem.device.type][kernel],
        "length": problem.length,
        "layout": layout,
        "world_size": problem.world_size,
        "group": problem.mesh.get_group().group_name,
    }
    if strategy == "usp":
        grid = usp_grid(problem.device.type, problem.world_size)
        values["inner_size"] = grid["inner"].size()
        values["inner_group"], values["outer_group"] = (grid[x].get_group().group_name for x in ("inner", "outer"))
    names = [argument.name for argument in operator._schema.arguments]
    if kernel != "auto" and "kernel_name" not in names:
        raise NotImplementedError(f"{operator} takes no kernel")
    out, *_ = operator(**{name: values[name] for name in names if name in values})
    return out.transpose(1, 2)


@functools.cache
def usp_grid(device: str, world_size: int) -> dist.DeviceMesh:
    """Return the ranks as a grid: two neighbours exchange heads, the pairs are a ring."""
    return dist.init_device_mesh(device, (world_size // 2, 2), mesh_dim_names=("outer", "inner"))


def documents_of(problem: Problem) -> torch.Tensor | None:
    """Return the document of each token, `[1, S]`."""
    if not problem.is_packed:
        return None
    ends = torch.tensor(problem.bounds[1:], device=problem.device)
    return torch.bucketize(torch.arange(problem.length, device=problem.device), ends, right=True)[None]


def starts_of(problem: Problem) -> torch.Tensor | None:
    """Return where documents begin as the operators take it: their number, then each start, on the CPU."""
    return torch.tensor([[len(problem.documents), *problem.bounds[:-1]]]) if problem.is_packed else None


def pick(problem: Problem, kernel: str) -> tuple[str, str]:
    """Return the strategy and the layout that `auto` chooses for a model of such attentions."""
    from cpcompile import cost

    sizes = (1, HEADS, KV_HEADS, problem.length, HEAD_DIM, HEAD_DIM, problem.dtype.itemsize)
    site = cost.Attention(
        *sizes,
        problem.device.type,
        True,
        problem.window,
        False,
        has_documents=problem.is_packed,
        kernel=pick_kernel(problem, kernel),
    )
    choice = cost.choose([site], "auto", "auto", cost.Ranks(problem.world_size))
    return choice.strategies[0], choice.layout


def pick_kernel(problem: Problem, kernel: str) -> str:
    """Return the kernel that most of such an attention runs on, or the one that the case is about."""
    if kernel:
        return OUR_KERNELS["cuda"][kernel]
    return "triton" if problem.window else "cudnn"
