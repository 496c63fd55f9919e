"""Constants: inputs whose values decide sizes, orders and branches of an encoder of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpcompile import ConfigError, GraphBreakError, InputError, verify
from cpcompile.capture.dynamo import compile_whole
from cpcompile.options.config import Config
from tests.graph.small_models import TinyLM, batch

IMAGE, LENGTH, WIDTH = 7, 29, 8
GRIDS = ((2, 3), (4, 1))


class Grids(TinyLM):
    """Images of several sizes as patches in one row: transposed where they are high, each a sum along its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, WIDTH)

    def order(self, height: int, width: int) -> Tensor:
        places = torch.arange(height * width).reshape(height, width)
        places += 0
        return places[places >= 0].reshape(height, width).t().reshape(-1)

    def features(self, patches: Tensor, grids: Tensor) -> Tensor:
        found = []
        for grid, own in zip(grids, patches.split(grids.prod(-1).tolist()), strict=True):
            height, width = grid.tolist()
            x = self.project(own)
            if grid[0] > grid[1]:
                x = x[self.order(height, width)]
            found.append(x.view(height, width, -1).cumsum(0).flatten(0, 1))
        number = torch.arange(len(grids)).repeat_interleave(grids.prod(-1))
        return torch.cat(found) * (1 + number)[:, None]

    def forward(self, input_ids: Tensor, labels: Tensor, patches: Tensor, grids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        x = x.masked_scatter((input_ids == IMAGE).unsqueeze(-1), self.features(patches, grids))
        return self.loss(self.head(x + self.attend(x)), labels)


def inputs_of(grids: Any = GRIDS, length: int = LENGTH) -> dict[str, Tensor]:
    inputs = batch(length)
    ids, num_patches = inputs["input_ids"], sum(h * w for h, w in grids)
    ids[ids == IMAGE] = 0
    ids[0, 12 : 12 + num_patches // 2] = IMAGE
    ids[1, 5 : 5 + num_patches - num_patches // 2] = IMAGE
    patches = torch.randn(num_patches, 5, generator=torch.Generator().manual_seed(1))
    return inputs | {"patches": patches, "grids": torch.tensor(grids)}


@pytest.mark.parametrize(("world_size", "dynamic"), [(1, True), (2, False), (3, True)])
def test_sizes_that_values_decide_are_exact(world_size: int, dynamic: bool) -> None:
    model = Grids().double()
    options = {"constants": ["grids"], "dynamic": dynamic}
    found = verify(model, inputs_of(), world_size=world_size, dtype=torch.float64, **options)
    found.raise_if_wrong()
    assert "project.weight" in found.gradient_errors


def test_each_combination_is_compiled_by_itself() -> None:
    model, graphs = Grids(), []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = compile_whole(model.forward, backend, Config(constants=["grids"]))
    for grids in (GRIDS, ((4, 1), (2, 3)), GRIDS, ((3, 4),)):
        inputs = inputs_of(grids)
        assert torch.allclose(compiled(**inputs), model(**inputs))
    assert len(graphs) == 3
    names = {str(node.target) for gm in graphs for node in gm.graph.nodes}
    assert (
        not {"item", "repeat_interleave", "t", "reshape"} & names
    )  # values are known: nothing of them is left to compute


def test_without_them_the_remedy_is_told() -> None:
    model = Grids()
    with pytest.raises(GraphBreakError, match=r"constants=\['image_grid_thw'\]"):
        verify(model, inputs_of(), world_size=2)


def test_what_cannot_be_one_is_refused() -> None:
    model = Grids()
    with pytest.raises(InputError, match=r"constants names 'patches', which is a tensor of torch\.float32 on cpu"):
        verify(model, inputs_of(), world_size=2, constants=["patches"])
    with pytest.raises(ConfigError, match=r"'grid', which the model does not take(.|\n)*Did you mean 'grids'"):
        verify(model, inputs_of(), world_size=2, constants=["grid"])


class CountsPositions(TinyLM):
    """Counts positions from lists, as models with positions in three directions do."""

    def get_rope_index(self, input_ids: Tensor) -> Tensor:
        return torch.tensor([len(row.tolist()) for row in input_ids.unique(dim=0)])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return super().forward(input_ids, labels * (self.get_rope_index(input_ids)[0] > 0))


def test_positions_of_images_are_to_be_passed() -> None:
    model = CountsPositions()
    with pytest.raises(GraphBreakError, match=r"Pass position_ids(.|\n)*get_rope_index\(input_ids"):
        verify(model, batch(LENGTH), world_size=2)
