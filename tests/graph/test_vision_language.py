"""Vision-language models of transformers: the words are sharded, the image encoder runs whole, and nothing differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from cpcompile import explain, verify
from cpcompile.capture.dynamo import compile_whole, token_length
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.zoo.programs import PROGRAMS, make_program
from cpcompile.zoo.result import EXACT, Variant
from cpcompile.zoo.run import Job, run_job
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_constants import IMAGE, LENGTH, Grids, inputs_of

KEYS = [key for key in PROGRAMS if key.startswith("vision_language:")]
# Features by `masked_scatter`; tokens that see each other both ways; grids, positions in three directions, deepstack.
QUICK = ["Llava", "Gemma3", "Qwen3VL"]
quick = {f"vision_language:{name}ForConditionalGeneration" for name in QUICK}


def outcomes(key: str, world_sizes: tuple[int, ...]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    variants = tuple(Variant("", packed=False, world_size=size, strict=True) for size in world_sizes)
    run_job(Job(key, variants), lambda result: found.append((result.outcome, result.reason)))
    return found


@pytest.mark.parametrize("key", sorted(quick))
def test_images_among_words_are_exact(key: str) -> None:
    assert outcomes(key, (2,)) == [(EXACT, "")]


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_model_is_exact(key: str) -> None:
    assert outcomes(key, (1, 2, 3, 4)) == [(EXACT, "")] * 4


def test_a_row_without_images_is_exact() -> None:
    inputs = inputs_of(((4, 2),))
    inputs["input_ids"][0] = 0
    inputs["input_ids"][1, 13:21] = IMAGE  # across the edge of two ranks
    inputs["input_ids"][1, :13] = 0
    found = verify(Grids(), inputs, world_size=2, dtype=torch.float64, constants=["grids"])
    found.raise_if_wrong()


class Encoder(nn.Module):
    """Attention among the patches of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.project(images)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x).flatten(0, 2)


class Sees(TinyLM):
    """Puts what its encoder makes of images in the places of the image tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, input_ids: Tensor, labels: Tensor, images: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        if images is not None:
            x = x.masked_scatter((input_ids == IMAGE).unsqueeze(-1), self.encoder(images))
        return self.loss(self.head(x + self.attend(x)), labels)


def images_of(num_images: int) -> dict[str, Tensor]:
    inputs = batch(LENGTH)
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 0
    for i in range(num_images):
        inputs["input_ids"][i % 2, 3 + 8 * (i // 2) : 7 + 8 * (i // 2)] = IMAGE
    return inputs | ({"images": torch.randn(num_images, 4, 5)} if num_images else {})


def test_explain_says_what_runs_whole() -> None:
    found = explain(Sees(), images_of(3), world_size=2)
    (whole,) = found.whole
    assert (whole.module, whole.inputs, whole.attentions) == ("encoder", {"images": (3, 4, 5)}, 1)
    assert whole.flops == 3 * (2 * 4 * 5 * 8 + 2 * 2 * 4 * 4 * 8)
    text = str(found)
    assert "1 module(s) that see no tokens run whole on every rank" in text and "images [3, 4, 5]" in text
    assert not explain(Sees(), images_of(0), world_size=2).whole


def encoded_outside(key: str, world_size: int, names: set[str]) -> tuple[float, set[str]]:
    """Return the largest error of a gradient where features are computed before the call, and which parameters have one."""
    made = make_program(key)
    model = made.model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in made.inputs.items()}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with Widen():
        expected = gradients(model(**inputs).loss)
        features = model.get_image_features(**{name: x for name, x in inputs.items() if name in names})
    features.pooler_output = [torch.cat(list(features.pooler_output))]
    given: dict[str, Any] = {name: x for name, x in inputs.items() if name not in names}
    given["mm_encoder_outputs"] = {"image": features}
    config = Config()
    ranks = LockstepBackend(config, Axis.in_process(world_size), is_wide=True)
    token_length(given, config, mark_dynamic=True)
    found = gradients(compile_whole(model.forward, ranks, config)(**given).loss)
    scale = max(float(x.norm()) for x in expected.values())
    return max(float((found[name] - x).norm()) for name, x in expected.items()) / scale, set(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Qwen3VL"])
def test_an_encoder_outside_of_the_call_is_exact(name: str) -> None:
    error, trained = encoded_outside(
        f"vision_language:{name}ForConditionalGeneration", 3, {"pixel_values", "image_grid_thw"}
    )
    assert error < 1e-12
    assert any("visual" in each for each in trained)
