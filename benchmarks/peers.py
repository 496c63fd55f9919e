"""The peers, as real packages where they are installed: ring-flash-attn, torch's context_parallel, ringmaster, yunchang.

A peer that is missing or cannot do a problem raises; the benchmark records the error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flash_attn_stand_in
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, Problem
from attention_systems import Autograd, Runner, System
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor
SCALE = HEAD_DIM**-0.5
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
PACKAGES = ("ring-flash-attn", "axolotl-ringmaster", "yunchang", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {"flash_attn": flash_attn_stand_in.version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _window(problem: Problem) -> tuple[int, int]:
    return (problem.window - 1, 0) if problem.window else (-1, -1)


# ring-flash-attn


def _ring_flash_attn() -> Any:
    """Import it without its adapter for transformers, which does not import with transformers 5."""
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    return importlib.import_module("ring_flash_attn")


def _rfa_dense(function: str, layout: str) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        with flash_attn_stand_in.installed():
            attend = getattr(_ring_flash_attn(), function)
            yield Autograd(lambda q, k, v: attend(q, k, v, causal=True, window_size=_window(problem)))

    return System("ring-flash-attn", function.removesuffix("_func"), layout, "fa2", open_)


def _rfa_llama3(stride: int) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        with flash_attn_stand_in.installed():
            module = _ring_flash_attn()
            cu_q, cu_k, longest_q, longest_k, keys = module.llama3_flash_attn_prepare_cu_seqlens(
                problem.cu_seqlens(), causal=True, rank=problem.rank, world_size=problem.world_size
            )

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = module.llama3_flash_attn_varlen_func(
                    *(q[0], k[0], v[0], cu_q, cu_k, longest_q, longest_k, stride, keys),
                    causal=True,
                    window_size=_window(problem),
                )
                return out[None]

            yield Autograd(attend)

    return System("ring-flash-attn", f"llama3_flash_attn_varlen stride {stride}", "contiguous", "fa2", open_)


def _rfa_zig_zag_varlen() -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        with flash_attn_stand_in.installed():
            module = _ring_flash_attn()
            cu = problem.cu_seqlens() // problem.world_size
            longest = max(end - start for start, end in problem.documents) // problem.world_size

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return module.zigzag_ring_flash_attn_varlen_func(q[0], k[0], v[0], cu, longest, causal=True)[None]

            yield Autograd(attend)

    return System("ring-flash-attn", "zigzag_ring_flash_attn_varlen", "zig_zag_by_document", "fa2", open_)


# torch


def _torch_context_parallel(rotation: str, kernel: str) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        experimental = importlib.import_module("torch.distributed.tensor.experimental")
        importlib.import_module("torch.distributed.tensor.experimental._attention").set_rotate_method(rotation)
        # The context shards its buffers; ours are sharded already, so it gets one of which nothing is used.
        unused = torch.zeros(1, 1, problem.length, 8, device=problem.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            # torch's rings take as many key heads as query heads; torchtitan repeats them too.
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)

        with (
            experimental.context_parallel(problem.mesh, buffers=[unused], buffer_seq_dims=[2]),
            sdpa_kernel(BACKENDS[kernel]),
            torch.enable_grad(),
        ):
            yield Autograd(attend)

    return System("torch context_parallel", f"ring {rotation}", "zig_zag", kernel, open_, risky=True)


# ringmaster


@contextmanager
def _transformers_flash() -> Iterator[None]:
    """Give transformers the functions of `flash_attn` as if it had loaded them."""
    utils = importlib.import_module("transformers.modeling_flash_attention_utils")
    flash_attn = importlib.import_module("flash_attn")
    saved = {name: getattr(utils, name) for name in ("_loaded_implementation", "_flash_fn", "_lazy_imports")}
    utils._loaded_implementation, utils._flash_fn = "flash_attention_2", flash_attn.flash_attn_func
    functions = (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, None, None, None)
    utils._lazy_imports = lambda *args, **kwargs: functions
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(utils, name, value)


def _ringmaster(backend: str, balance: str, kernel: str) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        # Imported first, it does not find the stand-in and take it for an installed package.
        interface = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        with flash_attn_stand_in.installed(), _transformers_flash():
            rm = importlib.import_module("ringmaster")
            config = rm.RingmasterConfig(
                size=problem.world_size, backend=rm.Backend(backend), load_balance=rm.LoadBalance(balance)
            )
            inner = "sdpa" if kernel == "cudnn" else "flash_attention_2"
            runtime = rm.setup(
                config,
                num_kv_heads=KV_HEADS,
                inner_attn=inner,
                device_mesh=problem.mesh,
                device_type=problem.device.type,
            )
            if problem.is_packed:
                runtime.varlen = (problem.cu_seqlens(), max(end - start for start, end in problem.documents))
            function = interface[runtime.attn_implementation]
            module = torch.nn.Module()
            module.num_key_value_groups, module.is_causal = HEADS // KV_HEADS, True
            window = {"sliding_window": problem.window} if problem.window else {}

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return function(module, q, k, v, None, scaling=SCALE, is_causal=True, **window)[0]

            try:
                with sdpa_kernel(BACKENDS[kernel] if problem.device.type == "cuda" else list(BACKENDS.values())[1:]):
                    yield Autograd(attend)
            finally:
                rm.teardown()

    layout = "zig_zag" if balance == "head_tail" else "contiguous"
    return System("ringmaster", f"{backend} {balance}", layout, kernel, open_, risky=True)


# yunchang


_GROUPS: dict[tuple[int, int], Any] = {}


def _yunchang_groups(ulysses: int, ring: int) -> None:
    """Make its process groups, once: it would make new ones each time."""
    module = importlib.import_module("yunchang.globals")
    if (ulysses, ring) not in _GROUPS:
        module.set_seq_parallel_pg(ulysses, ring, dist.get_rank(), dist.get_world_size())
        _GROUPS[ulysses, ring] = module.PROCESS_GROUP.ULYSSES_PG, module.PROCESS_GROUP.RING_PG
    module.PROCESS_GROUP.ULYSSES_PG, module.PROCESS_GROUP.RING_PG = _GROUPS[ulysses, ring]


def _yunchang(ring: str, layout: str) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        is_ring = ring != "ulysses"
        with flash_attn_stand_in.installed():
            yunchang = importlib.import_module("yunchang")
            _yunchang_groups(*((1, problem.world_size) if is_ring else (problem.world_size, 1)))
            kernels = importlib.import_module("yunchang.kernels")
            layer = yunchang.LongContextAttention(
                ring_impl_type=ring if is_ring else "basic", attn_type=kernels.AttnType.FA
            )
            attend: Callable[..., Tensor] = layer.forward
            yield Autograd(
                lambda q, k, v: attend(q, k, v, softmax_scale=SCALE, causal=True, window_size=_window(problem))
            )

    return System("yunchang", ring, layout, "fa2", open_, risky=True)


def peers(kind: str) -> list[System]:
    """Return the peers that have something for a kind of problem, also where it is known to be wrong."""
    zig_zag = _rfa_dense("zigzag_ring_flash_attn_func", "zig_zag")
    ring = _rfa_dense("ring_flash_attn_func", "contiguous")
    if kind == "packed":
        return [_rfa_llama3(4), _rfa_llama3(1), _rfa_zig_zag_varlen(), _ringmaster("ulysses", "none", "fa2")]
    if kind == "window":
        return [
            _rfa_llama3(4),
            zig_zag,
            ring,
            _ringmaster("ulysses", "none", "fa2"),
            _yunchang("ulysses", "contiguous"),
        ]
    return [
        zig_zag,
        _rfa_dense("stripe_flash_attn_func", "stripe"),
        ring,
        _rfa_llama3(4),
        _torch_context_parallel("allgather", "cudnn"),
        _torch_context_parallel("alltoall", "cudnn"),
        _torch_context_parallel("alltoall", "fa2"),
        _ringmaster("ulysses", "none", "cudnn"),
        _ringmaster("ring", "head_tail", "fa2"),
        _yunchang("zigzag", "zig_zag"),
        _yunchang("ulysses", "contiguous"),
    ]
