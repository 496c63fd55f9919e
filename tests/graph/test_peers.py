"""The cases in which other context-parallel systems are silently wrong, crash or refuse: each is exact here.

Every model is a few lines that people write. The first three groups are what a compiler pass that shards by
name and shape gets wrong, crashes on and refuses; the last is what libraries get wrong in eager mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cpcompile import CPError, verify
from tests.graph.small_models import VOCABULARY, TinyLM, batch

# Sequences that divide and that do not, every layout and strategy, whole heads for each rank and not.
Way = tuple[int, int, dict[str, Any]]
WAYS: dict[str, Way] = {
    "even": (2, 16, {"strategy": "ulysses", "balancer": "contiguous", "dynamic": False}),
    "uneven": (3, 13, {"strategy": "ring", "balancer": "zig_zag"}),
    "short": (4, 13, {"strategy": "gather", "balancer": "zig_zag", "dynamic": False}),
}
in_every_way = pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if name == "uneven" else [pytest.mark.slow], id=name) for name, way in WAYS.items()],
)


def exact(model: nn.Module, inputs: dict[str, Any], way: Way, **options: Any) -> None:
    """Check loss and every gradient against one device."""
    torch._dynamo.reset()
    found = verify(model, inputs, world_size=way[0], dtype=torch.float64, **way[2], **options)
    assert found.tolerance < 1e-10
    found.raise_if_wrong()


class Mixed(TinyLM):
    """Mixes tokens by a function before it attends; sums up by `loss`."""

    def __init__(self, mix: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.mix = mix

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.mix(x)
        return self.head(x + self.attend(x))


def heads_of(model: TinyLM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.unflatten(-1, (model.heads, -1)).transpose(1, 2) for t in model.qkv(x).chunk(3, -1))
    return q, k, v


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(-2)


def causal_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as tutorials write it."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = torch.tril(torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


# Silently wrong elsewhere.


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def shifted_labels(logits: Tensor, labels: Tensor) -> Tensor:
    following = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, VOCABULARY).float(), following.view(-1), ignore_index=-100)


@in_every_way
@pytest.mark.parametrize("loss", [shifted, shifted_labels])
def test_label_shift_inside_the_model(loss: Callable[[Tensor, Tensor], Tensor], way: Way) -> None:
    exact(TinyLM(loss), batch(way[1]), way)


@in_every_way
def test_unequal_ignored_labels_over_the_ranks(way: Way) -> None:
    inputs = batch(way[1])
    inputs["labels"][:, : way[1] // 2] = -100
    inputs["labels"][0, -3:] = -100
    exact(TinyLM(), inputs, way)


class Convolved(TinyLM):
    """A causal depthwise convolution over the tokens, as in state-space models, before attention."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.ends = (left, right)
        self.conv = nn.Conv1d(8, 8, left + right + 1, groups=8)

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + F.silu(self.conv(F.pad(x.transpose(1, 2), self.ends))).transpose(1, 2)
        return self.head(x + self.attend(x))


class Centred(Convolved):
    """A convolution that looks at both sides, padded by itself."""

    def __init__(self) -> None:
        super().__init__(0, 0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)


@in_every_way
@pytest.mark.parametrize("model", [lambda: Convolved(3, 0), lambda: Convolved(1, 2), Centred], ids=range(3))
def test_convolution_over_tokens(model: Callable[[], nn.Module], way: Way) -> None:
    exact(model(), batch(way[1]), way)


@in_every_way
def test_running_sum(way: Way) -> None:
    exact(Mixed(lambda x: x.cumsum(1)), batch(way[1]), way)


class Pooled(TinyLM):
    """Classifies the whole sequence."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        pooled = self.pool(x + self.attend(x))
        return F.cross_entropy(self.head(pooled), labels[:, -1].clamp(min=0))


POOLS = [
    pytest.param(lambda x: x.mean(1), id="mean"),
    pytest.param(lambda x: x.sum(dim=1) / x.shape[1], id="sum over count"),
    pytest.param(lambda x: x.amax(1), id="maximum"),
    pytest.param(lambda x: x[:, -1], id="last token"),
    pytest.param(lambda x: x[:, 0], id="first token"),
]


@in_every_way
@pytest.mark.parametrize("pool", POOLS)
def test_pooling(pool: Callable[[Tensor], Tensor], way: Way) -> None:
    exact(Pooled(pool), batch(way[1]), way)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat with zeros": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
    "padded": lambda x: F.pad(x, (0, 0, 1, -1)),
    "ZeroPad2d": nn.ZeroPad2d((0, 0, 1, -1)),
    "rolled": lambda x: x.roll(1, 1),
}


@in_every_way
@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS.keys())
def test_token_shift(shift: Callable[[Tensor], Tensor], way: Way) -> None:
    exact(Mixed(shift), batch(way[1]), way)


@in_every_way
def test_flip(way: Way) -> None:
    exact(Mixed(lambda x: x.flip(1)), batch(way[1]), way)


class HalfByHand(TinyLM):
    """One layer of SDPA, one written by hand."""

    def attend(self, x: Tensor) -> Tensor:
        x = x + super().attend(x)
        return merged(causal_by_hand(*heads_of(self, x)))


@in_every_way
def test_attention_by_hand_beside_sdpa(way: Way) -> None:
    exact(HalfByHand(), batch(way[1]), way)


class Checkpointed(TinyLM):
    """Two layers of attention; those in `which` are recomputed in backward."""

    def __init__(self, which: set[int]) -> None:
        super().__init__()
        self.which = which

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in range(2):
            x = x + (checkpoint(self.attend, x, use_reentrant=False) if layer in self.which else self.attend(x))
        return self.head(x)


@in_every_way
@pytest.mark.parametrize("which", [{0}, {1}])
def test_checkpointing_on_some_layers(which: set[int], way: Way) -> None:
    exact(Checkpointed(which), batch(way[1]), way)


# Crashes elsewhere.


class Positions(TinyLM):
    """Learned positions looked up at an arange made inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, 8)

    def logits(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embedding(input_ids) + self.positions(positions)
        return self.head(x + self.attend(x))


@in_every_way
def test_positions_from_arange(way: Way) -> None:
    exact(Positions(), batch(way[1]), way)


class Attending(TinyLM):
    """Attends by a function of q, k, v `[B, H, S, D]`."""

    def __init__(self, attention: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.attention = attention

    def attend(self, x: Tensor) -> Tensor:
        return merged(self.attention(*heads_of(self, x)))


@in_every_way
def test_causal_attention_by_hand(way: Way) -> None:
    exact(Attending(causal_by_hand), batch(way[1]), way)


KEYWORDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "names": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True),
    "names in another order": lambda q, k, v: F.scaled_dot_product_attention(value=v, is_causal=True, key=k, query=q),
    "positions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=True),
}


@in_every_way
@pytest.mark.parametrize("attention", KEYWORDS.values(), ids=KEYWORDS.keys())
def test_sdpa_called_in_any_form(attention: Callable[..., Tensor], way: Way) -> None:
    exact(Attending(attention), batch(way[1]), way)


@in_every_way
def test_queries_used_again_after_attention(way: Way) -> None:
    exact(
        Attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) * torch.sigmoid(q) + k),
        batch(way[1]),
        way,
    )


# Refused elsewhere.


class Documents(TinyLM):
    """Packed documents: attention only inside one, from the ids of the documents or from their first tokens."""

    def __init__(self, is_given: bool) -> None:
        super().__init__()
        self.is_given = is_given

    def forward(self, input_ids: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:  # type: ignore[override]
        ids = documents if documents is not None else (input_ids == 3).long().cumsum(1)
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal & (ids[:, None, :, None] == ids[:, None, None, :])
        x = self.embedding(input_ids)
        x = x + merged(F.scaled_dot_product_attention(*heads_of(self, x), attn_mask=mask))
        return self.loss(self.head(x), labels)


@in_every_way
@pytest.mark.parametrize("is_given", [True, False])
def test_document_masks(is_given: bool, way: Way) -> None:
    inputs = batch(way[1])
    documents = (torch.arange(way[1]) // 5).expand(2, -1).contiguous()
    exact(Documents(is_given), {**inputs, "documents": documents} if is_given else inputs, way)


@in_every_way
def test_checkpointing_on_all_layers(way: Way) -> None:
    exact(Checkpointed({0, 1}), batch(way[1]), way)


# Wrong in libraries that shard eagerly.


@pytest.mark.parametrize("balancer", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("at", range(1, 12))
def test_no_target_is_lost_at_a_boundary(at: int, balancer: str) -> None:
    """One label only, at each place in turn: the shift must bring it to the token before, on whichever rank that is."""
    inputs = batch(12, size=1)
    inputs["labels"].fill_(-100)
    inputs["labels"][0, at] = 5
    exact(TinyLM(shifted_labels), inputs, (3, 12, {"balancer": balancer}))


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 2.0 * torch.tanh(q @ k.mT * 0.5 / 2.0)
    seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Sinks(TinyLM):
    """A learned logit for each head takes a share of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0]))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self, x)
        scores = q @ k.mT * 0.5
        seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
        sinks = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        return merged(torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ v)


@in_every_way
def test_softcap(way: Way) -> None:
    exact(Attending(softcapped), batch(way[1]), way)


@in_every_way
def test_sinks(way: Way) -> None:
    exact(Sinks(), batch(way[1]), way)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2], device=q.device)
    distance = at[:, None] - at[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 4))


def prefixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not causal: the first five tokens see each other."""
    at = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at[None, :] <= at[:, None]) | (at[None, :] < 5))


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-0.1 * (at[:, None] - at[None, :]).abs().to(q.dtype))


NOT_CAUSAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "not causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=False),
    "window": windowed,
    "prefix": prefixed,
    "bias": biased,
}


@pytest.mark.filterwarnings("ignore:.*use gather in place of:UserWarning")
@in_every_way
@pytest.mark.parametrize("attention", NOT_CAUSAL.values(), ids=NOT_CAUSAL.keys())
def test_no_mask_becomes_causal(attention: Callable[..., Tensor], way: Way) -> None:
    exact(Attending(attention), batch(way[1]), way)


@pytest.mark.parametrize("balancer", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("loss", [TinyLM().loss, shifted, shifted_labels], ids=["plain", "sliced", "padded"])
def test_rank_without_a_valid_label_is_no_nan(loss: Callable[[Tensor, Tensor], Tensor], balancer: str) -> None:
    inputs = batch(16)
    inputs["labels"][:, 2:] = -100
    torch._dynamo.reset()
    found = verify(TinyLM(loss), inputs, world_size=4, dtype=torch.float64, balancer=balancer)
    found.raise_if_wrong()
    assert not math.isnan(found.reference_loss)


class Padded(TinyLM):
    """Padding is hidden from every query."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        x = x + merged(F.scaled_dot_product_attention(*heads_of(self, x), attn_mask=mask))
        return self.loss(self.head(x), labels)


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather"])
@pytest.mark.parametrize("length", [5, 6, 9])
def test_masks_stay_aligned_when_several_ranks_are_short(length: int, strategy: str) -> None:
    """5 tokens on 4 ranks: two ranks hold padding slots."""
    inputs = batch(length)
    inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
    inputs["attention_mask"][0, :2] = 0
    inputs["attention_mask"][1, -2:] = 0
    exact(Padded(), inputs, (4, length, {"strategy": strategy}))


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2), (5, 5)])
def test_heads_that_ranks_do_not_divide(heads: int, kv_heads: int, strategy: str) -> None:
    class Grouped(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(8, heads * 4)
            self.key_value = nn.Linear(8, 2 * kv_heads * 4)
            self.out = nn.Linear(heads * 4, 8)

        def attend(self, x: Tensor) -> Tensor:
            q = self.query(x).unflatten(-1, (heads, 4)).transpose(1, 2)
            k, v = (t.unflatten(-1, (kv_heads, 4)).transpose(1, 2) for t in self.key_value(x).chunk(2, -1))
            return self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))

    for world_size in (2, 4):
        exact(Grouped(), batch(13), (world_size, 13, {"strategy": strategy}))


def test_attention_dropout_is_refused() -> None:
    """Two libraries return wrong gradients; whether ranks may draw different masks is not theirs to decide."""
    dropped = Attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True))
    with pytest.raises(CPError, match="dropout"):
        exact(dropped, batch(16), WAYS["even"])
