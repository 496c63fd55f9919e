"""Rates: what kernels, links and hosts were measured to do, which the cost model computes with."""

from __future__ import annotations

# Measured on H100 in bf16: FLOP/s of forward and backward for a whole causal attention of 64k tokens, 32 heads of 128.
# FlashAttention 4: by as much faster than cuDNN as on an H200 with 32k tokens. 3 was not measured: it is taken for cuDNN's equal.
RATES = {
    "cudnn": (620e12, 560e12),
    "cudnn_varlen": (590e12, 530e12),
    "flash3": (620e12, 560e12),
    "flash4": (710e12, 630e12),
    "triton": (440e12, 375e12),
}

FLASH2 = (330e12, 300e12)  # and all others that run on GPUs

CPU = (100e9, 100e9)  # fp32 on a few cores

# A kernel reaches its rate when a row sees so many keys, as in a causal square of 16k; with half as many it is 7 and 11% slower
# alone, and half of that where blocks run side by side.
FULL_KEYS, FORWARD_SLOPE, BACKWARD_SLOPE = 8192, 0.05, 0.08

# Bytes a second and direction; between hosts those of a 400 Gb/s card for each GPU.
BYTES = {"symmetric": 350e9, "p2p": 250e9, "network": 45e9, "cpu": 2e9}

RANKS_OF_HOST = 8  # that NVLink connects; messages of more ranks take the network

# Dense products in bf16, FLOP/s: what a head of 4096 features takes longer than one of 2048, on 8192 and 32768 tokens of an H200
# (`loss.py`, all logits at once: 687 and 698e12), of which passes over the logits are no part. An H100 has the same peak.
PRODUCTS = {"gpu": 690e12, "cpu": 100e9}

# Passes over memory, bytes a second read and written: three quarters of what data sheets say: 3.35e12 for H100, 4.8e12 for H200.
MEMORY = {"gpu": 2.5e12, "cpu": 10e9}
MEMORY_H200 = 3.6e12

# The share of its rate that a kernel reaches on heads of 64 and narrower: a whole causal attention of 32k and 128k tokens on an
# H200 (`train_step.py --limit`): 0.73 and 0.74 with cuDNN, 0.80 and 0.81 with FlashAttention 4.
NARROW_HEADS, NARROW, NARROW_ELSEWHERE = 64, {"flash4": 0.8}, 0.735

# Bytes a second of the keys and values that a rank gathers, its own included: copied, their gradients summed in float32 and sent
# home. Two GPUs, 16k to 128k tokens and a window: 80 to 120e9.
GATHERING = 100e9

LAYING = 300e9  # bytes a second at which heads are laid into messages and out of them, which nothing hides

SLOWDOWN = 0.1  # of kernels while messages are sent that take SMs; symmetric memory takes none

LATENCY = 25e-6  # seconds of an exchange: launches and barriers

# Seconds that the host of a GPU takes to launch an attention and its gradient: at least, for each rank whose keys it computes
# with, and for each that heads are exchanged with. A layout that follows documents has many runs. `one_rank.py`, 2 to 8 ranks.
HOST = {
    "ring": (0.0, 1.75e-3, 0.0),
    "gather": (4e-3, 0.8e-3, 0.0),
    "halo": (4e-3, 0.3e-3, 0.0),
    "ulysses": (5.5e-3, 0.0, 0.1e-3),
    "usp": (0.0, 2.7e-3, 2.3e-3),
}

HOST_OF_DOCUMENTS = HOST | {"ring": (2e-3, 1.7e-3, 0.0), "gather": (5e-3, 0.6e-3, 0.0), "usp": (3e-3, 2.6e-3, 0.0)}

# Documents: the work of the slowest rank over the mean, where each computes rows and the layout does not follow documents. 16
# documents of 64k tokens on 2 and 8 GPUs: 1.2 to 2.9.
UNEVEN = 1.3

# By how much kernels are slower on packed documents than on one: where a rank computes some rows of each, which leaves backward
# short runs of them, and where it computes some heads of whole documents, which are too few to fill a GPU unless one call takes
# many. `one_rank.py`, 5 and 16 documents on 2, 4 and 8 ranks: 1.2 to 1.9, and 1.1 to 1.25, for cuDNN of variable lengths; two
# GPUs for the others.
PACKED = {"cudnn_varlen": (1.35, 1.15)}

PACKED_ELSEWHERE = (1.0, 1.6)
