"""Flex: what keeps a model with transformers' `flex_attention` from training on a CPU, removed.

torch refuses gradients of flex attention on a CPU because its compiled kernel has none there; uncompiled it has.
Uncompiled, torch reads the mask_mod only, where kernels skip the blocks that are not listed: a list without a mask_mod gets one.
transformers compiles flex attention and the making of block masks when the model itself is not compiled, and asks for the
compilation of the latter with an argument that torch warns about, which breaks a graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def allow_flex_attention_on_cpu() -> None:
    """Let flex attention run and train on a CPU, in this process. Doing it again changes nothing."""
    import torch._dynamo
    import torch.nn.attention.flex_attention as flex
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
    flex._validate_device = lambda query, key, value: None
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    integration.is_torchdynamo_compiling = lambda: True
    if not getattr(flex.BlockMask.from_kv_blocks, "says_blocks", False):
        flex.BlockMask.from_kv_blocks = staticmethod(  # type: ignore[method-assign]
            saying_blocks(flex.BlockMask.from_kv_blocks)
        )
    if not isinstance(masking_utils.create_block_mask, functools.partial):
        masking_utils.create_block_mask = functools.partial(create_block_mask, masking_utils.create_block_mask)


def create_block_mask(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a block mask as it is, without compiling how it is made."""
    return original(*args, **{**kwargs, "_compile": False})


def saying_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of block masks that gives those without a mask_mod one that says which blocks are listed."""

    def from_kv_blocks(
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        *args: Any,
        mask_mod: Any = None,
        **kwargs: Any,
    ) -> Any:
        lists = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        made = original(*lists, *args, mask_mod=mask_mod, **kwargs)
        if mask_mod is None and not args:
            seen = listed(kv_num_blocks, kv_indices)
            if full_kv_num_blocks is not None and full_kv_indices is not None:
                seen = seen | listed(full_kv_num_blocks, full_kv_indices)
            rows, columns = made.BLOCK_SIZE

            def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return seen[b % seen.shape[0], h % seen.shape[1], q // rows, k // columns]

            made.mask_mod = mask_mod
        return made

    from_kv_blocks.says_blocks = True  # type: ignore[attr-defined]
    return from_kv_blocks


def listed(num_blocks: Tensor, indices: Tensor) -> Tensor:
    """Return which blocks of keys each block of queries lists, `[B, H, blocks, blocks]`."""
    size = indices.shape[-1]
    is_listed = torch.arange(size, device=indices.device) < num_blocks.unsqueeze(-1)
    places = torch.where(is_listed, indices, size).long()
    return torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool).scatter(-1, places, is_listed)[..., :size]
