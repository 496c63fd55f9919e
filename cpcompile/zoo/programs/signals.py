"""Signals: time series, sound, recommendation and tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, LENGTH, Sampler
from cpcompile.zoo.programs.parts import (
    HEADS,
    MLP,
    VOCABULARY,
    WIDTH,
    Attention,
    Block,
    join_heads,
    split_heads,
    token_loss,
)
from cpcompile.zoo.programs.registry import Program, program

PATCH = 5


class PatchTST(nn.Module):
    """Each variable is a row of the batch, normalised over its past; its patches overlap, a head reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(PATCH, WIDTH), nn.Parameter(torch.randn(1, 23, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(23 * WIDTH, 6)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        x = past.transpose(1, 2)
        mean, spread = (
            x.mean(-1, keepdim=True).detach(),
            (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach(),
        )
        x = F.pad((x - mean) / spread, (0, 2), mode="replicate").unfold(-1, PATCH, 2)
        batch, variables = x.shape[:2]
        x = self.blocks(self.embed(x).flatten(0, 1) + self.position)
        said = self.head(x.flatten(1)).view(batch, variables, 6) * spread + mean
        return F.mse_loss(said.transpose(1, 2), future)


def series(model: nn.Module, s: Sampler, length: int, token_dims: dict[str, int]) -> Program:
    """Return a model of a series of three variables."""
    inputs = {"past": s.normal(BATCH, length, 3).cumsum(1), "future": s.normal(BATCH, 6, 3)}
    return Program(model, inputs, {"token_dims": token_dims})


@program("science")
def patch_tst(s: Sampler) -> Program:
    return series(PatchTST(), s, 47, {"past": 1})


class Inverted(nn.Module):
    """iTransformer: each variable is a token, whose past is embedded whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(20, WIDTH), nn.Sequential(Block(), Block()), nn.Linear(WIDTH, 6)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        mean, spread = past.mean(1, keepdim=True).detach(), past.std(1, keepdim=True).detach() + 1e-5
        x = self.blocks(self.embed(((past - mean) / spread).transpose(1, 2)))
        return F.mse_loss(self.head(x).transpose(1, 2) * spread + mean, future)


@program("science")
def inverted_transformer(s: Sampler) -> Program:
    inputs = {"past": s.normal(BATCH, 20, 37), "future": s.normal(BATCH, 6, 37)}
    return Program(Inverted(), inputs, {"token_dims": {"past": 2}})


class Sparse(nn.Module):
    """Informer: only the queries with the most uneven scores attend, the others take the mean of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        sampled = q @ k[:, :, ::3].mT
        top = (sampled.amax(-1) - sampled.mean(-1)).topk(7, sorted=False).indices
        index = top[..., None].expand(-1, -1, -1, q.shape[-1])
        found = (q.gather(2, index) @ k.mT / 2).softmax(-1) @ v
        return self.out(join_heads(v.mean(2, keepdim=True).expand_as(v).scatter(2, index, found)))


class Informer(nn.Module):
    """An encoder that halves the series, and a decoder that begins with its end and has zeros for what is to come."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, WIDTH, 3, padding=1, padding_mode="circular")
        self.encoder, self.last = Block(Sparse() if sparse else None), Block()
        self.shorten = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.decoder, self.cross, self.head = Block(causal=True), Attention(), nn.Linear(WIDTH, 3)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        x = self.encoder(self.embed(past.transpose(1, 2)).transpose(1, 2))
        short = F.max_pool1d(F.elu(self.shorten(x.transpose(1, 2))), 3, stride=2, padding=1).transpose(1, 2)
        memory = self.last(short)
        begun = torch.cat([past[:, -8:], torch.zeros_like(future)], dim=1)
        y = self.decoder(self.embed(begun.transpose(1, 2)).transpose(1, 2))
        return F.mse_loss(self.head(y + self.cross(y, memory))[:, -future.shape[1] :], future)


@program("science")
def informer(s: Sampler) -> Program:
    return series(Informer(sparse=True), s, LENGTH, {"past": 1})


@program("science")
def informer_dense(s: Sampler) -> Program:
    return series(Informer(sparse=False), s, LENGTH, {"past": 1})


class Autoformer(nn.Module):
    """Moving means are taken off, and the series is correlated with itself by Fourier transforms; the best lags are added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def trend(self, x: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (2, 2), mode="replicate")
        return F.avg_pool1d(padded, 5, stride=1).transpose(1, 2)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        x = self.embed(past - self.trend(past))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
        correlation = torch.fft.irfft(spectrum, n=x.shape[1], dim=1).mean(-1)
        weights, lags = correlation.topk(3, dim=-1)
        places = (torch.arange(x.shape[1], device=x.device)[None, :, None] + lags[:, None]) % x.shape[1]
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        y = (v[rows, places] * weights.softmax(-1)[:, None, :, None]).sum(2)
        return F.mse_loss(self.head(x + y)[:, -6:] + self.trend(past)[:, -6:], future)


@program("science")
def autoformer(s: Sampler) -> Program:
    return series(Autoformer(), s, LENGTH, {"past": 1})


class Patches(nn.Module):
    """TimesFM: patches of one series in a decoder; each says the next ones, normalised by the first patch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(2 * PATCH, WIDTH),
            nn.Sequential(Block(causal=True), Block(causal=True)),
            nn.Linear(WIDTH, PATCH),
        )

    def forward(self, series: Tensor, padding: Tensor) -> Tensor:
        x, hidden = series.unflatten(1, (-1, PATCH)), padding.unflatten(1, (-1, PATCH))
        mean, spread = x[:, :1].mean(-1, keepdim=True), x[:, :1].std(-1, keepdim=True) + 1e-6
        x = (x - mean) / spread * (1 - hidden)
        said = self.head(self.blocks(self.embed(torch.cat([x, hidden], dim=-1))))
        errors = (said[:, :-1] - x[:, 1:]).pow(2) * (1 - hidden[:, 1:])
        return errors.sum() / (1 - hidden[:, 1:]).sum()


@program("science")
def patched_decoder(s: Sampler) -> Program:
    padding = torch.zeros(BATCH, 7 * PATCH)
    padding[1, -8:] = 1
    return Program(
        Patches(), {"series": s.normal(BATCH, 7 * PATCH).cumsum(1), "padding": padding}, {"token_dims": {"series": 1}}
    )


class Quantised(nn.Module):
    """Chronos: values over their mean size become bins, which a language model says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(-3, 3, 31))
        self.embed, self.blocks, self.head = (
            nn.Embedding(32, WIDTH),
            nn.Sequential(Block(causal=True), Block(causal=True)),
            nn.Linear(WIDTH, 32),
        )

    def forward(self, series: Tensor) -> Tensor:
        scaled = series / series.abs().mean(dim=1, keepdim=True)
        bins = torch.bucketize(scaled, self.edges)  # type: ignore[arg-type]
        return token_loss(self.head(self.blocks(self.embed(bins)))[:, :-1], bins[:, 1:])


@program("science")
def quantised_series(s: Sampler) -> Program:
    return Program(Quantised(), {"series": s.normal(BATCH, LENGTH).cumsum(1)}, {"token_dims": {"series": 1}})


class SASRec(nn.Module):
    """Items that were bought: the next one against one that was not, padding left out of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0), nn.Embedding(64, WIDTH)
        self.attention, self.mlp, self.norm = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
            MLP(),
            nn.LayerNorm(WIDTH),
        )

    def forward(self, items: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        length = items.shape[1]
        x = self.item(items) * math.sqrt(WIDTH) + self.position(torch.arange(length, device=items.device))
        padding = items == 0
        x = x * ~padding.unsqueeze(-1)
        mask = ~torch.tril(torch.ones((length, length), dtype=torch.bool, device=items.device))
        q = self.norm(x)
        x = (x + self.attention(q, x, x, attn_mask=mask, need_weights=False)[0]) * ~padding.unsqueeze(-1)
        x = x + self.mlp(x)
        good, bad = (x * self.item(positive)).sum(-1), (x * self.item(negative)).sum(-1)
        losses = F.softplus(-good) + F.softplus(bad)
        return losses[positive != 0].mean()


@program("science")
def sasrec(s: Sampler) -> Program:
    inputs = {"items": s.tokens(), "positive": s.tokens(), "negative": s.tokens()}
    for items in inputs.values():
        items[1, :11] = 0
    return Program(SASRec(), inputs)


class BERT4Rec(nn.Module):
    """Hidden items from both sides; the head has the weights of the items, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.position, self.bias = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Parameter(torch.randn(1, LENGTH, WIDTH)),
            nn.Parameter(torch.zeros(VOCABULARY)),
        )
        self.block = Block()

    def forward(self, items: Tensor, labels: Tensor) -> Tensor:
        mask = (items > 0).unsqueeze(1).repeat(1, items.size(1), 1).unsqueeze(1)
        x = self.block(self.item(items) + self.position, None, mask)
        return F.cross_entropy(
            (x @ self.item.weight.T + self.bias).view(-1, VOCABULARY), labels.view(-1), ignore_index=0
        )


@program("science")
def bert4rec(s: Sampler) -> Program:
    items = s.tokens()
    items[1, :11] = 0
    return Program(BERT4Rec(), {"items": items, "labels": s.labels().clamp(min=0)})


class TargetAttention(nn.Module):
    """DIN: a network of each item of the past and the item in question says its weight; weights are not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.weigh, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Sequential(nn.Linear(4 * WIDTH, 8), nn.PReLU(), nn.Linear(8, 1)),
            nn.Linear(3 * WIDTH, 1),
        )

    def forward(self, history: Tensor, target: Tensor, clicked: Tensor) -> Tensor:
        past, item = self.item(history), self.item(target)
        each = item.unsqueeze(1).expand_as(past)
        weights = self.weigh(torch.cat([past, each, past - each, past * each], dim=-1))
        weights = weights.masked_fill((history == 0).unsqueeze(-1), 0)
        interest = (weights * past).sum(dim=1)
        logit = self.head(torch.cat([interest, item, interest * item], dim=-1)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logit, clicked)


@program("science")
def target_attention(s: Sampler) -> Program:
    history = s.tokens()
    history[1, 25:] = 0
    inputs = {"history": history, "target": torch.tensor([5, 17]), "clicked": torch.tensor([1.0, 0.0])}
    return Program(TargetAttention(), inputs)


class BehaviourSequence(nn.Module):
    """BST: the item in question is the last of the sequence; all that comes out is read by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.block, self.head = Block(), nn.Linear((LENGTH + 1) * WIDTH, 1)

    def forward(self, history: Tensor, target: Tensor, clicked: Tensor) -> Tensor:
        items = torch.cat([history, target.unsqueeze(1)], dim=1)
        x = self.block(self.item(items) + self.position.weight[: items.shape[1]])
        return F.binary_cross_entropy_with_logits(self.head(x.flatten(1)).squeeze(-1), clicked)


@program("science")
def behaviour_sequence(s: Sampler) -> Program:
    made = target_attention(s)
    return Program(BehaviourSequence(), made.inputs)


class HSTU(nn.Module):
    """Pointwise attention: a SiLU of scores over the length, biased by places and by time between items, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.uvqk = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.places, self.between = nn.Parameter(torch.randn(2 * LENGTH)), nn.Parameter(torch.randn(12))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, items: Tensor, timestamps: Tensor, labels: Tensor) -> Tensor:
        x, length = self.item(items), items.shape[1]
        u, v, q, k = F.silu(self.uvqk(x)).chunk(4, dim=-1)
        steps = torch.arange(length, device=items.device)
        bias = self.places[steps[:, None] - steps[None, :] + length - 1]
        apart = (timestamps[:, :, None] - timestamps[:, None, :]).abs().clamp(min=1)
        bias = bias + self.between[(apart.log() / 0.7).long().clamp(0, 11)]
        weights = F.silu(split_heads(q) @ split_heads(k).mT + bias[:, None]) / length
        weights = weights * torch.tril(torch.ones(length, length, device=x.device))
        x = x + self.out(self.norm(join_heads(weights @ split_heads(v))) * u)
        return token_loss(x @ self.item.weight.T, labels)


@program("science")
def hstu(s: Sampler) -> Program:
    timestamps = (s.normal(BATCH, LENGTH).abs() * 50).cumsum(1)
    return Program(
        HSTU(), {"items": s.tokens(), "timestamps": timestamps, "labels": s.labels()}, {"token_dims": {"items": 1}}
    )


class Wav2Vec(nn.Module):
    """Strided convolutions of a wave, positions by a grouped convolution, hidden frames told apart from others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList(nn.Conv1d(a, WIDTH, k, stride=s) for a, k, s in ((1, 5, 3), (WIDTH, 3, 2)))
        self.norm_stem, self.mask = nn.GroupNorm(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.position, self.blocks = nn.Conv1d(WIDTH, WIDTH, 8, padding=4, groups=4), nn.Sequential(Block(), Block())
        self.norm, self.final = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, wave: Tensor, hidden: Tensor, negatives: Tensor) -> Tensor:
        x = F.gelu(self.norm_stem(self.stem[0](wave.unsqueeze(1))))
        x = self.norm(F.gelu(self.stem[1](x)).transpose(1, 2))
        truth = x.detach()
        x = torch.where(hidden.unsqueeze(-1), self.mask, x)
        x = x + F.gelu(self.position(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
        y = self.final(self.blocks(x))
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        others = torch.cat([truth.unsqueeze(2), truth[rows, negatives]], dim=2)
        logits = F.cosine_similarity(y.unsqueeze(2), others, dim=-1) / 0.1
        losses = F.cross_entropy(
            logits.flatten(0, 1), hidden.new_zeros(hidden.numel(), dtype=torch.long), reduction="none"
        )
        return (losses * hidden.flatten()).sum() / hidden.sum()


@program("science")
def wav2vec(s: Sampler) -> Program:
    frames = 35
    negatives = s.tokens(frames * 4).view(BATCH, frames, 4) % frames
    inputs = {"wave": s.normal(BATCH, 6 * frames + 5), "hidden": s.normal(BATCH, frames) > 0, "negatives": negatives}
    return Program(Wav2Vec(), inputs, {"token_dims": {"wave": 1}})


class Whisper(nn.Module):
    """Two convolutions of a spectrogram, sinusoids, an encoder, and a decoder of words."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(8, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.register_buffer("position", torch.randn(LENGTH, WIDTH))
        self.encoder, self.embed, self.places = Block(), nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.decoder, self.cross = Block(causal=True), Attention()

    def forward(self, mel: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).permute(0, 2, 1)
        memory = self.encoder(x + self.position)  # type: ignore[operator]
        y = self.decoder(self.embed(tokens) + self.places.weight[: tokens.shape[-1]])
        return token_loss((y + self.cross(y, memory)) @ self.embed.weight.T, labels)


@program("science")
def whisper(s: Sampler) -> Program:
    inputs = {"mel": s.normal(BATCH, 8, 2 * LENGTH), "tokens": s.tokens(29), "labels": s.labels(29)}
    return Program(Whisper(), inputs, {"token_dims": {"mel": 2, "tokens": 1}})


@program("science")
def whisper_of_words(s: Sampler) -> Program:
    inputs = {"mel": s.normal(BATCH, 8, 2 * LENGTH), "tokens": s.tokens(29), "labels": s.labels(29)}
    return Program(Whisper(), inputs, {"token_dims": {"tokens": 1}})


class Conformer(nn.Module):
    """Subsampling in two dims, halves of MLPs, attention of given lengths, a gated depthwise convolution, CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.sample, self.embed = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Linear(16, WIDTH)
        self.first, self.last, self.attention = MLP(), MLP(), Attention()
        self.gate, self.depthwise, self.out = (
            nn.Conv1d(WIDTH, 2 * WIDTH, 1),
            nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH),
            nn.Conv1d(WIDTH, WIDTH, 1),
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, mel: Tensor, lengths: Tensor, words: Tensor, word_lengths: Tensor) -> Tensor:
        x = F.relu(self.sample(mel.unsqueeze(1)))
        x = self.embed(x.transpose(1, 2).flatten(2))
        short = (lengths + 1) // 2
        there = torch.arange(x.shape[1], device=x.device) < short[:, None]
        x = x + 0.5 * self.first(x)
        x = x + self.attention(self.norm(x), None, there[:, None, None, :])
        y = F.glu(self.gate((x * there.unsqueeze(-1)).transpose(1, 2)), dim=1)
        x = x + self.out(F.silu(self.depthwise(y))).transpose(1, 2)
        x = x + 0.5 * self.last(x)
        return F.ctc_loss(self.head(x).log_softmax(-1).transpose(0, 1), words, short, word_lengths)


@program("science")
def conformer(s: Sampler) -> Program:
    inputs = {"mel": s.normal(BATCH, 2 * LENGTH, 8), "lengths": torch.tensor([2 * LENGTH, 60])}
    inputs |= {"words": s.tokens(7) % 11 + 1, "word_lengths": torch.tensor([7, 5])}
    return Program(Conformer(), inputs, {"token_dims": {"mel": 1}})


class Spectrogram(nn.Module):
    """A band-split model of sound: attention along time for each band, then along bands for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(width, WIDTH) for width in (2, 4, 6))
        self.out = nn.ModuleList(nn.Linear(WIDTH, width) for width in (2, 4, 6))
        self.time, self.bands = Block(), Block()

    def forward(self, spectrum: Tensor, clean: Tensor) -> Tensor:
        bands = spectrum.split((2, 4, 6), dim=-1)
        x = torch.stack([embed(band) for embed, band in zip(self.embed, bands, strict=True)], dim=2)
        batch, length, count, _ = x.shape
        x = self.time(x.transpose(1, 2).reshape(batch * count, length, WIDTH)).view(batch, count, length, WIDTH)
        x = self.bands(x.transpose(1, 2).reshape(batch * length, count, WIDTH)).view(batch, length, count, WIDTH)
        masks = torch.cat([out(x[:, :, k]) for k, out in enumerate(self.out)], dim=-1)
        return F.l1_loss(spectrum * masks.sigmoid(), clean)


@program("science")
def band_split(s: Sampler) -> Program:
    inputs = {"spectrum": s.normal(BATCH, LENGTH, 12), "clean": s.normal(BATCH, LENGTH, 12)}
    return Program(Spectrogram(), inputs, {"token_dims": {"spectrum": 1}})


class Table(nn.Module):
    """TabPFN: cells attend along features, then along rows: rows to be said see only those that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.label, self.features, self.rows, self.head = (
            nn.Linear(1, WIDTH),
            nn.Linear(1, WIDTH),
            Block(),
            Attention(),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, table: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        y = torch.where(known, labels, labels.new_zeros(()))
        x = torch.cat([self.cell(table.unsqueeze(-1)), self.label(y[..., None, None])], dim=2)
        batch, rows, columns, _ = x.shape
        x = self.features(x.flatten(0, 1)).view(batch, rows, columns, WIDTH)
        by_column = x.transpose(1, 2).flatten(0, 1)
        mask = known[:, None, None, :].repeat_interleave(columns, dim=0)
        x = x + self.rows(by_column, None, mask).view(batch, columns, rows, WIDTH).transpose(1, 2)
        errors = (self.head(x[:, :, -1]).squeeze(-1) - labels).pow(2)
        return errors[~known].mean()


@program("science")
def tabular(s: Sampler) -> Program:
    known = torch.arange(LENGTH).repeat(BATCH, 1) < torch.tensor([[25], [21]])
    inputs = {"table": s.normal(BATCH, LENGTH, 4), "labels": s.normal(BATCH, LENGTH), "known": known}
    return Program(Table(), inputs, {"token_dims": {"table": 1, "labels": 1, "known": 1}})


class ActionChunks(nn.Module):
    """ACT: learned queries of coming actions read joints, an image's patches and a style, which a coder of the truth has."""

    def __init__(self) -> None:
        super().__init__()
        self.action, self.joints, self.patch, self.style = (
            nn.Linear(3, WIDTH),
            nn.Linear(5, WIDTH),
            nn.Linear(12, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.class_token, self.queries = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Parameter(torch.randn(1, LENGTH, WIDTH)),
        )
        self.coder, self.encoder, self.cross, self.head = Block(), Block(), Attention(), nn.Linear(WIDTH, 3)

    def forward(self, actions: Tensor, joints: Tensor, patches: Tensor) -> Tensor:
        batch, state = joints.shape[0], self.joints(joints).unsqueeze(1)
        coded = self.coder(torch.cat([self.class_token.expand(batch, -1, -1), state, self.action(actions)], dim=1))
        style = self.style(coded[:, 0]).unsqueeze(1)
        memory = self.encoder(torch.cat([style, state, self.patch(patches)], dim=1))
        said = self.head(self.cross(self.queries.expand(batch, -1, -1), memory))
        return F.l1_loss(said, actions) + 0.1 * style.pow(2).mean()


@program("science")
def action_chunks(s: Sampler) -> Program:
    inputs = {"actions": s.normal(BATCH, LENGTH, 3), "joints": s.normal(BATCH, 5), "patches": s.normal(BATCH, 12, 12)}
    return Program(ActionChunks(), inputs, {"token_dims": {"actions": 1}})
