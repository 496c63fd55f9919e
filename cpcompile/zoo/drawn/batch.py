"""Batch: what a drawn model is given, of all that was drawn as much as its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from cpcompile.zoo.drawn.draw import TEXT, Draw
from cpcompile.zoo.drawn.heads import CHOICES, labels_of
from cpcompile.zoo.inputs import DECODER_LENGTH, FIRST, LAST, LENGTHS, make_inputs

PAD, END = 0, 2


class Batch:
    """The keyword arguments of a model, made one after the other from one source of random numbers."""

    def __init__(self, draw: Draw, model: nn.Module) -> None:
        self.draw, self.model = draw, model
        self.generator = torch.Generator().manual_seed(draw.index)
        self.takes = set(inspect.signature(model.forward).parameters)
        self.length = LENGTHS.get(draw.entry.name, draw.length)
        self.real = self._real()
        self.last = (torch.arange(self.length) * self.real).argmax(1)

    def make(self) -> dict[str, Any]:
        """Return the keyword arguments."""
        draw = self.draw
        if draw.entry.category not in TEXT:
            return make_inputs(draw.entry)
        if draw.entry.name == "whisper":
            return make_inputs(draw.entry) | self._decoder(DECODER_LENGTH)
        ids = torch.where(self.real, self.tokens(LAST - FIRST) + FIRST, PAD)
        if draw.head == "sequence classification" and draw.entry.category == "s2s":
            ids[torch.arange(draw.batch), self.last] = END
        inputs: dict[str, Any] = {"input_ids": ids}
        if draw.takes_embeddings and "inputs_embeds" in self.takes:
            width = self.model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
            inputs = {"inputs_embeds": torch.randn(draw.batch, self.length, width, generator=self.generator)}
        if draw.padding != "none" and "attention_mask" in self.takes:
            inputs["attention_mask"] = self.real.long()
        if draw.is_packed and draw.entry.category == "causal" and "position_ids" in self.takes:
            inputs["position_ids"] = self._packed_positions()
        if draw.has_types and "token_type_ids" in self.takes and draw.entry.category == "mlm":
            inputs["token_type_ids"] = self.tokens(2)
        if draw.head == "multiple choice":
            along = 0 if draw.batch > 1 else 1  # choices that are alike have no gradient
            inputs = {name: torch.stack([x, x.roll(1, along)][:CHOICES], 1) for name, x in inputs.items()}
        return inputs | self._labels()

    def tokens(self, below: int, length: int = 0) -> Tensor:
        """Return an integer below a number for each token, `[B, length]`."""
        return torch.randint(below, (self.draw.batch, length or self.length), generator=self.generator)

    def _real(self) -> Tensor:
        """Return which tokens are no padding, `[B, S]`; no two sequences have as many, and none is all padding."""
        place, draw = torch.arange(self.length), self.draw
        numbers = 1 + torch.randperm(self.length // 2, generator=self.generator)[: draw.batch, None]
        match draw.padding:
            case "left":
                return place >= numbers
            case "right":
                return place < self.length - numbers
        return torch.ones(draw.batch, self.length, dtype=torch.bool)

    def _packed_positions(self) -> Tensor:
        """Return positions that restart with each document."""
        starts = torch.rand(self.draw.batch, self.length, generator=self.generator) < 0.15
        starts[:, 0] = True
        place = torch.arange(self.length)
        return place - torch.where(starts, place, 0).cummax(1).values

    def _labels(self) -> dict[str, Tensor]:
        draw = self.draw
        if draw.entry.category == "s2s" and "decoder_input_ids" in self.takes:
            decoder = self._decoder(draw.decoder_length)
            if draw.head == "sequence to sequence":
                return decoder
            if draw.head == "no head":
                return {"decoder_input_ids": decoder["decoder_input_ids"]}
        found = labels_of(draw.head, self.tokens, draw.batch, self.length)
        if not found and "labels" in self.takes and draw.head != "no head":
            found = {"labels": self.tokens(LAST - FIRST) + FIRST}
        if "labels" in found and found["labels"].dim() == 2:
            found["labels"] = self._with_ignored(found["labels"])
        return found

    def _with_ignored(self, labels: Tensor) -> Tensor:
        """Return labels of which some are ignored, unequally over the sequence."""
        ignored = torch.rand(labels.shape, generator=self.generator) < 0.3
        ignored[:, -1] = False
        if self.draw.hides_padding:
            ignored |= ~self.real
        return labels.masked_fill(ignored, -100)

    def _decoder(self, length: int) -> dict[str, Tensor]:
        ids, labels = (self.tokens(LAST - FIRST, length) + FIRST for _ in range(2))
        labels[0, : length // 3] = -100
        return {"decoder_input_ids": ids, "labels": labels}
