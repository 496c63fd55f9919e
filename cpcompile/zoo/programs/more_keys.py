"""More keys: prompts, classes, registers, memories and caches, whole on every rank, beside tokens that are sharded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, LENGTH, Sampler
from cpcompile.zoo.programs.decoders import language
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


class SoftPrompt(nn.Module):
    """Learned embeddings before the text; their logits are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.embed = nn.Parameter(torch.randn(5, WIDTH)), nn.Embedding(VOCABULARY, WIDTH)
        self.position, self.head = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.Sequential(Block(causal=True), Block(causal=True))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        prompt = self.prompt.unsqueeze(0).expand(input_ids.shape[0], -1, -1)
        x = torch.cat([prompt, self.embed(input_ids)], dim=1)
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        return token_loss(self.head(self.blocks(x))[:, self.prompt.shape[0] :], labels)


@program("handwritten")
def soft_prompt(sampler: Sampler) -> Program:
    return language(SoftPrompt(), sampler)


class SoftPromptWithIgnoredLabels(SoftPrompt):
    """As `peft` does: labels of the prompt are -100, put before those of the text; the shift is in the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        prompt = self.prompt.unsqueeze(0).repeat(input_ids.shape[0], 1, 1)
        ignored = torch.full((labels.shape[0], 5), -100, dtype=labels.dtype, device=labels.device)
        labels = torch.cat((ignored, labels), dim=1)
        x = torch.cat((prompt, self.embed(input_ids)), dim=1)
        logits = self.head(self.blocks(x))
        return token_loss(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous())


@program("handwritten")
def soft_prompt_ignored_labels(sampler: Sampler) -> Program:
    return language(SoftPromptWithIgnoredLabels(), sampler)


class PrefixAttention(nn.Module):
    """Learned keys and values before those of the tokens; a causal mask that lets all see them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.prefix = nn.Parameter(torch.randn(2, HEADS, 6, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        key, value = (part.expand(x.shape[0], -1, -1, -1) for part in self.prefix)
        k, v = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(diagonal=6)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@program("handwritten")
def prefix_tuning(sampler: Sampler) -> Program:
    return language(Decoder(Block(PrefixAttention()), Block(PrefixAttention())), sampler)


class MemoryAttention(nn.Module):
    """Persistent memory: learned keys and values behind those of the tokens, seen by all of them, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.memory = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(2, 7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = torch.cat([k, self.memory[0].repeat(x.shape[0], 1, 1)], dim=1)
        v = torch.cat([v, self.memory[1].repeat(x.shape[0], 1, 1)], dim=1)
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        causal = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device).triu(1)
        scores = q @ k.transpose(-1, -2) / 2 + F.pad(causal, (0, 7)).to(q.dtype)
        return join_heads(scores.softmax(dim=-1) @ v)


@program("handwritten")
def memory_keys(sampler: Sampler) -> Program:
    return language(Decoder(Block(MemoryAttention()), Block(MemoryAttention())), sampler)


class BiasKeys(nn.Module):
    """PyTorch's attention with a learned key and a key of zeros behind the others, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y, _ = self.attention(x, x, x, key_padding_mask=input_ids == 0, need_weights=False)
        return token_loss(self.head(x + y), labels)


@program("handwritten")
def add_bias_kv(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "labels": sampler.labels()}
    inputs["input_ids"][1, 30:] = 0
    return Program(BiasKeys(), inputs)


class CausalBiasKeys(BiasKeys):
    """The same with a causal mask and weights that are returned, as fairseq's language models had it."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), 1)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=True)
        return token_loss(self.head(x + y), labels)


@program("handwritten")
def add_bias_kv_causal(sampler: Sampler) -> Program:
    return language(CausalBiasKeys(), sampler)


class GivenCache(nn.Module):
    """Keys and values of earlier tokens are inputs, before those of these tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, past_key: Tensor, past_value: Tensor, labels: Tensor) -> Tensor:
        past, length = past_key.shape[2], input_ids.shape[1]
        steps = torch.arange(past, past + length, device=input_ids.device)
        x = self.embed(input_ids) + self.position(steps)
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        k, v = torch.cat((past_key, k), dim=2), torch.cat((past_value, v), dim=2)
        mask = torch.arange(past + length, device=x.device)[None, :] <= steps[:, None]
        x = x + join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None]))
        return token_loss(self.head(x), labels)


@program("handwritten")
def given_cache(sampler: Sampler) -> Program:
    past = {name: sampler.normal(BATCH, HEADS, 11, WIDTH // HEADS) for name in ("past_key", "past_value")}
    return Program(GivenCache(), {"input_ids": sampler.tokens(), "labels": sampler.labels(), **past})


class Sinks(Attention):
    """A learned score beside those of the keys takes a part of each softmax: gpt-oss, as a column that is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(part) for part in (self.query(x), self.key(x), self.value(x)))
        length = x.shape[1]
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2
        scores = scores + torch.triu(q.new_full((length, length), -float("inf")), diagonal=1)
        sinks = self.sinks.reshape(1, HEADS, 1, 1).expand(q.shape[0], -1, length, -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        return self.out(join_heads(torch.einsum("bhqk,bhkd->bhqd", weights, v)))


@program("handwritten")
def attention_sinks(sampler: Sampler) -> Program:
    return language(Decoder(Block(Sinks()), Block(Sinks())), sampler)


class Classifier(nn.Module):
    """A class token and registers before the patches; the class token is read."""

    def __init__(self, registers: int) -> None:
        super().__init__()
        self.project = nn.Linear(12, WIDTH)
        self.class_token, self.registers = nn.Parameter(torch.randn(1, 1, WIDTH)), registers
        self.register_tokens = nn.Parameter(torch.randn(1, max(registers, 1), WIDTH))
        self.position = nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH))
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH if not registers else 2 * WIDTH, 10)

    def forward(self, patches: Tensor, label: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), self.project(patches)], dim=1) + self.position
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        x = self.norm(self.blocks(x))
        if not self.registers:
            return F.cross_entropy(self.head(x[:, 0]), label)
        pooled = torch.cat([x[:, 0], x[:, 1 + self.registers :].mean(dim=1)], dim=-1)
        return F.cross_entropy(self.head(pooled), label)


def patches(model: nn.Module, sampler: Sampler) -> Program:
    """Return a classifier with patches."""
    inputs = {"patches": sampler.normal(BATCH, LENGTH, 12), "label": torch.tensor([3, 7])}
    return Program(model, inputs, {"token_dims": {"patches": 1}})


@program("handwritten")
def class_token(sampler: Sampler) -> Program:
    return patches(Classifier(registers=0), sampler)


@program("handwritten")
def register_tokens(sampler: Sampler) -> Program:
    return patches(Classifier(registers=4), sampler)


class ClassBehind(nn.Module):
    """A token of the class behind the text, read at the end: its causal attention sees everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.end = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.blocks, self.head = nn.Sequential(Block(causal=True), Block(causal=True)), nn.Linear(WIDTH, 10)

    def forward(self, input_ids: Tensor, label: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = torch.cat([x, self.end.view(1, 1, -1).expand(x.shape[0], 1, -1)], dim=1)
        return F.cross_entropy(self.head(self.blocks(x)[:, -1]), label)


@program("handwritten")
def class_token_behind(sampler: Sampler) -> Program:
    return Program(ClassBehind(), {"input_ids": sampler.tokens(), "label": torch.tensor([3, 7])})


class RecurrentMemory(nn.Module):
    """Recurrent memory transformer, one segment: memory before and behind; what comes out behind is the next memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.memory, self.blocks = (
            nn.Parameter(torch.randn(3, WIDTH)),
            nn.Sequential(Block(causal=True), Block(causal=True)),
        )

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        memory = self.memory.expand(input_ids.shape[0], -1, -1)
        x = self.blocks(torch.cat([memory, self.embed(input_ids), memory], dim=1))
        loss = token_loss(self.head(x[:, 3:-3]), labels)
        return {"loss": loss + x[:, -3:].pow(2).mean(), "memory": x[:, -3:]}


@program("handwritten")
def recurrent_memory(sampler: Sampler) -> Program:
    return language(RecurrentMemory(), sampler)


class Conditioned(nn.Module):
    """A vector of the class is the first token of a text, in place of its last: the models that draw images as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.embed = nn.Embedding(10, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(causal=True), Block(causal=True))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, label: Tensor) -> Tensor:
        x = torch.cat([self.label(label)[:, None], self.embed(input_ids)[:, :-1]], dim=1)
        return token_loss(self.head(self.blocks(x)), input_ids)


@program("handwritten")
def class_as_first_token(sampler: Sampler) -> Program:
    return Program(Conditioned(), {"input_ids": sampler.tokens(), "label": torch.tensor([3, 7])})
