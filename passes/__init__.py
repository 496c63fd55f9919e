"""The passes: plain functions on the graph, which `cpcompile.compile.transform` runs in the order of `PIPELINE`.

In: a captured graph and, behind the choice, the plan. Out: the graph that every rank runs; each pass returns how many places it
changed. May import `analysis` and below, and no pass another.
"""

if __name__ != "cpcompile.passes":
    raise ImportError("import this package as cpcompile.passes")

from cpcompile.passes.choose_strategies import choose_strategies
from cpcompile.passes.chunk_losses import chunk_losses
from cpcompile.passes.cut_hidden_rows import cut_hidden_rows
from cpcompile.passes.enclose_backwards import enclose_backwards
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.find_recurrences import find_recurrences
from cpcompile.passes.find_softmax import find_softmax
from cpcompile.passes.find_token_local import find_token_local
from cpcompile.passes.finish_outputs import finish_outputs
from cpcompile.passes.follow_documents import follow_documents
from cpcompile.passes.functionalise_writes import functionalise_writes
from cpcompile.passes.gather_latents import gather_latents
from cpcompile.passes.guard_padding import guard_padding
from cpcompile.passes.lift_masks import lift_masks
from cpcompile.passes.locate_shown import locate_shown
from cpcompile.passes.open_flex_attention import open_flex_attention
from cpcompile.passes.open_masked_rows import open_masked_rows
from cpcompile.passes.open_products import open_products
from cpcompile.passes.open_skewed_rows import open_skewed_rows
from cpcompile.passes.open_transforms import open_transforms
from cpcompile.passes.open_varlen_attention import open_varlen_attention
from cpcompile.passes.place_tokens import place_tokens
from cpcompile.passes.recompute_blocks import recompute_blocks
from cpcompile.passes.rewrite_attention import rewrite_attention
from cpcompile.passes.rewrite_dropout import rewrite_dropout
from cpcompile.passes.rewrite_reductions import rewrite_reductions
from cpcompile.passes.separate_documents import separate_documents
from cpcompile.passes.stack_writes import stack_writes
from cpcompile.passes.sum_gradients import sum_gradients
from cpcompile.passes.tile_rows import tile_rows
from cpcompile.passes.unshard_parameters import unshard_parameters

# Still a single-device program: these only say what the attentions are.
ANALYSIS = (
    functionalise_writes,
    stack_writes,
    open_masked_rows,
    open_products,
    find_recurrences,
    open_transforms,
    open_skewed_rows,
    open_flex_attention,
    open_varlen_attention,
    find_softmax,
    find_attention,
    lift_masks,
    cut_hidden_rows,
)

# From one device to the ranks of an axis; each takes the plan.
SHARDING = (
    find_token_local,
    follow_documents,
    gather_latents,
    place_tokens,
    guard_padding,
    rewrite_dropout,
    rewrite_attention,
    rewrite_reductions,
    locate_shown,
    finish_outputs,
    enclose_backwards,
)

# What FSDP shards, for models that `fully_shard` wrapped, and where gradients are added up.
PARAMETERS = (unshard_parameters, sum_gradients)

# What saves memory and changes no result.
MEMORY = (chunk_losses, tile_rows, recompute_blocks)

# All of them in order. `separate_documents` runs for packed documents that a model does not keep apart, `choose_strategies` marks
# what `cpcompile.choose` decided in between.
PIPELINE = (*ANALYSIS, separate_documents, choose_strategies, *SHARDING, *MEMORY, *PARAMETERS)

__all__ = [
    "ANALYSIS",
    "MEMORY",
    "PARAMETERS",
    "PIPELINE",
    "SHARDING",
    "choose_strategies",
    "chunk_losses",
    "cut_hidden_rows",
    "enclose_backwards",
    "find_attention",
    "find_recurrences",
    "find_softmax",
    "find_token_local",
    "finish_outputs",
    "follow_documents",
    "functionalise_writes",
    "gather_latents",
    "guard_padding",
    "lift_masks",
    "locate_shown",
    "open_flex_attention",
    "open_masked_rows",
    "open_products",
    "open_skewed_rows",
    "open_transforms",
    "open_varlen_attention",
    "place_tokens",
    "recompute_blocks",
    "rewrite_attention",
    "rewrite_dropout",
    "rewrite_reductions",
    "separate_documents",
    "stack_writes",
    "sum_gradients",
    "tile_rows",
    "unshard_parameters",
]
