"""A step written for OLMo-core, with its imports changed: its load balancers cut packed documents, whose attention is a ring's.

    python examples/olmo_core_names.py              # 3 processes
    python examples/olmo_core_names.py --ranks 4

For each load balancer, each rank takes its part of the tokens, computes loss and gradients of a small attention model, and
compares their sums over the ranks with the same model on whole documents. Exits with 1 if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

# Were: from olmo_core.nn.attention.ring import ..., from ring_flash_attn import ...
from cpcompile.compat.olmo_core import RingAttentionLoadBalancerType
from cpcompile.compat.ring_flash_attn import llama3_flash_attn_varlen_func, zigzag_ring_flash_attn_varlen_func

DOCUMENTS = (37, 5, 1, 20)  # tokens of the documents
VOCABULARY, NUM_HEADS, HEAD_DIM, IGNORED, LARGEST = 50, 4, 16, -100, 1e-10
HEAD_STRIDE = 2


def weights() -> list[Tensor]:
    """Return the embedding to q, k, v and that from the output, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    width = NUM_HEADS * HEAD_DIM
    shapes = ((VOCABULARY, 3 * width), (width, VOCABULARY))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def loss_of(outs: Tensor, to_logits: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Return the loss of some tokens' attention `[tokens, heads, dim]`, their share of the mean over all labels."""
    logits = outs.flatten(1) @ to_logits
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_labels


def heads(ids: Tensor, to_heads: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v `[tokens, heads, dim]`."""
    return torch.nn.functional.embedding(ids, to_heads).unflatten(1, (3, NUM_HEADS, HEAD_DIM)).unbind(1)


def whole(ids: Tensor, labels: Tensor, num_labels: int) -> list[Tensor]:
    """Return loss and gradients on one device, document by document."""
    to_heads, to_logits = weights()
    outs = []
    for document in ids.split(list(DOCUMENTS)):
        q, k, v = (x.transpose(0, 1)[None] for x in heads(document, to_heads))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    loss = loss_of(torch.cat(outs), to_logits, labels, num_labels)
    return [loss.detach(), *torch.autograd.grad(loss, [to_heads, to_logits])]


def shared(
    kind: RingAttentionLoadBalancerType, ids: Tensor, labels: Tensor, num_labels: int
) -> tuple[int, list[Tensor]]:
    """Return how many tokens this rank has, and its share of loss and gradients."""
    to_heads, to_logits = weights()
    balancer = kind.build(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",)))
    cu_doc_lens = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0).to(torch.int32)
    (local_ids, local_labels), documents = balancer.batch_shard_by_document(
        inputs=[ids[None], labels[None]], seq_dims=[1, 1], cu_doc_lens=cu_doc_lens, pad_values=[0, IGNORED]
    )
    q, k, v = heads(local_ids[0], to_heads)
    if kind is RingAttentionLoadBalancerType.llama3:
        bounds = [documents[f"{name}_{x}"] for name in ("cu_doc_lens", "max_doc_len") for x in "qk"]
        out = llama3_flash_attn_varlen_func(q, k, v, *bounds, HEAD_STRIDE, documents["local_k_slice"], causal=True)
    else:
        bounds = [documents["cu_doc_lens"], documents["max_doc_len"]]
        out = zigzag_ring_flash_attn_varlen_func(q, k, v, *bounds, causal=True)
    assert isinstance(out, Tensor)
    loss = loss_of(out, to_logits, local_labels[0], num_labels)
    return local_ids.shape[1], [loss.detach(), *torch.autograd.grad(loss, [to_heads, to_logits])]


def work() -> int:
    """Compare in this process, one of those that `main` has started; return 1 if the results differ."""
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (sum(DOCUMENTS),), generator=generator)
    labels = torch.cat(
        [torch.nn.functional.pad(part[1:], (0, 1), value=IGNORED) for part in ids.split(list(DOCUMENTS))]
    )
    num_labels = int((labels != IGNORED).sum())
    expected, largest = whole(ids, labels, num_labels), 0.0
    for kind in (RingAttentionLoadBalancerType.zig_zag, RingAttentionLoadBalancerType.llama3):
        tokens, found = shared(kind, ids, labels, num_labels)
        for x in found:
            dist.all_reduce(x)
        errors = [(x - y).abs().max().item() for x, y in zip(found, expected, strict=True)]
        largest = max(largest, *errors)
        if dist.get_rank() == 0:
            print(
                f"{kind:>8}: {dist.get_world_size()} ranks of {tokens} tokens, documents of {list(DOCUMENTS)}: "
                f"loss {found[0]:.6f} differs from one device by {errors[0]:.1e}, gradients by {max(errors[1:]):.1e}"
            )
    dist.destroy_process_group()
    return int(largest > LARGEST)


def main() -> int:
    """Start the processes, or be one of them."""
    if "WORLD_SIZE" in os.environ:
        return work()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3, help="how many processes")
    ranks = parser.parse_args().ranks
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    return subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
