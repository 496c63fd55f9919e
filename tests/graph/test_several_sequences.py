"""Several sequences: encoder and decoder, each with its own length, and memories that are not sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile import GraphBreakError
from cpcompile.inspect.explain import explain

WIDTH, HEADS = 16, 2


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Translator(nn.Module):
    """An encoder, a causal decoder, and attention of the decoder to the encoder."""

    def __init__(self, *, written_out: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(19, WIDTH)
        self.encoder, self.decoder = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.query, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 19)
        self.written_out = written_out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)
        mask = options.get("attn_mask")
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if options.get("is_causal"):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def encode(self, source: Tensor) -> Tensor:
        x = self.embedding(source)
        return x + self.attend(*(heads(part) for part in self.encoder(x).chunk(3, -1)))

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        memory = self.encode(source)
        y = self.embedding(target)
        y = y + self.attend(*(heads(part) for part in self.decoder(y).chunk(3, -1)), is_causal=True)
        k, v = (heads(part) for part in self.memory(memory).chunk(2, -1))
        mask = None if source_mask is None else source_mask[:, None, None, :]
        y = y + self.attend(heads(self.query(y)), k, v, attn_mask=mask)
        logits = self.head(y)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()) + memory.pow(2).mean()


def sentences(source: int, target: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(source + target)
    return {
        "source": torch.randint(19, (2, source), generator=generator),
        "target": torch.randint(19, (2, target), generator=generator),
    }


TOKENS = {"source": 1, "target": 1}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("written_out", [False, True], ids=["sdpa", "written_out"])
@pytest.mark.parametrize(
    ("world_size", "layout", "source", "target"),
    [(1, "zig_zag", 9, 6), (2, "zig_zag", 9, 14), (3, "contiguous", 20, 7), (4, "zig_zag", 13, 13)],
)
def test_two_lengths(world_size: int, layout: str, source: int, target: int, written_out: bool, dynamic: bool) -> None:
    model, inputs = Translator(written_out=written_out).double(), sentences(source, target)
    inputs["source_mask"] = torch.arange(source)[None] < torch.tensor([[source], [source - 2]])
    found = cpcompile.verify(
        model,
        inputs,
        world_size=world_size,
        dtype=torch.float64,
        balancer=layout,
        token_dims=TOKENS,
        dynamic=dynamic,
    )
    found.raise_if_wrong()


def test_both_sequences_are_sharded() -> None:
    """Hidden states of neither sequence are gathered: only the keys and values of the attention between them."""
    plan = explain(Translator(), sentences(8, 12), world_size=2, token_dims=TOKENS)
    assert [g.shape for g in plan.gathered] == [(2, HEADS, 8, WIDTH // HEADS)] * 2
    assert [site.strategy for site in plan.sites][2] == "local queries, whole keys"
    assert plan.token_inputs == TOKENS
    assert all(name in {i.value for i in plan.inputs} for name in TOKENS)


class Reader(nn.Module):
    """Tokens attend to a memory that every rank has; a few learned queries attend to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.memory = nn.Embedding(19, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.queries = nn.Parameter(torch.randn(1, HEADS, 3, WIDTH // HEADS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        k, v = (heads(part) for part in self.memory(image).chunk(2, -1))
        x = x + F.scaled_dot_product_attention(heads(x), k, v).transpose(1, 2).flatten(2)
        queries = self.queries.expand(x.shape[0], -1, -1, -1)
        pooled = F.scaled_dot_product_attention(queries, heads(x), heads(x.tanh())).transpose(1, 2).flatten(2)
        return self.head(pooled).pow(2).sum() + x.pow(2).mean()


@pytest.mark.parametrize(("world_size", "length"), [(1, 7), (2, 9), (3, 8)])
def test_memory_and_learned_queries(world_size: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(19, (2, length), generator=generator),
        "image": torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64),
    }
    cpcompile.verify(Reader().double(), inputs, world_size=world_size, dtype=torch.float64).raise_if_wrong()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # torch 2.12
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_transformers_encoder_decoder(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    if family == "t5":
        config = transformers.T5Config(
            vocab_size=19,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
        config = transformers.BartConfig(vocab_size=19, d_model=16, dropout=0, max_position_embeddings=64, **sizes)
        model = transformers.BartForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(3, 19, (2, 11), generator=generator),
        "labels": torch.randint(3, 19, (2, 7), generator=generator),
    }
    if family == "t5" and torch.__version__ < "2.13":
        # Its cache copies the config, which Dynamo traces since torch 2.13. BART makes none where it has labels.
        with pytest.raises(GraphBreakError, match=r"copy\.(deepcopy|py)"):
            cpcompile.verify(model, inputs, world_size=2)
        inputs["use_cache"] = False
    cpcompile.verify(model.double(), inputs, world_size=2, dtype=torch.float64, balancer="zig_zag").raise_if_wrong()


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
