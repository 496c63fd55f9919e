"""A script written for ring-flash-attn, with its import changed: packed documents over ranks, on GPUs or on CPUs.

    torchrun --nproc-per-node 2 examples/ring_flash_attn_names.py

Each rank has two chunks of each document, computes attention and its gradients, and compares them with PyTorch's attention of the
whole documents. Prints the largest differences and exits with 1 if one is too large.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from cpcompile.compat.ring_flash_attn import zigzag_ring_flash_attn_varlen_qkvpacked_func  # was: from ring_flash_attn

UNITS = (3, 1, 6, 2)  # lengths of the documents, in 2 tokens a rank
NUM_HEADS, HEAD_DIM, LARGEST = 4, 32, 1e-4


def chunks_of(x: torch.Tensor, sizes: list[int], rank: int, world_size: int) -> torch.Tensor:
    """Return the chunks `rank` and `2 * world_size - 1 - rank` of each document."""
    parts = [document.chunk(2 * world_size) for document in x.split(sizes)]
    return torch.cat([chunk for part in parts for chunk in (part[rank], part[2 * world_size - 1 - rank])])


def whole(qkv: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return attention of the documents, one by one."""
    outs = []
    for document in qkv.split(sizes):
        q, k, v = (x.transpose(0, 1)[None] for x in document.unbind(1))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outs)


def main() -> None:
    """Compare, and exit with 1 if the results differ."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sizes = [2 * world_size * unit for unit in UNITS]
    torch.manual_seed(0)  # all ranks make the same tensors
    qkv = torch.randn(sum(sizes), 3, NUM_HEADS, HEAD_DIM).to(device).requires_grad_()
    dout = torch.randn(sum(sizes), NUM_HEADS, HEAD_DIM).to(device)

    local = chunks_of(qkv.detach(), sizes, rank, world_size).requires_grad_()
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32) // world_size
    out = zigzag_ring_flash_attn_varlen_qkvpacked_func(local, cu_seqlens, max(sizes) // world_size, causal=True)
    out.backward(chunks_of(dout, sizes, rank, world_size))

    expected = whole(qkv, sizes)
    expected.backward(dout)
    assert local.grad is not None and qkv.grad is not None
    pairs = ((out, expected), (local.grad, qkv.grad))
    found = torch.stack([(x - chunks_of(y, sizes, rank, world_size)).abs().max() for x, y in pairs]).detach()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        print(
            f"{world_size} ranks, documents of {sizes} tokens: out differs by {found[0]:.1e}, gradients by {found[1]:.1e}"
        )
    dist.destroy_process_group()
    sys.exit(int(found.max() > LARGEST))


if __name__ == "__main__":
    main()
