"""Pipeline stages and experts on other ranks beside context parallelism, on gloo ranks against one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

import cpcompile
from tests.models import error, errors

VOCABULARY, WIDTH, LENGTH, MICRO_BATCHES = 32, 16, 29, 2
EXACT = 1e-12  # float64
# Called *_tensor_autograd until torch 2.12.
gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
scatter = getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd


class Block(nn.Module):
    """Causal attention and a layer for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in self.qkv(hidden).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hidden + F.gelu(self.out(mixed.transpose(1, 2).flatten(2)))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.block(self.embed(input_ids))
        return found


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.head(self.block(hidden))
        return found


def stages() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return First().double(), Last().double()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def pipelined(rank: Any, schedule: str) -> dict[str, float]:
    """Errors of a stage's gradients, and of the losses on the ranks of the last stage."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "cp"))
    index, ids = mesh["pp"].get_local_rank(), torch.randint(VOCABULARY, (2 * MICRO_BATCHES, LENGTH))
    torch.distributed.broadcast(ids, 0)
    module = stages()[index]
    cpcompile.apply(
        module, mesh, axis="cp", outputs="full", inner="eager", token_dims={} if index == 0 else {"hidden": 1}
    )
    hidden = torch.empty(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    given, returned = (ids[:2], hidden) if index == 0 else (hidden, hidden.new_empty(2, LENGTH, VOCABULARY))
    stage = PipelineStage(
        module, index, 2, torch.device("cpu"), input_args=given, output_args=returned, group=mesh["pp"].get_group()
    )
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
    runner, losses = kind(stage, MICRO_BATCHES, loss_fn=loss_of), list[Tensor]()
    if index == 0:
        runner.step(ids)
    else:
        runner.step(target=ids, losses=losses)

    alone = stages()
    expected = [loss_of(alone[1](alone[0](part)), part) for part in ids.chunk(MICRO_BATCHES)]
    (sum(expected) / MICRO_BATCHES).backward()  # type: ignore[union-attr]
    found = {f"loss {i}": error(a.detach(), b.detach()) for i, (a, b) in enumerate(zip(losses, expected, strict=False))}
    grads = {n: p.grad for n, p in module.named_parameters()}
    return found | errors(grads, {n: p.grad for n, p in alone[index].named_parameters()})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipeline_stages(pool: Any, schedule: str) -> None:
    for found in pool.run(4, pipelined, schedule, timeout=300):
        assert max(found.values()) < EXACT, found


class Experts(nn.Module):
    """Each rank of a group has one expert, which computes the tokens of all its ranks that chose it."""

    def __init__(self, number: int, group: Any) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)
        self.number, self.group = number, group

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        everyone = gather(torch.cat((tokens, self.gate(tokens).softmax(-1)), -1), gather_dim=0, group=self.group)
        weights = everyone[:, WIDTH:]
        chosen = (weights.argmax(-1) == self.number).to(weights.dtype) * weights[:, self.number]
        own = F.gelu(self.expert(everyone[:, :WIDTH])) * chosen[:, None]
        return scatter(own, "sum", scatter_dim=0, group=self.group).view(hidden.shape)


class Mixture(nn.Module):
    """A block and experts, of which this rank has one."""

    def __init__(self, number: int, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = stages()
        self.experts = Experts(number, group).double()
        torch.manual_seed(number)
        self.experts.expert.reset_parameters()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.first(input_ids)
        return loss_of(self.last(hidden + self.experts(hidden)), labels)


def of_experts(rank: Any, is_declared: bool) -> dict[str, float]:
    """Errors of a rank's gradients, against the same two models of two batches, which share a group of one rank each."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "cp"))
    number, group = mesh["ep"].get_local_rank(), mesh["ep"].get_group()
    ids = torch.randint(VOCABULARY, (2, 2, LENGTH))
    torch.distributed.broadcast(ids, 0)
    model = Mixture(number, group)
    # The same on one device: experts are on two ranks here as well, each with its batch, and no sequence is sharded.
    alone = Mixture(number, group)
    expected = alone(ids[number], ids[number])
    expected.backward()
    cpcompile.apply(model, mesh, axis="cp", inner="eager", token_local=["experts"] if is_declared else [])
    loss = model(ids[number], ids[number])
    loss.backward()
    return {"loss": error(loss.detach(), expected.detach())} | errors(
        {n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in alone.named_parameters()}
    )


def test_experts_on_other_ranks(pool: Any) -> None:
    for found in pool.run(4, of_experts, True, timeout=300):
        assert max(found.values()) < EXACT, found


def refused(rank: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "cp"))
    ids, model = torch.zeros(2, LENGTH, dtype=torch.int64), Mixture(0, mesh["cp"].get_group())
    cpcompile.apply(model, mesh, axis="cp", inner="eager", token_local=["experts"])
    with pytest.raises(cpcompile.NoRule, match=r"(?s)which share a sequence.*test_composition.*another axis"):
        model(ids, ids)
    with pytest.raises(cpcompile.NoRule, match=r"(?s)collective of the model's own.*token_local.*test_composition"):
        of_experts(rank, False)


def test_collectives_of_the_model_are_refused(pool: Any) -> None:
    pool.run(4, refused, timeout=300)
