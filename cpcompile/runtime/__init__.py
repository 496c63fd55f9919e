"""The operators that a transformed graph calls. Importing this package registers them as `torch.ops.cpcompile.*`.

In: local tensors, and all else as arguments of an operator. Out: local tensors, with their gradients; and before anything runs,
what an operator computes, sends and holds (`traffic`, `attention.workload`). May import `balance` and below.
"""

from cpcompile.runtime.attention import (
    one_device as one_device,  # registers the operators of its name and of `strategies`
)
from cpcompile.runtime.attention import strategies as strategies
from cpcompile.runtime.host_memory import from_host as from_host
from cpcompile.runtime.host_memory import to_host as to_host
from cpcompile.runtime.host_memory import wait_copy as wait_copy
from cpcompile.runtime.parameters.gradient_sums import sum_gradient as sum_gradient
from cpcompile.runtime.parameters.unshard import unshard_parameter as unshard_parameter
from cpcompile.runtime.tiles.by_rows import by_rows as by_rows
from cpcompile.runtime.tiles.chunked_loss import chunked_loss as chunked_loss
from cpcompile.runtime.tokens.document_bounds import document_bounds as document_bounds
from cpcompile.runtime.tokens.dropout import draw_kept as draw_kept
from cpcompile.runtime.tokens.dropout import dropout_tokens as dropout_tokens
from cpcompile.runtime.tokens.dropout import shared_seed as shared_seed
from cpcompile.runtime.tokens.exchange import halo_tokens as halo_tokens
from cpcompile.runtime.tokens.exchange import move_tokens as move_tokens
from cpcompile.runtime.tokens.exchange_dims import exchange_dims as exchange_dims
from cpcompile.runtime.tokens.noise import draw_noise as draw_noise
from cpcompile.runtime.tokens.noise import noise_tokens as noise_tokens
from cpcompile.runtime.tokens.packing import checked_packing as checked_packing
from cpcompile.runtime.tokens.pick import chunk_indices as chunk_indices
from cpcompile.runtime.tokens.pick import local_slots as local_slots
from cpcompile.runtime.tokens.pick import pick_tokens as pick_tokens
from cpcompile.runtime.tokens.pick import positions as positions
from cpcompile.runtime.tokens.pick import put_tokens as put_tokens
from cpcompile.runtime.tokens.rearrange import arranged_positions as arranged_positions
from cpcompile.runtime.tokens.rearrange import rearrange_tokens as rearrange_tokens
from cpcompile.runtime.tokens.recurrence import recurrence as recurrence
from cpcompile.runtime.tokens.reduce import all_reduce as all_reduce
from cpcompile.runtime.tokens.reduce import scale_gradient as scale_gradient
from cpcompile.runtime.tokens.reduce import stack_ranks as stack_ranks
from cpcompile.runtime.tokens.shard import fill_padding as fill_padding
from cpcompile.runtime.tokens.shard import gather_tokens as gather_tokens
from cpcompile.runtime.tokens.shard import shard_tokens as shard_tokens
from cpcompile.runtime.tokens.show import show as show
from cpcompile.runtime.tokens.show import show_tokens as show_tokens
