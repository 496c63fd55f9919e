"""Tiny models, one for each kind of decoder, and random batches for them.

The transformers models cast norms, rotary tables and logits to float32 themselves, so that in float64 they still agree to
float32 rounding only. `NanoGPT` and `RotaryLM` have no casts: in float64 they agree to 1e-12.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 61


def sizes(num_layers: int) -> dict[str, Any]:
    """Return what configurations of transformers have in common."""
    widths = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40}
    return widths | {"num_hidden_layers": num_layers, "use_cache": False}


def llama(num_layers: int = 2, **changes: Any) -> nn.Module:
    """Return a Llama with 3 query heads and 1 key head, so that most numbers of ranks divide neither."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**sizes(num_layers) | {"num_attention_heads": 3, "num_key_value_heads": 1} | changes)
    )


def qwen3(num_layers: int = 2, **changes: Any) -> nn.Module:
    """Return a Qwen3: norms of queries and keys, head dim apart from the hidden size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes(num_layers) | heads | changes))


def gpt2(num_layers: int = 2, **changes: Any) -> nn.Module:
    """Return a GPT-2: learned positions, one product for q, k and v, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    widths = {
        "vocab_size": VOCABULARY,
        "n_embd": 24,
        "n_layer": num_layers,
        "n_head": 3,
        "n_positions": 128,
        "use_cache": False,
    }
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": None, "eos_token_id": None, "loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**widths | rates | tokens | changes))


def gemma2(num_layers: int = 2, **changes: Any) -> nn.Module:
    """Return a Gemma 2: soft-capped scores and logits, every other layer sees a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12}
    return Gemma2ForCausalLM(Gemma2Config(**sizes(num_layers) | heads | {"attn_implementation": "eager"} | changes))


class NanoGPT(nn.Module):
    """A GPT as people write it by hand: `idx` and shifted `targets`, positions by `arange`, tied weights, a tuple returned."""

    def __init__(self, num_layers: int = 2, heads: int = 3, width: int = 24, longest: int = 128) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads, heads, is_rotary=False) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class RotaryLM(nn.Module):
    """A decoder with rotary positions and grouped heads; takes `input_ids` or `inputs_embeds` and shifts its labels itself."""

    def __init__(self, num_layers: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, is_rotary=True) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, *, inputs_embeds: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), "logits": logits}


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int, kv_heads: int, is_rotary: bool) -> None:
        super().__init__()
        self.sizes, self.is_rotary = [heads, kv_heads, kv_heads], is_rotary
        self.head_dim = width // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, sum(self.sizes) * self.head_dim)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.ln_1(x)).split([size * self.head_dim for size in self.sizes], dim=-1)
        q, k, v = (part.view(batch, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        if self.is_rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.sizes[0] != self.sizes[1])
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.ln_2(x))


class Mixer(nn.Module):
    """Mixes tokens in many ways: shifts, a convolution, scans, pooling, look-ups, and attention written out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, width), Block(width, 4, 2, is_rotary=True)
        self.convolution = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, VOCABULARY)
        self.classifier = nn.Linear(width, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        x = x + 0.5 * F.pad(x, (0, 0, 1, -1))  # the token before
        x = x + F.silu(self.convolution(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        x = self.block(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.mix(x.cumsum(1) / count).tanh() * x.roll(3, 1)
        scores = x @ x.transpose(1, 2) / x.shape[-1]
        x = x + (scores + 0.01 * torch.arange(x.shape[1], device=x.device, dtype=x.dtype)).softmax(-1) @ x.flip(1)
        pooled = torch.cat([x.amax(1), x[:, -1], x[torch.arange(len(x), device=x.device), labels[:, -1] % 7]])
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss + self.classifier(pooled).pow(2).mean(), "logits": logits}


def rotate(x: Tensor) -> Tensor:
    """Return `x` `[B, H, S, D]` with each pair of features turned by an angle that grows with the position."""
    half = x.shape[-1] // 2
    rates = 100.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * rates
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "nanogpt": NanoGPT,
    "rotary": RotaryLM,
}
MODELS = DECODERS | {"mixer": Mixer}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """Return the model called `name`, with the same weights for the same seed in every process."""
    torch.manual_seed(seed)
    return MODELS[name](**changes).to(dtype)


def batch(model: nn.Module, length: int, seed: int = 0, batch_size: int = 2) -> dict[str, Tensor]:
    """Return random token ids and labels, some of them ignored, by the names that `model` gives them."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randint(VOCABULARY, (batch_size, length), generator=generator)
    labels = torch.randint(VOCABULARY, (batch_size, length), generator=generator)
    is_nano = "idx" in inspect.signature(model.forward).parameters
    labels[0, : length // 3] = -1 if is_nano else -100
    return {"idx": ids, "targets": labels} if is_nano else {"input_ids": ids, "labels": labels}


def loss_of(output: Any) -> Tensor:
    """Return the loss of what any of these models returns."""
    loss: Tensor = output[1] if isinstance(output, tuple) else output["loss"]
    return loss


def logits_of(output: Any) -> Tensor:
    """Return the logits of what any of these models returns."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output["logits"]
    return logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients out of `model`: by name, zeros where there is none."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the norm of the difference over the norm of `expected`, or over `floor` where that is larger; NaNs agree."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    difference = (found - expected).nan_to_num().norm().item()
    return difference / max(expected.nan_to_num().norm().item(), floor, torch.finfo(torch.float32).tiny)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each gradient; one that cancels to nothing is measured against a hundredth of the largest."""
    assert found.keys() == expected.keys()
    floor = 0.01 * max((x.nan_to_num().norm().item() for x in expected.values()), default=0.0)
    return {name: error(found[name], x, floor) for name, x in expected.items()}
