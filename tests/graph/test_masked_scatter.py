"""Masked scatter: features of images in the places of their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpcompile import CPError, verify
from tests.models import RotaryLM, batch

aten, cp = torch.ops.aten, torch.ops.cpcompile
IMAGE = 7


class SeesImages(RotaryLM):
    """Puts projected patches in the places of the image tokens; `form` says how the mask is written."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.project = form, nn.Linear(5, 32)

    def mask(self, input_ids: Tensor, x: Tensor) -> Tensor:
        is_image = (input_ids == IMAGE).unsqueeze(-1)
        match self.form:
            case "column":
                return is_image
            case "expanded":
                return is_image.expand_as(x).to(x.device)
            case "of every feature":
                return is_image & (torch.arange(x.shape[-1]) % 3 > 0)
        of_embeddings = (x == self.embed(torch.tensor(IMAGE))).all(-1, keepdim=True)
        is_shifted = self.form == "of the token before"
        return nn.functional.pad(of_embeddings[:, :-1], (0, 0, 1, 0)) if is_shifted else of_embeddings

    def forward(self, input_ids: Tensor, labels: Tensor, patches: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        x = x.masked_scatter(self.mask(input_ids, x), self.project(patches))
        return super().forward(labels=labels, inputs_embeds=x)


def inputs_of(model: nn.Module, num_images: int = 9) -> dict[str, Tensor]:
    inputs = batch(model, 29)
    ids = inputs["input_ids"]
    ids[ids == IMAGE] = 0
    ids[0, 3:7] = ids[1, 20:25] = IMAGE
    return inputs | {"patches": torch.randn(num_images, 5, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("form", ["column", "expanded", "of every feature", "of embeddings", "of the token before"])
@pytest.mark.parametrize(
    ("world_size", "balancer", "dynamic"),
    [(1, "contiguous", True), (2, "zig_zag", True), (3, "contiguous", False), (3, "zig_zag", True)],
)
def test_images_among_words_are_exact(form: str, world_size: int, balancer: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = SeesImages(form).double()
    found = verify(
        model, inputs_of(model), world_size=world_size, dtype=torch.float64, balancer=balancer, dynamic=dynamic
    )
    found.raise_if_wrong()
    assert found.gradient_errors.keys() >= {"project.weight", "embed.weight"}
    counts = [n.meta["val"] for n in found.transformed.graph.graph.nodes if n.target is aten.cumsum.default]
    assert [count.shape[0] for count in counts] == [2 * 29 * (32 if form == "of every feature" else 1)]


def test_a_whole_mask_is_not_gathered() -> None:
    model = SeesImages("column").double()
    found = verify(model, inputs_of(model), world_size=2, dtype=torch.float64)
    assert not found.transformed.graph.graph.find_nodes(op="call_function", target=cp.gather_tokens.default)


def test_more_patches_than_places_are_left_over() -> None:
    model = SeesImages("column").double()
    verify(model, inputs_of(model, 12), world_size=2, dtype=torch.float64).raise_if_wrong()


class ScattersTokens(RotaryLM):
    """Takes the elements of the source from tokens."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        x = x.masked_scatter((input_ids == IMAGE).unsqueeze(-1), x.flip(1).tanh())
        return super().forward(labels=labels, inputs_embeds=x)


def test_a_source_of_tokens_is_refused() -> None:
    model = ScattersTokens().double()
    inputs = batch(model, 29)
    with pytest.raises(CPError, match=r"aten\.masked_scatter(.|\n)*x\.masked_scatter\("):
        verify(model, inputs, world_size=2)
    verify(model, inputs, world_size=2, dtype=torch.float64, strict=False).raise_if_wrong()
