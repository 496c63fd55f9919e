"""The program of every rank as Python: it runs on gloo ranks, and has the loss and gradients of the model that it was made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import cpcompile
from tests.gloo.test_own_backward import all_of_them
from tests.graph.small_models import batch as small_batch
from tests.graph.test_own_backward import Model as WithOwnBackwards
from tests.models import batch, error, gradients, loss_of, make

EXACT = 1e-12  # float64


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model with its inputs, of a length that no number of ranks divides."""
    if name == "own backwards":
        return WithOwnBackwards(all_of_them), small_batch(11)
    model = make("rotary")
    return model, batch(model, 23)


def run_program(rank: Any, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Run the program with the model's weights; return the largest errors of the loss and of the gradients."""
    torch._dynamo.reset()
    model, inputs = model_and_inputs(name)
    world_size, inner = dist.get_world_size(rank.process_group), options.get("inner_size", 1)
    text = cpcompile.explain(model, inputs, world_size=world_size, program=True, **options).program
    found: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program.py", "exec"), found)
    found["GROUP"] = rank.group
    if inner > 1:  # all ranks of the pool, which make these groups together
        mesh = init_device_mesh("cpu", (world_size // inner, inner), mesh_dim_names=("outer", "inner"))
        found |= {f"{dim.upper()}_GROUP": mesh.get_group(dim).group_name for dim in ("outer", "inner")}
    found["register_bodies"]()
    program = found["Program"]()
    own, whole = dict(program.named_parameters()), dict(model.named_parameters())
    paths = {path.replace(".", "_"): path for path in whole}
    assert set(own) == set(paths)
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(whole[paths[key]])
    result = program(**found["inputs"]())
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    for key in found["SUMMED"]:
        dist.all_reduce(own[key].grad, group=rank.process_group)
    output = model(**inputs)
    expected = output if isinstance(output, Tensor) else loss_of(output)
    expected.backward()
    reference = gradients(model)
    errors = {paths[key]: error(parameter.grad, reference[paths[key]]) for key, parameter in own.items()}
    return errors | {"loss": error(loss.detach(), expected.detach())}


@pytest.mark.always
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "world_size", "options"),
    [
        ("rotary", 3, {"strategy": "ring", "balancer": "zig_zag"}),
        ("rotary", 4, {"strategy": "usp", "inner_size": 2, "balancer": "contiguous"}),
        ("own backwards", 2, {}),
    ],
    ids=["ring", "usp", "own backwards"],
)
def test_the_program_computes_what_the_model_does(
    pool: Any, name: str, world_size: int, options: dict[str, Any]
) -> None:
    for found in pool.run(world_size, run_program, name, options, timeout=200):
        assert {key: value for key, value in found.items() if value > EXACT} == {}
