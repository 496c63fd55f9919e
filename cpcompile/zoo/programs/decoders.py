"""Decoders: language models as people write them, with the masks and softmaxes that they write by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import Sampler
from cpcompile.zoo.programs.parts import (
    HEADS,
    MLP,
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


def language(model: nn.Module, sampler: Sampler) -> Program:
    """Return a language model with ids and labels."""
    return Program(model, {"input_ids": sampler.tokens(), "labels": sampler.labels()})


class Scores(Attention):
    """Causal attention by hand; `weigh` is what a program does with the scores `[B, H, S, S]`."""

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(part) for part in (self.query(x), self.key(x), self.value(x)))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return self.out(join_heads(self.weigh(scores) @ v))

    def weigh(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class NanoGPTAttention(nn.Module):
    """Queries, keys and values in one product, cut apart; the mask is a buffer as long as the longest text."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.flash = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), flash
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))  # type: ignore[index]
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoGPT(nn.Module):
    """Tied weights, positions from an arange, a loss that ignores -1."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(NanoGPTAttention(flash)) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


@program("handwritten")
def nanogpt(sampler: Sampler) -> Program:
    return Program(NanoGPT(flash=True), {"idx": sampler.tokens(), "targets": sampler.labels().clamp(min=-1)})


@program("handwritten")
def nanogpt_slow_attention(sampler: Sampler) -> Program:
    return Program(NanoGPT(flash=False), {"idx": sampler.tokens(), "targets": sampler.labels().clamp(min=-1)})


class MetaLlamaAttention(nn.Module):
    """Rotary positions by complex numbers, two key heads repeated for four, scores plus a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, HEADS, WIDTH // HEADS)
        xk, xv = (t.view(bsz, seqlen, HEADS // 2, WIDTH // HEADS) for t in (xk, xv))
        xq, xk = rotate(xq, freqs_cis), rotate(xk, freqs_cis)
        keys, values = (
            t[:, :, :, None, :].expand(bsz, seqlen, HEADS // 2, 2, WIDTH // HEADS).reshape(xq.shape) for t in (xk, xv)
        )
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(WIDTH // HEADS) + mask
        output = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(xq), values)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn pairs of `x` `[B, S, H, D]`, as complex numbers."""
    x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, x_.shape[1], 1, x_.shape[-1])
    return torch.view_as_real(x_ * freqs_cis).flatten(3).type_as(x)


class MetaLlama(nn.Module):
    """The mask is stacked beside zeros for tokens that are cached already: none in training."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(MetaLlamaAttention()) for _ in range(2))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        freqs = 1.0 / (10000.0 ** (torch.arange(0, 4, 2).float() / 4))
        angles = torch.outer(torch.arange(64).float(), freqs)
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens: Tensor, labels: Tensor, start_pos: int = 0) -> Tensor:
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis.to(h.device)[start_pos : start_pos + seqlen]
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=1)
        mask = torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, freqs_cis, mask)
        return token_loss(self.output(self.norm(h)).float(), labels)


@program("handwritten")
def meta_llama(sampler: Sampler) -> Program:
    return Program(MetaLlama(), {"tokens": sampler.tokens(), "labels": sampler.labels()})


class BiasTable(nn.Module):
    """MPT: a table of ALiBi for the longest text, cut to the last rows and columns; the causal mask is another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        slopes = 1.0 / 2 ** (torch.arange(1, HEADS + 1) * 8 / HEADS)
        distance = torch.arange(1 - 64, 1).view(1, 1, 1, 64)
        self.register_buffer("attn_bias", distance * slopes.view(1, HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.Wqkv(x).chunk(3, dim=2))
        weight = q.matmul(k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        s_q, s_k = q.size(2), k.size(2)
        bias: Tensor = self.attn_bias  # type: ignore[assignment]
        weight = weight + bias[:, :, max(0, bias.size(2) - s_q) :, max(0, bias.size(3) - s_k) :]
        s = max(s_q, s_k)
        causal_mask = weight.new_ones(s, s, dtype=torch.bool).tril().logical_not()[-s_q:, -s_k:]
        weight = weight.masked_fill(causal_mask.view(1, 1, s_q, s_k), torch.finfo(q.dtype).min)
        return self.out_proj(join_heads(torch.softmax(weight, dim=-1).matmul(v)))


@program("handwritten")
def mpt_bias_table(sampler: Sampler) -> Program:
    return language(Decoder(*(Block(BiasTable()) for _ in range(2))), sampler)


class MinusMaximum(Scores):
    def weigh(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        scores = scores + torch.full((length, length), -1e9, device=scores.device).triu(1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return scores.softmax(-1)


@program("handwritten")
def scores_minus_maximum(sampler: Sampler) -> Program:
    return language(Decoder(Block(MinusMaximum()), Block(MinusMaximum())), sampler)


class MultipliedMask(Scores):
    """The first GPT-2: one minus the mask, times a large number."""

    def weigh(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        mask = torch.tril(torch.ones(length, length, device=scores.device, dtype=scores.dtype)).view(
            1, 1, length, length
        )
        return torch.softmax(scores * mask - 1e10 * (1 - mask), dim=-1)


@program("handwritten")
def multiplied_mask(sampler: Sampler) -> Program:
    return language(Decoder(Block(MultipliedMask()), Block(MultipliedMask())), sampler)


class WhereTril(Scores):
    def weigh(self, scores: Tensor) -> Tensor:
        mask = torch.tril(torch.ones_like(scores, dtype=torch.bool))
        return torch.where(mask, scores, float("-inf")).softmax(dim=-1)


@program("handwritten")
def where_tril(sampler: Sampler) -> Program:
    return language(Decoder(Block(WhereTril()), Block(WhereTril())), sampler)


class WrittenOut(Scores):
    """A softmax by hand: exponentials of visible scores over their sum."""

    def weigh(self, scores: Tensor) -> Tensor:
        mask = torch.tril(torch.ones(scores.shape[-2:], device=scores.device, dtype=scores.dtype))
        weights = torch.exp(scores) * mask
        return weights / weights.sum(dim=-1, keepdim=True)


@program("handwritten")
def softmax_written_out(sampler: Sampler) -> Program:
    return language(Decoder(Block(WrittenOut()), Block(WrittenOut())), sampler)


class StableWrittenOut(Scores):
    """The same with the maximum taken off, masked again after, and a small number below the fraction."""

    def weigh(self, scores: Tensor) -> Tensor:
        mask = torch.ones(scores.shape[-2:], device=scores.device, dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
        weights = weights.masked_fill(~mask, 0.0)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)


@program("handwritten")
def stable_softmax_written_out(sampler: Sampler) -> Program:
    return language(Decoder(Block(StableWrittenOut()), Block(StableWrittenOut())), sampler)


class PaddedEncoder(nn.Module):
    """Rows of padding see nothing: their softmax is NaN, and becomes 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (split_heads(part(x)) for part in (self.query, self.key, self.value))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / 2
        visible = attention_mask[:, None, :, None].bool() & attention_mask[:, None, None, :].bool()
        weights = torch.nan_to_num(scores.masked_fill(~visible, float("-inf")).softmax(dim=-1))
        return token_loss(self.head(x + join_heads(torch.einsum("bhij,bhjd->bhid", weights, v))), labels)


@program("handwritten")
def nan_to_num_of_softmax(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "labels": sampler.labels(), "attention_mask": torch.ones(2, 37).long()}
    inputs["attention_mask"][1, 29:] = 0
    return Program(PaddedEncoder(), inputs)


class TalkingHeads(Scores):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Parameter(torch.randn(HEADS, HEADS))

    def weigh(self, scores: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", scores, self.before)
        mask = torch.ones(scores.shape[-2:], device=scores.device, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, -torch.finfo(scores.dtype).max).softmax(dim=-1)
        return torch.einsum("bhij,hg->bgij", weights, self.after)


@program("handwritten")
def talking_heads(sampler: Sampler) -> Program:
    return language(Decoder(Block(TalkingHeads()), Block(TalkingHeads())), sampler)


class ResidualScores(nn.Module):
    """RealFormer: each layer adds the scores of the one before to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device).triu(1)
        previous: Tensor | float = 0.0
        for qkv in self.qkv:
            q, k, v = (split_heads(t) for t in qkv(x).chunk(3, dim=-1))
            previous = q @ k.mT / 2 + previous
            x = x + join_heads((previous + mask).softmax(-1) @ v)
        return token_loss(self.head(x), labels)


@program("handwritten")
def residual_scores(sampler: Sampler) -> Program:
    return language(ResidualScores(), sampler)


class RelativeShift(nn.Module):
    """Transformer-XL: scores against distances, which a pad, a view and a slice bring to their columns."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.distance = nn.Linear(WIDTH, WIDTH)
        self.u, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        steps = torch.arange(length - 1, -1, -1.0, device=x.device)
        angles = steps[:, None] / 10000 ** (torch.arange(0, WIDTH, 2, device=x.device) / WIDTH)
        r = self.distance(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype))
        q, k, v = self.query(x), self.key(x), self.value(x)
        content = split_heads(q + self.u) @ split_heads(k).mT
        place = split_heads(q + self.v_bias) @ split_heads(r[None]).mT
        scores = content + self.shift(place)
        mask = torch.ones(length, length, device=x.device, dtype=torch.bool).triu(1)
        return join_heads(
            (scores / 2).masked_fill(mask, -1e30).softmax(-1) @ v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        )

    def shift(self, x: Tensor) -> Tensor:
        batch, heads, rows, columns = x.shape
        padded = F.pad(x, (1, 0)).view(batch, heads, columns + 1, rows)
        return padded[:, :, 1:].view_as(x)


@program("handwritten")
def transformer_xl_relative_shift(sampler: Sampler) -> Program:
    return language(Decoder(Block(RelativeShift())), sampler)


class ClippedDistances(Scores):
    """Shaw: an embedding of each distance, at most eight, for keys: `[S, S, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Embedding(17, WIDTH // HEADS)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(part) for part in (self.query(x), self.key(x), self.value(x)))
        steps = torch.arange(x.shape[1], device=x.device)
        table = self.distances((steps[None, :] - steps[:, None]).clamp(-8, 8) + 8)
        scores = (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table)) / 2
        scores = scores.masked_fill(steps[None, :] > steps[:, None], float("-inf"))
        return self.out(join_heads(scores.softmax(-1) @ v))


@program("handwritten")
def shaw_relative_positions(sampler: Sampler) -> Program:
    return language(Decoder(Block(ClippedDistances())), sampler)


class Twice(nn.Module):
    """A universal transformer: one block, used twice, told how often by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.times = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.block = Block(causal=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for step in range(2):
            x = self.block(x + self.times.weight[step])
        return token_loss(x @ self.embed.weight.T, labels)


@program("handwritten")
def weights_used_twice(sampler: Sampler) -> Program:
    return language(Twice(), sampler)


class PrefixLM(nn.Module):
    """Each row sees its own prefix both ways; what follows is causal, and only that has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(VOCABULARY, WIDTH), Block(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, prefix_lengths: Tensor, labels: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = steps[:, None] >= steps[None, :]
        in_prefix = steps[None, :] < prefix_lengths[:, None]
        mask = causal[None] | in_prefix[:, None, :]
        logits = self.head(self.block(self.embed(input_ids), None, mask[:, None]))
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        weight = (~in_prefix).to(losses.dtype)
        return (losses * weight).sum() / weight.sum()


@program("handwritten")
def prefix_lm(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "labels": sampler.tokens(), "prefix_lengths": torch.tensor([9, 20])}
    return Program(PrefixLM(), inputs)


class Documents(nn.Module):
    """Packed documents: who sees whom by equal ids, positions by a cumulative maximum of the starts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.block, self.head = Block(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        ends = (input_ids == 3).long()
        documents = ends.cumsum(1) - ends
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        starts = torch.where(F.pad(ends, (1, 0))[:, :-1].bool(), steps, 0).cummax(1).values
        same = documents[:, :, None] == documents[:, None, :]
        mask = same & torch.ones_like(same).tril()
        x = self.embed(input_ids) + self.position(steps - starts)
        return token_loss(self.head(self.block(x, None, mask[:, None])), labels)


@program("handwritten")
def packed_by_end_of_text(sampler: Sampler) -> Program:
    ids = sampler.tokens()
    ids[0, [8, 25]], ids[1, 19] = 3, 3
    return Program(Documents(), {"input_ids": ids, "labels": sampler.labels()})


class DifferentialAttention(nn.Module):
    """The difference of two softmaxes weighs the values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weight, self.norm = nn.Parameter(torch.randn(1)), nn.RMSNorm(2 * WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k = (t.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for t in (self.query(x), self.key(x)))
        v = self.value(x).view(batch, length, HEADS // 2, 2 * WIDTH // HEADS).transpose(1, 2)
        mask = torch.triu(torch.zeros(length, length, device=x.device).float().fill_(float("-inf")), 1).type_as(x)
        weights = F.softmax(q @ k.mT / 2 + mask, dim=-1).view(batch, HEADS // 2, 2, length, length)
        difference = weights[:, :, 0] - self.weight * weights[:, :, 1]
        return self.norm(difference @ v).transpose(1, 2).reshape(batch, length, WIDTH)


@program("handwritten")
def differential_attention(sampler: Sampler) -> Program:
    return language(Decoder(Block(DifferentialAttention())), sampler)


class PostNormEncoderDecoder(nn.Module):
    """PyTorch's own transformer, with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, src: Tensor, tgt: Tensor, labels: Tensor) -> Tensor:
        padding = src == 0
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], device=tgt.device)
        x = self.transformer(
            self.source(src) * 4,
            self.target(tgt) * 4,
            tgt_mask=causal.to(self.source.weight.dtype),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return token_loss(self.generator(x), labels)


@program("handwritten")
def torch_transformer(sampler: Sampler) -> Program:
    src = sampler.tokens()
    src[1, 30:] = 0
    inputs = {"src": src, "tgt": sampler.tokens(29), "labels": sampler.labels(29)}
    return Program(PostNormEncoderDecoder(), inputs, {"token_dims": {"src": 1, "tgt": 1}})


class SoftMixture(nn.Module):
    """Mixtral as first written: for each expert, the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4, bias=False), nn.ModuleList(MLP() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), 2)
        weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            result[rows] += weights[rows, place, None] * expert(flat[rows])
        return result.view_as(x)


class Then(nn.Module):
    """A block of causal attention with another MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm = Attention(causal=True), mlp, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


@program("handwritten")
def mixture_in_a_loop(sampler: Sampler) -> Program:
    return language(Decoder(Then(SoftMixture())), sampler)


class MaskedMixture(SoftMixture):
    """Every expert computes every token, weighed by 0 where it was not chosen."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.gate(x).softmax(-1), 2, dim=-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = torch.where(chosen == number, weights, 0).sum(-1, keepdim=True)
            result = result + weight * expert(x)
        return result


@program("handwritten")
def mixture_by_masks(sampler: Sampler) -> Program:
    return language(Decoder(Then(MaskedMixture())), sampler)


class SwitchMixture(SoftMixture):
    """Switch: a place in the queue of its expert by a cumulative sum over all tokens; late tokens are dropped."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        probabilities = self.gate(flat).softmax(-1)
        chosen = F.one_hot(probabilities.argmax(-1), 4).to(x.dtype)
        place = chosen.cumsum(0) * chosen - 1
        capacity = 24
        queue = F.one_hot(place.clamp(0, capacity - 1).long(), capacity).to(x.dtype)
        dispatch = queue * (chosen * (place < capacity))[..., None]
        given = torch.einsum("nec,nd->ecd", dispatch, flat)
        done = torch.stack([expert(given[number]) for number, expert in enumerate(self.experts)])
        combine = dispatch * probabilities.amax(-1)[:, None, None]
        return torch.einsum("nec,ecd->nd", combine, done).view_as(x)


@program("handwritten")
def switch_with_capacity(sampler: Sampler) -> Program:
    return language(Decoder(Then(SwitchMixture())), sampler)
