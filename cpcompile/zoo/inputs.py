"""Inputs: one batch for each category, with lengths that neither 2 nor 4 ranks divide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cpcompile.zoo.catalogue import Entry
from cpcompile.zoo.composite import IMAGE, START

BATCH = 2
LENGTH = 37
DECODER_LENGTH = 29
# Models whose own code asks for a multiple of its chunk length.
LENGTHS = {"reformer": 39, "xlstm": 40}
IMAGE_SIDE = 40
FRAMES = 4
# Ids of ordinary tokens: below them are padding and the ends of a sequence, above them those for images.
FIRST, LAST = 3, 115
# Where the packed documents of each row begin.
DOCUMENTS = ((0, 9, 26), (0, 20, 23))


class Sampler:
    """Random inputs, the same in every process."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1234)

    def tokens(self, length: int = LENGTH) -> Tensor:
        """Return ids `[B, length]`."""
        return torch.randint(FIRST, LAST, (BATCH, length), generator=self.generator)

    def labels(self, length: int = LENGTH) -> Tensor:
        """Return labels `[B, length]`; a third of the first row is ignored, so that ranks have unequal numbers of labels."""
        labels = self.tokens(length)
        labels[0, : length // 3] = -100
        return labels

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, generator=self.generator)


def make_inputs(entry: Entry, *, packed: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of the model of `entry`.

    With `packed`, `position_ids` restart with each document.
    """
    inputs = _CATEGORIES[entry.category](Sampler(), entry.name)
    if packed:
        inputs["position_ids"] = packed_positions(inputs["input_ids"].shape[1])
    return inputs


def packed_positions(length: int) -> Tensor:
    """Return positions `[B, length]` that restart with each document."""
    position = torch.arange(length)
    return torch.stack(
        [
            position - torch.tensor(starts)[torch.bucketize(position, torch.tensor(starts), right=True) - 1]
            for starts in DOCUMENTS
        ]
    )


def _text(s: Sampler, name: str) -> dict[str, Any]:
    length = LENGTHS.get(name, LENGTH)
    return {"input_ids": s.tokens(length), "labels": s.labels(length)}


def _encoded_text(s: Sampler, name: str) -> dict[str, Any]:
    return {"input_ids": s.tokens()}


def _two_texts(s: Sampler, name: str) -> dict[str, Any]:
    decoder = {"decoder_input_ids": s.tokens(DECODER_LENGTH), "labels": s.labels(DECODER_LENGTH)}
    if name == "whisper":
        return {"input_features": s.normal(BATCH, 16, 2 * LENGTH), **decoder}
    return {"input_ids": s.tokens(), **decoder}


def _image(s: Sampler, name: str) -> dict[str, Any]:
    side = 32 if name == "swin" else IMAGE_SIDE
    if name == "siglip2_vision_model":
        shapes = torch.tensor([[5, 5]] * BATCH)
        mask = torch.ones(BATCH, 25, dtype=torch.long)
        return {"pixel_values": s.normal(BATCH, 25, 3 * 8 * 8), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    shape = (BATCH, FRAMES, 3, side, side) if name in ("videomae", "vivit") else (BATCH, 3, side, side)
    inputs: dict[str, Any] = {"pixel_values": s.normal(*shape)}
    if name in ("beit", "deit", "vit"):
        inputs["labels"] = torch.zeros(BATCH, dtype=torch.long)
    if name == "vit_mae":
        inputs["noise"] = s.normal(BATCH, (side // 8) ** 2)  # which patches are hidden
    return inputs


def _sound(s: Sampler, name: str) -> dict[str, Any]:
    if name == "audio-spectrogram-transformer":
        return {"input_values": s.normal(BATCH, 72, 16)}
    if name == "parakeet_encoder":
        return {"input_features": s.normal(BATCH, 8 * LENGTH, 16)}
    return {"input_values": s.normal(BATCH, 8 * LENGTH)}


def _text_and_image(s: Sampler, name: str) -> dict[str, Any]:
    inputs = _text(s, name)
    ids, kinds = inputs["input_ids"], torch.zeros(BATCH, LENGTH, dtype=torch.long)
    match name:
        case "gemma3":
            kinds[:, 5:14] = 1  # a block of image tokens
            inputs["token_type_ids"] = kinds
        case "gemma4_vlm":
            inputs["mm_token_type_ids"] = kinds
        case "paligemma":
            kinds[:, 11:] = 1  # what follows the prefix
            inputs["token_type_ids"] = kinds
        case "llava_img":
            ids[:, 2:18] = IMAGE
            inputs["pixel_values"] = s.normal(BATCH, 3, 16, 16)
        case "qwen2_5_vl_img":
            ids[:, 1], ids[:, 2:6] = START, IMAGE
            kinds[:, 2:6] = 1
            inputs["pixel_values"] = s.normal(BATCH * 16, 3 * 2 * 4 * 4)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * BATCH)
            inputs["mm_token_type_ids"] = kinds
    return inputs


_CATEGORIES: Mapping[str, Callable[[Sampler, str], dict[str, Any]]] = {
    "causal": _text,
    "mlm": _text,
    "vlm": _text_and_image,
    "textenc": _encoded_text,
    "s2s": _two_texts,
    "vision": _image,
    "audio": _sound,
}
