"""Names that users choose among, in the order of help texts: known without importing what they name, which takes torch seconds.

What bears a name lies where it is defined: strategies in `runtime.attention.catalogue`, balancers in `balance.layout`, kernels in
`runtime.kernels`, providers of losses in `runtime.tiles.loss_providers`. A test compares them.
"""

from __future__ import annotations

STRATEGIES = ("halo", "ulysses", "usp", "ring", "gather", "latent_heads", "latent")
BALANCERS = ("contiguous", "zig_zag", "zig_zag_by_document", "balanced")
KERNELS = (
    "flash4",
    "cudnn",
    "cudnn_varlen",
    "flash3",
    "triton",
    "flash",
    "flash_attn",
    "ring_flash_attn",
    "efficient",
    "flex",
    "cpu_flash",
    "math",
)
TRANSPORTS = ("auto", "symmetric", "p2p")
CHECKS_OF_FINITE = ("never", "step", "operators")
INNER_COMPILERS = ("inductor", "aot_eager", "eager")
LOSS_PROVIDERS = ("own", "torch", "liger", "cut_cross_entropy")
