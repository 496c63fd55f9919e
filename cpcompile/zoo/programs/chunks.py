"""Chunks: what cuts the tokens into blocks, patches or windows of some tokens each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, Sampler
from cpcompile.zoo.programs.parts import (
    HEADS,
    VOCABULARY,
    WIDTH,
    Attention,
    Block,
    Decoder,
    join_heads,
    split_heads,
    token_loss,
)
from cpcompile.zoo.programs.registry import Program, program

SIZE = 5  # of a chunk
LENGTH = 35  # seven chunks: neither these nor tokens are divided by 2, 3 or 4 ranks


def chunked(model: nn.Module, sampler: Sampler) -> Program:
    """Return a language model with a text of whole chunks."""
    return Program(model, {"input_ids": sampler.tokens(LENGTH), "labels": sampler.labels(LENGTH)})


class Megabyte(nn.Module):
    """A large model of patches of bytes, and a small one inside each patch, which sees the bytes before its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.local_embed = nn.Embedding(VOCABULARY, WIDTH // 2), nn.Embedding(VOCABULARY, WIDTH)
        self.project, self.to_local = nn.Linear(SIZE * WIDTH // 2, 2 * WIDTH), nn.Linear(2 * WIDTH, SIZE * WIDTH)
        self.large, self.small = Block(causal=True, width=2 * WIDTH), Block(causal=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        patches = self.embed(input_ids).view(batch, length // SIZE, -1)
        patches = F.pad(self.project(patches), (0, 0, 1, -1))
        whole = self.to_local(self.large(patches)).view(batch * (length // SIZE), SIZE, WIDTH)
        inside = F.pad(input_ids.view(-1, SIZE), (1, -1))
        logits = self.head(self.small(whole + self.local_embed(inside)))
        return token_loss(logits, input_ids.view(-1, SIZE))


@program("handwritten")
def megabyte(sampler: Sampler) -> Program:
    return Program(Megabyte(), {"input_ids": sampler.tokens(LENGTH)})


class BlockLocal(Attention):
    """Each block of tokens attends to itself: blocks are rows of the batch."""

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        return super().forward(x.reshape(batch * length // SIZE, SIZE, width)).reshape(batch, length, width)


@program("handwritten")
def block_local_attention(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(BlockLocal(causal=True)), Block(causal=True)), sampler)


class StridedAttention(Attention):
    """The sparse transformer: each token attends to those at its own place in all blocks."""

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        columns = x.view(batch, length // SIZE, SIZE, width).transpose(1, 2).reshape(batch * SIZE, -1, width)
        return super().forward(columns).view(batch, SIZE, -1, width).transpose(1, 2).reshape(batch, length, width)


@program("handwritten")
def strided_attention(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(BlockLocal(causal=True)), Block(StridedAttention(causal=True))), sampler)


class LookBack(nn.Module):
    """Local attention of blocks to themselves and the block before: queries `[B, H, T/p, p, D]`, keys of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (split_heads(t).unflatten(2, (length // SIZE, SIZE)) for t in self.qkv(x).chunk(3, dim=-1))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3) for t in (k, v))
        steps = torch.arange(length, device=x.device).view(length // SIZE, SIZE)
        seen = torch.cat([F.pad(steps, (0, 0, 1, 0), value=-1)[:-1], steps], dim=1)
        hidden = (seen[:, None, :] > steps[:, :, None]) | (seen[:, None, :] == -1)
        scores = torch.einsum("bhnid,bhnjd->bhnij", q, k) / 2
        weights = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max).softmax(dim=-1)
        return self.out(join_heads(torch.einsum("bhnij,bhnjd->bhnid", weights, v).flatten(2, 3)))


@program("handwritten")
def local_attention_looks_back(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(LookBack()), Block(LookBack())), sampler)


class Unfolded(nn.Module):
    """Sliding windows as views: each token's last keys by `unfold` of padded keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        k, v = (F.pad(t, (0, 0, SIZE - 1, 0)).unfold(2, SIZE, 1) for t in (k, v))
        steps = torch.arange(x.shape[1], device=x.device)[:, None] + torch.arange(1 - SIZE, 1, device=x.device)
        scores = torch.einsum("bhid,bhidj->bhij", q, k) / 2
        weights = scores.masked_fill(steps < 0, float("-inf")).softmax(-1)
        return self.out(join_heads(torch.einsum("bhij,bhidj->bhid", weights, v)))


@program("handwritten")
def window_by_unfold(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(Unfolded()), Block(Unfolded())), sampler)


class Compressed(nn.Module):
    """Native sparse attention's coarse part: keys and values are the means of blocks, seen when a block is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first = nn.Parameter(torch.randn(2, 1, HEADS, 1, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        k, v = (t.unflatten(2, (-1, SIZE)).mean(dim=3) for t in (k, v))
        k, v = (torch.cat([first.expand(batch, -1, -1, -1), t], 2) for first, t in zip(self.first, (k, v), strict=True))
        ends = F.pad(torch.arange(1, length // SIZE + 1, device=x.device) * SIZE, (1, 0))
        mask = ends[None, :] <= torch.arange(length, device=x.device)[:, None] + 1
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@program("handwritten")
def compressed_keys(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(Compressed()), Block(causal=True)), sampler)


class Hourglass(nn.Module):
    """Tokens are shifted and pooled by blocks, the short text is computed and repeated, and added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.first, self.middle, self.last = Block(causal=True), Block(causal=True), Block(causal=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids))
        shifted = F.pad(x, (0, 0, SIZE - 1, 0))[:, : x.shape[1]]
        short = shifted.reshape(x.shape[0], -1, SIZE, WIDTH).mean(dim=2)
        x = x + self.middle(short).repeat_interleave(SIZE, dim=1)
        return token_loss(self.head(self.last(x)), labels)


@program("handwritten")
def hourglass(sampler: Sampler) -> Program:
    return chunked(Hourglass(), sampler)


class Retro(nn.Module):
    """Chunked cross attention: each chunk of the text attends to neighbours that were found for the chunk before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.block, self.cross, self.last = Block(causal=True), Attention(), Block(causal=True)

    def forward(self, input_ids: Tensor, neighbours: Tensor, labels: Tensor) -> Tensor:
        batch, length = input_ids.shape
        x = self.block(self.embed(input_ids))
        found = self.embed(neighbours).flatten(0, 1)  # [B * chunks, tokens of the neighbours, D]
        attending = F.pad(x[:, SIZE - 1 :], (0, 0, 0, SIZE - 1)).reshape(batch * (length // SIZE), SIZE, WIDTH)
        got = self.cross(attending, found).reshape(batch, length, WIDTH)
        x = x + F.pad(got, (0, 0, SIZE - 1, 0))[:, :length]
        return token_loss(self.head(self.last(x)), labels)


@program("handwritten")
def retro_chunked_cross_attention(sampler: Sampler) -> Program:
    neighbours = sampler.tokens(LENGTH // SIZE * 6).view(BATCH, LENGTH // SIZE, 6)
    inputs = {"input_ids": sampler.tokens(LENGTH), "neighbours": neighbours, "labels": sampler.labels(LENGTH)}
    return Program(Retro(), inputs)


class MixtureOfDepths(nn.Module):
    """Only the tokens that a router picks are computed by a block, and are put back at their places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.router, self.block, self.last = nn.Linear(WIDTH, 1), Block(causal=True), Block(causal=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = self.router(x).squeeze(-1)
        weights, places = torch.topk(scores, 11, dim=1, sorted=False)
        places, order = places.sort(dim=1)
        index = places[..., None].expand(-1, -1, WIDTH)
        picked = torch.gather(x, 1, index)
        done = self.block(picked) * torch.gather(weights, 1, order)[..., None].sigmoid()
        return token_loss(self.head(self.last(x.scatter_add(1, index, done))), labels)


@program("handwritten")
def mixture_of_depths(sampler: Sampler) -> Program:
    return chunked(MixtureOfDepths(), sampler)
