"""The definitions of the collectives, for lockstep: ordinary differentiable code over the values of all ranks.

Each joins what it needs to whole tensors, does there what its operator promises, and splits again. They share
nothing with the runtime, so that they check the rewrite and the runtime alike.
"""

from collections.abc import Callable
from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile.inspect.definitions import attention, dropout, noise, tokens
from cpcompile.inspect.definitions.slices import Calls, Ranks
from cpcompile.runtime.attention.catalogue import STRATEGIES

cp = torch.ops.cpcompile

COLLECTIVES: dict[Any, Callable[[Calls], Ranks]] = {
    cp.shard_tokens.default: tokens.shard,
    cp.gather_tokens.default: tokens.gather,
    cp.fill_padding.default: tokens.fill,
    cp.all_reduce.default: tokens.all_reduce,
    cp.scale_gradient.default: tokens.scale,
    cp.move_tokens.default: tokens.move,
    cp.halo_tokens.default: tokens.halo,
    cp.rearrange_tokens.default: tokens.rearrange,
    cp.arranged_positions.default: tokens.arranged_positions,
    cp.exchange_dims.default: tokens.exchange_dims,
    cp.pick_tokens.default: tokens.pick,
    cp.put_tokens.default: tokens.put,
    cp.local_slots.default: tokens.local_slots,
    cp.positions.default: tokens.rank_positions,
    cp.chunk_indices.default: tokens.chunk_indices,
    cp.stack_ranks.default: tokens.stack_ranks,
    cp.shared_seed.default: dropout.shared_seed,
    cp.dropout_tokens.default: dropout.dropout,
    cp.draw_kept.default: dropout.draw_kept,
    cp.noise_tokens.default: noise.noise_tokens,
    cp.draw_noise.default: noise.draw_noise,
    cp.show.default: tokens.show,
    cp.show_tokens.default: tokens.show,
    cp.latent_attention.default: attention.latent_attention,
    cp.latent_heads_attention.default: attention.latent_heads_attention,
    **{
        getattr(cp, f"{name}_attention").default: attention.attention
        for name, strategy in STRATEGIES.items()
        if not strategy.is_latent
    },
}
