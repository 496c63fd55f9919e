"""Joined and grouped tokens: several sequences behind one another, tokens in groups, and attention over either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH = 8


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


class Attend(nn.Module):
    """Self-attention, as everybody writes it."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.is_causal = is_causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.is_causal)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with a norm."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.norm, self.attend, self.mlp = nn.LayerNorm(WIDTH), Attend(is_causal), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm(x), mask)
        return x + self.mlp(x).relu()


class Flux(nn.Module):
    """Double blocks join the heads of text and image, single blocks the streams."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(5, WIDTH), nn.Linear(6, WIDTH)
        self.text_qkv, self.image_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.text_out, self.image_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.single, self.head = Block(), nn.Linear(WIDTH, 6)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, target: Tensor) -> Tensor:
        text, image = self.text(encoder_hidden_states), self.image(hidden_states)
        length = text.shape[1]
        both = [torch.cat(pair, 2) for pair in zip(*self.parts(text, image), strict=True)]
        o = F.scaled_dot_product_attention(*both).transpose(1, 2).flatten(2)
        image = image + self.image_out(o[:, length:])
        text = text + self.text_out(o[:, :length])
        x = self.single(torch.cat([text, image], 1))
        return (self.head(x[:, length:]) - target).pow(2).mean()

    def parts(self, text: Tensor, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [heads(x) for x in self.text_qkv(text).chunk(3, -1)],
            [heads(x) for x in self.image_qkv(image).chunk(3, -1)],
        )


class Masked(Flux):
    """Text is padded: a mask over the joined sequence hides it. Parts are split by sizes."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, target: Tensor, text_mask: Tensor
    ) -> Tensor:
        text, image = self.text(encoder_hidden_states), self.image(hidden_states)
        mask = torch.cat([text_mask, text_mask.new_ones(image.shape[:2])], 1)[:, None, None]
        x = self.single(
            torch.cat([image, text], 1), torch.cat([mask[..., text.shape[1] :], mask[..., : text.shape[1]]], -1)
        )
        image, text = x.split([image.shape[1], text.shape[1]], 1)
        return (self.head(image) - target).pow(2).mean() + text.pow(2).mean()


class SoftPrompt(nn.Module):
    """Trained vectors stand before the text; attention is causal, and the loss leaves them out."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.embed, self.prompt = nn.Embedding(17, WIDTH), nn.Parameter(torch.randn(3, WIDTH))
        self.blocks, self.head = nn.ModuleList([Block(is_causal), Block(is_causal)]), nn.Linear(WIDTH, 17)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x[:, self.prompt.shape[0] :])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class ClassToken(nn.Module):
    """A class token before the tokens, registers behind them; the class is read of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.token, self.registers = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 2, WIDTH))
        self.block, self.head = Block(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(x)
        ends = [end.expand(x.shape[0], -1, -1) for end in (self.token, self.registers)]
        x = self.block(torch.cat([ends[0], x, ends[1]], 1))
        return F.cross_entropy(self.head(x[:, 0]), labels) + x[:, 1:-2].mean()


class Streams(nn.Module):
    """A decision transformer: three tokens a step behind one another, causal."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.embeds, self.block = nn.ModuleList(nn.Linear(4, WIDTH) for _ in range(3)), Block(is_causal)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = torch.stack([embed(x) for embed in self.embeds], 1).permute(0, 2, 1, 3).reshape(batch, 3 * length, WIDTH)
        h = self.block(h).reshape(batch, length, 3, WIDTH).permute(0, 2, 1, 3)
        return (self.head(h[:, 1]) - target).pow(2).mean()


class SpaceTime(nn.Module):
    """Attention within frames, in which nothing travels, then over the frames at one place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.space, self.time, self.head = nn.Linear(4, WIDTH), Block(), Block(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        batch, frames, places, _ = x.shape
        h = self.space(self.embed(x).flatten(0, 1)).unflatten(0, (batch, frames))
        h = self.time(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, places)).transpose(1, 2)
        return (self.head(h) - target).pow(2).mean()


class Merged(nn.Module):
    """Attention over frames times places, of which frames are the tokens."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, WIDTH), Block(is_causal), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.block(self.embed(x).flatten(1, 2)).unflatten(1, x.shape[1:3])
        return (self.head(h) - target).pow(2).mean()


class Inner(Merged):
    """The tokens are the inner factor of the merged dim."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.block(self.embed(x).transpose(1, 2).flatten(1, 2)).unflatten(1, (x.shape[2], x.shape[1]))
        return (self.head(h.transpose(1, 2)) - target).pow(2).mean()


class Patches(nn.Module):
    """A model of bytes: attention over patches of 3, then within each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patch, self.whole = nn.Embedding(19, WIDTH), nn.Linear(3 * WIDTH, WIDTH), Block(True)
        self.spread, self.local, self.head = nn.Linear(WIDTH, 3 * WIDTH), Block(True), nn.Linear(WIDTH, 19)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        batch, length, width = x.shape
        p = self.whole(self.patch(x.reshape(batch, length // 3, 3 * width)))
        x = x + self.spread(p).reshape(batch, length, width)
        x = self.local(x.reshape(batch * length // 3, 3, width)).reshape(batch, length, width)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Windows(nn.Module):
    """Swin: windows of 2 x 3 places on a grid, shifted in the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, WIDTH), nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        batch, height, width, h = x.shape[0], 6, x.shape[1] // 6, self.embed(x)
        for shift, block in enumerate(self.blocks):
            grid = h.view(batch, height, width, WIDTH)
            if shift:
                grid = torch.roll(grid, (-1, -1), (1, 2))
            grid = grid.view(batch, height // 2, 2, width // 3, 3, WIDTH).permute(0, 1, 3, 2, 4, 5)
            grid = block(grid.reshape(-1, 6, WIDTH)).view(batch, height // 2, width // 3, 2, 3, WIDTH)
            grid = grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, WIDTH)
            if shift:
                grid = torch.roll(grid, (1, 1), (1, 2))
            h = h + grid.reshape(batch, height * width, WIDTH)
        return (self.head(h) - target).pow(2).mean()


class Stem(nn.Module):
    """A strided convolution and a pool leave a token of 4; each is repeated at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv1d(4, WIDTH, 2, stride=2), Block(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = F.avg_pool1d(self.stem(x.mT), 2).mT
        h = self.block(h).repeat_interleave(4, 1)
        return (self.head(h) - target).pow(2).mean()


class Overlapping(nn.Module):
    """Patches of 5 tokens, one at every second (PatchTST), and the last 3 tokens of each (a window by unfold)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patch, self.block = nn.Linear(4, WIDTH), nn.Linear(5 * WIDTH, WIDTH), Block()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.embed(x)
        recent = F.pad(h, (0, 0, 2, 0)).unfold(1, 3, 1)
        h = h + recent.max(-1).values * recent.mean(-1)
        return (
            self.head(self.block(self.patch(h.unfold(1, 5, 2).flatten(2)))).pow(2).mean() + (h - target.mean()).mean()
        )


class NoHistory(nn.Module):
    """What comes before the tokens is split off and joined again, and is no token at all (Helios without a history)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.block = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH), Block()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h, history = self.embed(x), 0
        for _ in range(2):
            old, new = h[:, :history], h[:, history:]
            h = torch.cat([old, new + self.norm(new)], 1)
        return (self.head(self.block(h)) - target).pow(2).mean()


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(length: int, vocabulary: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, vocabulary, (2, length))
    return {"input_ids": tokens, "labels": tokens}


IMAGE = {"token_dims": {"hidden_states": 1}}
X = {"token_dims": {"x": 1}}


def flux() -> dict[str, Tensor]:
    return {"hidden_states": floats(2, 21, 6), "encoder_hidden_states": floats(2, 7, 5), "target": floats(2, 21, 6)}


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "flux": (Flux, flux, IMAGE),
    "flux with both declared": (Flux, flux, {"token_dims": {"hidden_states": 1, "encoder_hidden_states": 1}}),
    "masked": (Masked, lambda: flux() | {"text_mask": torch.arange(7)[None] < torch.tensor([[4], [7]])}, IMAGE),
    "soft prompt": (SoftPrompt, lambda: ids(19, 17), {}),
    "soft prompt seen by all": (lambda: SoftPrompt(is_causal=False), lambda: ids(19, 17), {}),
    "class token": (ClassToken, lambda: {"x": floats(2, 13, 6), "labels": torch.tensor([0, 2])}, X),
    "streams": (Streams, lambda: {"x": floats(2, 7, 4), "target": floats(2, 7, 4)}, X),
    "streams seen by all": (lambda: Streams(False), lambda: {"x": floats(2, 7, 4), "target": floats(2, 7, 4)}, X),
    "space and time": (SpaceTime, lambda: {"x": floats(2, 9, 5, 4), "target": floats(2, 9, 5, 4)}, X),
    "merged": (Merged, lambda: {"x": floats(2, 9, 5, 4), "target": floats(2, 9, 5, 4)}, X),
    "merged, causal": (lambda: Merged(True), lambda: {"x": floats(2, 9, 5, 4), "target": floats(2, 9, 5, 4)}, X),
    "inner": (Inner, lambda: {"x": floats(2, 9, 5, 4), "target": floats(2, 9, 5, 4)}, X),
    "inner, causal": (lambda: Inner(True), lambda: {"x": floats(2, 9, 5, 4), "target": floats(2, 9, 5, 4)}, X),
    "no history": (NoHistory, lambda: {"x": floats(2, 13, 4), "target": floats(2, 13, 4)}, X),
    "patches": (Patches, lambda: ids(21, 19), {}),
    "stem": (Stem, lambda: {"x": floats(2, 36, 4), "target": floats(2, 36, 4)}, X),
    "overlapping": (Overlapping, lambda: {"x": floats(2, 26, 4), "target": floats(2, 26, 4)}, X),
    "windows": (Windows, lambda: {"x": floats(2, 54, 4), "target": floats(2, 54, 4)}, X),
}


@pytest.mark.filterwarnings("ignore:one graph for all lengths cannot be sharded")
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "zig_zag"),
        pytest.param(3, "contiguous", marks=pytest.mark.slow),
        pytest.param(4, "zig_zag", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact(name: str, world_size: int, layout: str) -> None:
    make, inputs, options = PROGRAMS[name]
    torch.manual_seed(0)
    model = make().double()
    found = cpcompile.verify(model, inputs(), world_size=world_size, dtype=torch.float64, balancer=layout, **options)
    found.raise_if_wrong()


def test_lengths_that_views_divide_are_compiled_one_by_one() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"each length is compiled by itself(.|\n)*x.reshape\(batch, length // 3"):
        found = cpcompile.verify(Patches().double(), ids(12, 19), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()


class Dropped(SoftPrompt):
    """Joined tokens of which some features are dropped."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = F.dropout(torch.cat([self.prompt.expand(input_ids.shape[0], -1, -1), self.embed(input_ids)], 1), 0.5)
        logits = self.head(self.blocks[0](x)[:, self.prompt.shape[0] :])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_dropout_of_joined_tokens_draws_what_one_device_draws() -> None:
    torch.manual_seed(0)
    found = cpcompile.verify(Dropped().double(), ids(11, 17), world_size=2, dtype=torch.float64, exact_dropout=True)
    found.raise_if_wrong()


def test_dropout_of_joined_tokens_drops_half() -> None:
    plan = cpcompile.explain(Dropped(is_causal=False), ids(11, 17), world_size=2)
    assert "cp.dropout_tokens" in plan.after
