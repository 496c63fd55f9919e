"""Images: patches, videos, and images beside text, as people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, Sampler
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

ROWS, COLUMNS, FRAMES = 5, 7, 5  # of patches: 35 or 175 of them
PATCH = 2


class AdaptiveBlock(nn.Module):
    """DiT: shifts, scales and gates of a condition around attention and MLP; `cross` attends to a text between."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp, self.cross = Attention(), MLP(), Attention() if cross else None
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        parts = self.modulation(condition).chunk(6, dim=1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (part.unsqueeze(1) for part in parts)
        x = x + gate_1 * self.attention(self.norm(x) * (1 + scale_1) + shift_1)
        if self.cross is not None:
            x = x + self.cross(x, text, mask)
        return x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """Patches by a strided convolution, and back by a product, a view and an einsum."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(4, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, ROWS * COLUMNS, WIDTH), requires_grad=False)
        self.time, self.text = (
            nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)),
            nn.Linear(6, WIDTH),
        )
        self.blocks = nn.ModuleList(AdaptiveBlock(cross) for _ in range(2))
        self.final = nn.Linear(WIDTH, PATCH * PATCH * 4)

    def unpatchify(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], ROWS, COLUMNS, PATCH, PATCH, 4)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], 4, ROWS * PATCH, COLUMNS * PATCH)

    def forward(
        self, latents: Tensor, t: Tensor, noise: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        x = self.patchify(latents).flatten(2).transpose(1, 2) + self.position
        angles = t[:, None] * torch.exp(-torch.arange(4, device=t.device, dtype=x.dtype))
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if text is not None and text_mask is not None:
            bias = (1 - text_mask.to(x.dtype))[:, None, None, :] * -10000.0
            for block in self.blocks:
                x = block(x, condition, self.text(text), bias)
        else:
            for block in self.blocks:
                x = block(x, condition)
        return F.mse_loss(self.unpatchify(self.final(x)), noise)


def image(sampler: Sampler) -> dict[str, Tensor]:
    """Return noisy latents, times and the noise."""
    latents, noise = (sampler.normal(BATCH, 4, ROWS * PATCH, COLUMNS * PATCH) for _ in range(2))
    return {"latents": latents, "t": torch.tensor([0.3, 0.8]), "noise": noise}


@program("handwritten")
def dit(sampler: Sampler) -> Program:
    return Program(DiT(), image(sampler))


@program("handwritten")
def pixart_cross_attention(sampler: Sampler) -> Program:
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return Program(DiT(cross=True), {**image(sampler), "text": sampler.normal(BATCH, 9, 6), "text_mask": mask})


class DiTOfTokens(nn.Module):
    """The same where the trainer has cut the patches already: tokens are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(PATCH * PATCH * 4, WIDTH), nn.Linear(WIDTH, PATCH * PATCH * 4)
        self.time, self.blocks = nn.Linear(1, WIDTH), nn.ModuleList(AdaptiveBlock() for _ in range(2))

    def forward(self, hidden_states: Tensor, t: Tensor, target: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, self.time(t[:, None]))
        return F.mse_loss(self.final(x), target)


@program("handwritten")
def dit_of_packed_latents(sampler: Sampler) -> Program:
    tokens, target = (sampler.normal(BATCH, ROWS * COLUMNS, PATCH * PATCH * 4) for _ in range(2))
    inputs = {"hidden_states": tokens, "t": torch.tensor([0.3, 0.8]), "target": target}
    return Program(DiTOfTokens(), inputs, {"token_dims": {"hidden_states": 1}})


class JointAttention(nn.Module):
    """MMDiT: text and image have their own products, and one attention over both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_text = nn.Linear(16, WIDTH), nn.Linear(6, WIDTH)
        self.qkv, self.qkv_text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.out_text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.single, self.final = Block(), nn.Linear(WIDTH, 16)

    def forward(self, hidden_states: Tensor, text: Tensor, target: Tensor) -> Tensor:
        x, c = self.embed(hidden_states), self.embed_text(text)
        image, words = self.qkv(x).chunk(3, -1), self.qkv_text(c).chunk(3, -1)
        q, k, v = (split_heads(torch.cat([b, a], dim=1)) for a, b in zip(image, words, strict=True))
        both = join_heads(F.scaled_dot_product_attention(q, k, v))
        c, x = c + self.out_text(both[:, : c.shape[1]]), x + self.out(both[:, c.shape[1] :])
        x = self.single(torch.cat([c, x], dim=1))[:, c.shape[1] :]
        return F.mse_loss(self.final(x), target)


@program("handwritten")
def joint_attention(sampler: Sampler) -> Program:
    tokens, target = (sampler.normal(BATCH, ROWS * COLUMNS, 16) for _ in range(2))
    inputs = {"hidden_states": tokens, "text": sampler.normal(BATCH, 9, 6), "target": target}
    return Program(JointAttention(), inputs, {"token_dims": {"hidden_states": 1}})


class WanAttention(nn.Module):
    """Rotary positions of a video: a part of each head turns by the frame, a part by the row, a part by the column."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(2 * WIDTH), nn.RMSNorm(2 * WIDTH)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (t.unflatten(2, (HEADS, -1)) for t in (q, k, v))
        q, k = (self.turn(t, freqs).transpose(1, 2) for t in (q, k))
        return self.o(F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2, 3))

    def turn(self, x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * freqs).flatten(3, 4).type_as(x)


class Wan(nn.Module):
    """Patches by a convolution in three dims; the grid is merged to tokens, and taken apart again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, 2 * WIDTH, (1, 2, 2), stride=(1, 2, 2))
        self.block, self.cross = Block(WanAttention(), width=2 * WIDTH), Attention(width=2 * WIDTH)
        self.text, self.head = nn.Linear(6, 2 * WIDTH), nn.Linear(2 * WIDTH, 16)
        angles = torch.outer(torch.arange(16), 1.0 / 100 ** (torch.arange(4) / 4)).to(torch.float64)
        self.freqs = torch.polar(torch.ones_like(angles), angles)

    def forward(self, latents: Tensor, text: Tensor, target: Tensor) -> Tensor:
        x = self.patch_embedding(latents)
        batch, _, f, h, w = x.shape
        in_time, in_rows, in_columns = self.freqs.split([2, 1, 1], dim=1)
        freqs = torch.cat(
            [
                in_time[:f].view(f, 1, 1, -1).expand(f, h, w, -1),
                in_rows[:h].view(1, h, 1, -1).expand(f, h, w, -1),
                in_columns[:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            dim=-1,
        ).reshape(1, f * h * w, 1, -1)
        x = self.block(x.flatten(2).transpose(1, 2), freqs)
        x = self.head(x + self.cross(x, self.text(text)))
        x = x.view(batch, f, h, w, 1, 2, 2, 4).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return F.mse_loss(x.flatten(6, 7).flatten(4, 5).flatten(2, 3), target)


def video(sampler: Sampler) -> dict[str, Tensor]:
    """Return latents of a video and a target for them."""
    shape = (BATCH, 4, FRAMES, ROWS * PATCH, COLUMNS * PATCH)
    return {"latents": sampler.normal(*shape), "target": sampler.normal(*shape)}


@program("handwritten")
def wan(sampler: Sampler) -> Program:
    return Program(Wan(), {**video(sampler), "text": sampler.normal(BATCH, 9, 6)})


class Latte(nn.Module):
    """Attention in space, frames being rows of the batch, then in time, places being rows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify, self.head = nn.Conv2d(4, WIDTH, PATCH, stride=PATCH), nn.Linear(WIDTH, 16)
        self.space, self.time, self.position = Block(), Block(), nn.Parameter(torch.randn(1, FRAMES, WIDTH))

    def forward(self, latents: Tensor, target: Tensor) -> Tensor:
        batch, channels, frames, height, width = latents.shape
        x = latents.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
        x = self.space(self.patchify(x).flatten(2).transpose(1, 2))
        count = x.shape[1]
        x = x.view(batch, frames, count, WIDTH).permute(0, 2, 1, 3).reshape(batch * count, frames, WIDTH)
        x = self.time(x + self.position)
        x = x.view(batch, count, frames, WIDTH).permute(0, 2, 1, 3)
        x = self.head(x).view(batch, frames, height // 2, width // 2, 2, 2, channels)
        x = torch.einsum("nfhwpqc->ncfhpwq", x).reshape(latents.shape)
        return F.mse_loss(x, target)


@program("handwritten")
def latte_space_time(sampler: Sampler) -> Program:
    return Program(Latte(), video(sampler))


class LatteOfTokens(nn.Module):
    """Space and time in turn over tokens `[B, frames, places, D]` that are an input, whose frames are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.space, self.time, self.head = (
            nn.Linear(16, WIDTH),
            Block(),
            Block(causal=True),
            nn.Linear(WIDTH, 16),
        )

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        x = self.embed(frames)
        batch, length, places, _ = x.shape
        x = self.space(x.flatten(0, 1)).view(batch, length, places, WIDTH)
        x = self.time(x.transpose(1, 2).reshape(batch * places, length, WIDTH))
        x = x.view(batch, places, length, WIDTH).transpose(1, 2)
        return F.mse_loss(self.head(x), target)


@program("handwritten")
def space_time_of_frames(sampler: Sampler) -> Program:
    frames, target = (sampler.normal(BATCH, 13, 6, 16) for _ in range(2))
    return Program(LatteOfTokens(), {"frames": frames, "target": target}, {"token_dims": {"frames": 1}})


class SwinBlock(nn.Module):
    """Windows of a grid of tokens `[B, H * W, D]`, which a roll has shifted."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.attention, self.norm, self.shift = Attention(), nn.LayerNorm(WIDTH), shift

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, size = x.shape[0], 6, 9, 3
        y = self.norm(x).view(batch, rows, columns, WIDTH)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = y.view(batch, rows // size, size, columns // size, size, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(-1, size * size, WIDTH))
        y = y.view(batch, rows // size, columns // size, size, size, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, rows, columns, WIDTH)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        return x + y.view(batch, rows * columns, WIDTH)


class Windows(nn.Module):
    """A Swin stage on tokens that are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(12, WIDTH),
            nn.Sequential(SwinBlock(0), SwinBlock(1)),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, patches: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.blocks(self.embed(patches)).mean(dim=1)), label)


@program("handwritten")
def swin_windows(sampler: Sampler) -> Program:
    inputs = {"patches": sampler.normal(BATCH, 54, 12), "label": torch.tensor([3, 7])}
    return Program(Windows(), inputs, {"token_dims": {"patches": 1}})


class ImageEncoder(nn.Module):
    """A small image encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify, self.block = nn.Conv2d(3, WIDTH, 4, stride=4), Block()
        self.position = nn.Parameter(torch.randn(1, 12, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.block(self.patchify(pixels).flatten(2).transpose(1, 2) + self.position)


class LLaVA(nn.Module):
    """Features of an image come before the words."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.projector = ImageEncoder(), MLP()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.Sequential(Block(causal=True), Block(causal=True))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        image = self.projector(self.vision(pixel_values))
        x = torch.cat([image, self.embed(input_ids)], dim=1)
        logits = self.head(self.blocks(x))
        return token_loss(logits[:, image.shape[1] - 1 : -1], labels)


def image_and_text(model: nn.Module, sampler: Sampler) -> Program:
    """Return a model of words and an image of twelve patches."""
    inputs = {"input_ids": sampler.tokens(), "pixel_values": sampler.normal(BATCH, 3, 12, 16)}
    return Program(model, {**inputs, "labels": sampler.labels()})


@program("handwritten")
def llava_by_cat(sampler: Sampler) -> Program:
    return image_and_text(LLaVA(), sampler)


class LLaVAScatter(LLaVA):
    """Features of an image are put where the text has its id."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        image, x = self.projector(self.vision(pixel_values)), self.embed(input_ids)
        mask = (input_ids == 120).unsqueeze(-1).expand_as(x)
        logits = self.head(self.blocks(x.masked_scatter(mask, image)))
        return token_loss(logits[:, :-1], labels[:, 1:])


@program("handwritten")
def llava_by_masked_scatter(sampler: Sampler) -> Program:
    made = image_and_text(LLaVAScatter(), sampler)
    made.inputs["input_ids"][0, 3:15], made.inputs["input_ids"][1, 20:32] = 120, 120
    return made


class LLaVAMiddle(LLaVA):
    """Features of an image between the words before it and those behind."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        image, x = self.projector(self.vision(pixel_values)), self.embed(input_ids)
        x = torch.cat([x[:, :5], image, x[:, 5:]], dim=1)
        ignored = torch.full(image.shape[:2], -100, dtype=labels.dtype, device=labels.device)
        labels = torch.cat([labels[:, :5], ignored, labels[:, 5:]], dim=1)
        return token_loss(self.head(self.blocks(x))[:, :-1], labels[:, 1:])


@program("handwritten")
def llava_in_the_middle(sampler: Sampler) -> Program:
    return image_and_text(LLaVAMiddle(), sampler)


class QFormer(nn.Module):
    """Learned queries attend to each other and to an image, and come before the words."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.queries = ImageEncoder(), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.block, self.cross, self.language = Block(), Attention(), Block(causal=True)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        queries = self.block(self.queries.expand(input_ids.shape[0], -1, -1))
        queries = queries + self.cross(queries, self.vision(pixel_values))
        x = self.language(torch.cat([queries, self.embed(input_ids)], dim=1))
        return token_loss(self.head(x[:, 5:]), labels)


@program("handwritten")
def qformer(sampler: Sampler) -> Program:
    return image_and_text(QFormer(), sampler)


class Flamingo(nn.Module):
    """Gated cross attention from words to an image, in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.embed, self.head = (
            ImageEncoder(),
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, VOCABULARY),
        )
        self.cross, self.block, self.gate = Attention(), Block(causal=True), nn.Parameter(torch.randn(1))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.gate.tanh() * self.cross(x, self.vision(pixel_values))
        return token_loss(self.head(self.block(x)), labels)


@program("handwritten")
def flamingo(sampler: Sampler) -> Program:
    return image_and_text(Flamingo(), sampler)


class Perceiver(nn.Module):
    """Latents read the text, think, and are read by a query of each place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.read, self.think, self.write, self.head = Attention(), Block(), Attention(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        place = self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.embed(input_ids) + place
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = self.think(latents + self.read(latents, x))
        return token_loss(self.head(self.write(place.expand_as(x), latents)), labels)


@program("handwritten")
def perceiver(sampler: Sampler) -> Program:
    return Program(Perceiver(), {"input_ids": sampler.tokens(), "labels": sampler.labels()})


class MaskedAutoencoder(nn.Module):
    """A third of the patches is kept, by a sort of random numbers; masks take the others' places behind the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mask = nn.Linear(12, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.position = nn.Parameter(torch.randn(1, 35, WIDTH))
        self.encoder, self.decoder, self.head = Block(), Block(), nn.Linear(WIDTH, 12)

    def forward(self, patches: Tensor, noise: Tensor) -> Tensor:
        x = self.embed(patches) + self.position
        batch, length, width = x.shape
        order = noise.argsort(dim=1)
        back, kept = order.argsort(dim=1), length // 3
        x = self.encoder(torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, width)))
        x = torch.cat([x, self.mask.expand(batch, length - kept, width)], dim=1)
        x = torch.gather(x, 1, back[..., None].expand(-1, -1, width))
        error = (self.head(self.decoder(x + self.position)) - patches).pow(2).mean(dim=-1)
        hidden = (back >= kept).to(error.dtype)
        return (error * hidden).sum() / hidden.sum()


@program("handwritten")
def masked_autoencoder(sampler: Sampler) -> Program:
    inputs = {"patches": sampler.normal(BATCH, 35, 12), "noise": sampler.normal(BATCH, 35)}
    return Program(MaskedAutoencoder(), inputs, {"token_dims": {"patches": 1}})


class Detection(nn.Module):
    """DETR: queries of objects attend to all patches; positions of two embeddings are added to queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rows, self.columns = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Embedding(8, 8), nn.Embedding(8, 8)
        self.encoder = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.decoder = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.queries, self.boxes = nn.Embedding(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, pixel_values: Tensor, boxes: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        batch, _, h, w = x.shape
        columns, rows = torch.arange(w, device=x.device), torch.arange(h, device=x.device)
        place = torch.cat([self.columns(columns).expand(h, w, 8), self.rows(rows)[:, None].expand(h, w, 8)], dim=-1)
        place, x = place.flatten(0, 1)[None], x.flatten(2).transpose(1, 2)
        x = x + self.encoder(x + place, x + place, x)[0]
        queries = self.queries.weight.expand(batch, -1, -1)
        return F.l1_loss(self.boxes(self.decoder(queries, x + place, x)[0]).sigmoid(), boxes)


@program("handwritten")
def detr(sampler: Sampler) -> Program:
    inputs = {"pixel_values": sampler.normal(BATCH, 3, 20, 28), "boxes": sampler.normal(BATCH, 4, 4).sigmoid()}
    return Program(Detection(), inputs)
