"""The operators that a transformed graph calls. Importing this package registers them as `torch.ops.cpcompile.*`."""

from cpcompile.runtime.attention import attention as attention
from cpcompile.runtime.gather import gather_attention as gather_attention
from cpcompile.runtime.reduce import all_reduce as all_reduce
from cpcompile.runtime.reduce import scale_gradient as scale_gradient
from cpcompile.runtime.ring import ring_attention as ring_attention
from cpcompile.runtime.tokens import fill_padding as fill_padding
from cpcompile.runtime.tokens import gather_tokens as gather_tokens
from cpcompile.runtime.tokens import shard_tokens as shard_tokens
from cpcompile.runtime.ulysses import ulysses_attention as ulysses_attention
