"""This project's strategies, through its operators, and what `auto` picks among them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, Case, Problem, usp_layout
from attention_systems import Autograd, Runner, System

from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.choice import choose

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
        found.append(our_system(f"usp {world_size // 2}x2", usp_layout(bool(case.documents), 2), kernel))
    return found


def our_system(strategy: str, layout: str, kernel: str) -> System:
    """Return one of this project's strategies; `usp 2x4` is a ring of 2 places, at each of which 4 ranks exchange heads."""

    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        documents = documents_of(problem)
        options: dict[str, Any] = {"layout": layout, "kernel": kernel, "documents": documents, "problem": problem}
        yield Autograd(lambda q, k, v: ours(strategy, q, k, v, **options))

    return System("cpcompile", strategy, layout, kernel, open_)


def ours(strategy: str, q: Any, k: Any, v: Any, *, problem: Problem, layout: str, kernel: str, documents: Any) -> Any:
    """Return out `BLHD` of local q, k and v; the only place that calls the operators."""
    strategy, _, shape = strategy.partition(" ")
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
        "kernel_name": OUR_KERNELS[problem.device.type].get(kernel, kernel),
        "length": problem.length,
        "layout": layout,
        "world_size": problem.world_size,
        "group": problem.mesh.get_group().group_name,
    }
    if strategy == "usp":
        grid = usp_grid(problem.mesh.device_type, shape)
        values["inner_size"] = grid["inner"].size()
        values["inner_group"], values["outer_group"] = (grid[x].get_group().group_name for x in ("inner", "outer"))
    names = [argument.name for argument in operator._schema.arguments]
    if kernel != "auto" and "kernel_name" not in names:
        raise NotImplementedError(f"{operator} takes no kernel")
    out, *_ = operator(**{name: values[name] for name in names if name in values})
    return out.transpose(1, 2)


@functools.cache
def usp_grid(device: str, shape: str) -> dist.DeviceMesh:
    """Return the ranks as a grid, '2x4': neighbours exchange heads (inner, 4), their groups are a ring (outer, 2)."""
    outer, inner = map(int, shape.split("x"))
    return dist.init_device_mesh(device, (outer, inner), mesh_dim_names=("outer", "inner"))


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
    site = site_of(problem.length, problem.window, problem.is_packed, kernel, problem.device.type)
    choice = choose([site], "auto", "auto", Ranks(problem.world_size))
    return choice.strategies[0], choice.layout


def site_of(length: int, window: int, is_packed: bool, kernel: str, device: str) -> AttentionSite:
    """Return what the cost model sees of a case: bfloat16, causal, on the kernel that computes most of it."""
    kernel = OUR_KERNELS["cuda"][kernel] if kernel else "cudnn_varlen" if window or is_packed else "cudnn"
    sizes = (1, HEADS, KV_HEADS, length, HEAD_DIM, HEAD_DIM, 2)
    return AttentionSite(*sizes, device, True, window, False, has_documents=is_packed, kernel=kernel)
