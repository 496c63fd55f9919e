"""What the attention benchmark measures: cases, document sets, and which tokens each layout gives to a rank.

Tensors are `[batch, tokens, heads, head_dim]` everywhere in the benchmark; `BLHD` is that shape with local tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cpcompile.balance.layout import of_groups
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Segments

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128

# ring-flash-attn's benchmark/benchmark_varlen_kvpacked_func.py (of 8192 tokens) and test/test_llama3_flash_attn_varlen_func.py.
DOCUMENT_SETS = {
    "rfa_one": (0, 8192),
    "rfa_three": (0, 256, 7648, 8192),
    "rfa_two": (0, 4096, 8192),
    "rfa_five": (0, 3104, 6304, 7904, 8064, 8192),
    "rfa_test": (0, 120, 1248, 4232),
}


def random_documents(count: int, seed: int) -> tuple[int, ...]:
    """Return the bounds of `count` documents cut at random from 65536 tokens."""
    cuts = random.Random(seed).sample(range(1, 65536 // 16), count - 1)
    return (0, *sorted(16 * cut for cut in cuts), 65536)


# A seed near the mean: its squares have 10.7% of the area of the whole one, the mean over seeds is 11.8%.
DOCUMENT_SETS["random_16"] = random_documents(16, 5)


@dataclass(frozen=True, slots=True)
class Case:
    """One attention: `bounds` are those of packed documents, `window` counts the keys that a row sees, itself included.

    `kernel` restricts the case to systems that run on that kernel.
    """

    name: str
    kind: str
    length: int
    documents: str = ""
    window: int = 0
    kernel: str = ""


CASES = (
    Case("causal_16k", "causal", 16384),
    Case("causal_64k", "causal", 65536),
    Case("causal_64k_fa2", "causal", 65536, kernel="fa2"),
    *(Case(f"packed_64k_{name}", "packed", 65536, documents=name) for name in DOCUMENT_SETS),
    Case("window_4k_of_64k", "window", 65536, window=4096),
    Case("causal_128k", "causal", 131072),
)


def case_of(name: str, world_size: int) -> Case:
    """Return the case of a name."""
    return next(case for case in (*CASES, *growing(world_size)) if case.name == name)


def growing(world_size: int) -> tuple[Case, ...]:
    """Return the cases of 8192 tokens a GPU, as ring-flash-attn measures; scaling.py measures these."""
    length = 8192 * world_size
    return Case("causal_8k_a_gpu", "causal", length), Case("packed_8k_a_gpu", "packed", length, documents="rfa_five")


@dataclass(frozen=True, slots=True)
class Problem:
    """A case at one size, as one rank sees it."""

    kind: str
    length: int
    bounds: tuple[int, ...]
    window: int
    rank: int
    world_size: int
    device: torch.device
    mesh: dist.DeviceMesh
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, case: Case, scale: int, mesh: dist.DeviceMesh, device: torch.device | None = None) -> Problem:
        """Return the problem of `case`, its lengths divided by `scale`, for this process; each rank has a device by default."""
        rank, world_size = mesh.get_local_rank(), mesh.size()
        if device is None:
            device = torch.device(mesh.device_type, rank) if mesh.device_type == "cuda" else torch.device("cpu")
        length = case.length // scale
        bounds = document_bounds(case.documents, length, world_size) if case.documents else (0, length)
        window = max(1, case.window // scale) if case.window else 0
        return cls(case.kind, length, bounds, window, rank, world_size, device, mesh)

    def at(self, length: int) -> Problem:
        """Return the same problem at another length, with documents and window in proportion."""
        bounds = proportional(self.bounds, length, 2 * self.world_size)
        window = max(1, self.window * length // self.length) if self.window else 0
        return replace(self, length=length, bounds=bounds, window=window)

    @property
    def is_packed(self) -> bool:
        """Whether the tokens are documents that do not see each other."""
        return self.kind == "packed"

    @property
    def documents(self) -> list[tuple[int, int]]:
        """First and one past the last token of each document."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))

    @property
    def area(self) -> float:
        """The part of the full square of scores that is computed."""
        if self.window:
            return (self.window * self.length - self.window**2 / 2) / self.length**2
        return sum((end - start) ** 2 for start, end in self.documents) / 2 / self.length**2

    def cu_seqlens(self) -> torch.Tensor:
        """The bounds as FlashAttention takes them."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    def shapes(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of q, k, v and the gradient of out."""
        q, k = (1, tokens, HEADS, HEAD_DIM), (1, tokens, KV_HEADS, HEAD_DIM)
        return q, k, k, q

    def memory_bound(self) -> int:
        """Bytes of local q, k, v, out, the gradients of these, and two blocks of keys and values."""
        q, k = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        return (4 * q + 4 * k + 4 * k) * (self.length // self.world_size) * self.dtype.itemsize


def proportional(bounds: tuple[int, ...], length: int, multiple: int) -> tuple[int, ...]:
    """Return the bounds stretched to `length`, each a multiple of `multiple`; documents that vanish are left out."""
    return tuple(sorted({round(bound * length / bounds[-1] / multiple) * multiple for bound in bounds}))


def document_bounds(name: str, length: int, world_size: int) -> tuple[int, ...]:
    """Return the bounds of a document set; every document can be cut into two chunks a rank, which peers need."""
    return proportional(DOCUMENT_SETS[name], length, 2 * world_size)


def usp_layout(has_documents: bool, inner: int) -> str:
    """Return the layout that USP is fastest with, where `inner` ranks exchange heads."""
    return of_groups("balanced", inner) if has_documents else "zig_zag"


def local_tokens(problem: Problem, layout: str) -> torch.Tensor:
    """Return which tokens the rank holds, in its order."""
    rank, world_size = problem.rank, problem.world_size
    whole = torch.arange(problem.length, device=problem.device)
    if layout == "whole":
        return whole
    if layout == "stripe":
        return whole[rank::world_size]
    if layout == "contiguous":
        return whole.chunk(world_size)[rank]
    if layout.startswith("balanced"):
        order = TokenOrder(problem.length, world_size, layout, Segments.of((problem.bounds[:-1],)))
        return order.positions(rank, problem.device)  # lengths of 2^n leave no padding
    documents = problem.documents if layout == "zig_zag_by_document" else [(0, problem.length)]
    chunks = [whole[start:end].chunk(2 * world_size) for start, end in documents]
    return torch.cat([part for chunk in chunks for part in (chunk[rank], chunk[2 * world_size - 1 - rank])])
