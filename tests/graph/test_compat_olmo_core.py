"""OLMo-core's load balancers: the facts that its own tests state, and its defects put right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.compat.olmo_core import (
    RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancer,
    RingAttentionLoadBalancerType,
    RingAttentionZigZagLoadBalancer,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
    UlyssesLoadBalancer,
)

ZigZag, Llama3, Ulysses = RingAttentionZigZagLoadBalancer, RingAttentionLlama3LoadBalancer, UlyssesLoadBalancer
Result = tuple[list[Tensor], dict[str, object]]


def tokens(length: int) -> Tensor:
    return torch.arange(length).unsqueeze(0)


def shards(kind: type[RingAttentionLoadBalancer], world_size: int, length: int, **options: object) -> list[list[int]]:
    """Return what each rank gets of `length` tokens."""
    ranks = [kind(cp_rank=rank, cp_world_size=world_size) for rank in range(world_size)]
    return [r.batch_shard(inputs=[tokens(length)], seq_dims=[1], **options)[0][0].tolist() for r in ranks]  # type: ignore[arg-type]


def by_document(
    kind: type[RingAttentionLoadBalancer], world_size: int, length: int, bounds: list[int], **options: object
) -> tuple[list[list[int]], list[dict[str, object]]]:
    """Return what each rank gets of `length` tokens, and the rest of the results."""
    found: list[Result] = [
        kind(cp_rank=rank, cp_world_size=world_size).batch_shard_by_document(
            inputs=[tokens(length)],
            seq_dims=[1],
            cu_doc_lens=torch.tensor(bounds, dtype=torch.int32),
            **options,  # type: ignore[arg-type]
        )
        for rank in range(world_size)
    ]
    return [parts[0][0].tolist() for parts, _ in found], [rest for _, rest in found]


@pytest.mark.parametrize("kind", [ZigZag, Ulysses])
@pytest.mark.parametrize("dim", [1, -1])
def test_pad(kind: type[ZigZag] | type[Ulysses], dim: int) -> None:
    x, added = kind(cp_rank=0, cp_world_size=4).pad(tokens(6), dim, -1)
    assert (x.tolist(), added) == ([[0, 1, 2, 3, 4, 5, -1, -1]], 2)
    x, added = kind(cp_rank=0, cp_world_size=4).pad(tokens(6), dim, -1, length_multiple=5)
    assert (x.shape, added) == ((1, 10), 4)


def test_zig_zag() -> None:
    assert shards(ZigZag, 4, 8) == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert shards(ZigZag, 4, 6, pad_values=[-1]) == [[0, -1], [1, -1], [2, 5], [3, 4]]
    assert shards(ZigZag, 2, 3, pad_values=[-1], length_multiple=8)[0] == [0, 1, -1, -1]


def test_ulysses() -> None:
    assert shards(Ulysses, 4, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shards(Ulysses, 4, 6, pad_values=[-1]) == [[0, 1], [2, 3], [4, 5], [-1, -1]]
    assert shards(Ulysses, 2, 3, pad_values=[-1], length_multiple=8) == [[0, 1, 2, -1], [-1] * 4]


def test_llama3_needs_documents() -> None:
    with pytest.raises(NotImplementedError, match="call batch_shard_by_document"):
        shards(Llama3, 2, 8)


def test_a_mask_stays_a_mask() -> None:
    mask = torch.tensor([[True, True, True, True, True, True]])
    (part,) = ZigZag(cp_rank=0, cp_world_size=2).batch_shard(inputs=[mask], seq_dims=[1], pad_values=[0])
    assert part.dtype == torch.bool
    assert part.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("kind", [ZigZag, Ulysses])
def test_inputs_of_several_shapes(kind: type[ZigZag] | type[Ulysses]) -> None:
    """Each has its own dim, which may be negative, and its own padding. Parts are contiguous and keep gradients."""
    balancer = kind(cp_rank=1, cp_world_size=2)
    hidden = torch.randn(2, 3, 6, 5, requires_grad=True)
    a, b = balancer.batch_shard(inputs=[hidden, tokens(6)], seq_dims=[-2, -1], pad_values=[0.5, -1], length_multiple=8)
    assert a.shape == (2, 3, 4, 5) and a.is_contiguous()
    for slot, position in enumerate(b[0].tolist()):
        expected = hidden[:, :, position] if position >= 0 else torch.full((2, 3, 5), 0.5)
        assert torch.equal(a[:, :, slot], expected)
    bounds = torch.tensor([0, 2, 6])
    both, _ = balancer.batch_shard_by_document(
        inputs=[hidden, tokens(6)], seq_dims=[-2, 1], cu_doc_lens=bounds, pad_values=[0.5, -1], length_multiple=4
    )
    assert both[0].shape[2] == both[1].shape[1]
    a.sum().backward()
    assert hidden.grad is not None and hidden.grad.sum() == 30 * int((b >= 0).sum())


def test_zig_zag_by_document() -> None:
    parts, rest = by_document(ZigZag, 2, 12, [0, 8, 12])
    assert parts == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert [r["cu_doc_lens"].tolist() for r in rest] == [[0, 4, 6]] * 2  # type: ignore[attr-defined]
    assert [r["max_doc_len"] for r in rest] == [4, 4]


def test_zig_zag_by_document_pads_each_and_drops_what_is_after_the_last() -> None:
    with pytest.warns(
        UserWarning, match=r"2 tokens after the last boundary of 'cu_doc_lens' \(10\) are dropped"
    ) as seen:
        parts, rest = by_document(ZigZag, 2, 12, [0, 7, 10], pad_values=[-1])
    assert {record.filename for record in seen} == {__file__}
    assert parts == [[0, 1, 6, -1, 7, -1], [2, 3, 4, 5, 8, 9]]
    assert rest[0]["cu_doc_lens"].tolist() == [0, 4, 6]  # type: ignore[attr-defined]


def test_zig_zag_by_document_adds_a_document_for_padding_only() -> None:
    for length_multiple, bounds, held in ((6, [0, 4, 6], 6), (4, [0, 4, 6, 8], 8), (1, [0, 4, 6], 6)):
        parts, rest = by_document(ZigZag, 2, 12, [0, 8, 12], pad_values=[-1], length_multiple=length_multiple)
        assert [len(part) for part in parts] == [held] * 2
        assert rest[0]["cu_doc_lens"].tolist() == bounds  # type: ignore[attr-defined]
        assert rest[0]["cu_doc_lens"].dtype == torch.int32  # type: ignore[attr-defined]


def test_empty_documents_stay() -> None:
    parts, rest = by_document(ZigZag, 2, 8, [0, 0, 4, 4, 8])
    assert parts == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert rest[0]["cu_doc_lens"].tolist() == [0, 0, 2, 2, 4]  # type: ignore[attr-defined]
    parts, rest = by_document(Ulysses, 2, 8, [0, 0, 4, 4, 8])
    assert rest[0]["cu_doc_lens"].tolist() == [0, 0, 4, 4, 8]  # type: ignore[attr-defined]


def test_ulysses_by_document() -> None:
    parts, rest = by_document(Ulysses, 2, 12, [0, 8, 12])
    assert parts == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [r["cu_doc_lens"].tolist() for r in rest] == [[0, 8, 12]] * 2  # type: ignore[attr-defined]
    parts, rest = by_document(Ulysses, 4, 10, [0, 6, 10], pad_values=[-1])
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, -1, -1]]
    assert [r["cu_doc_lens"].tolist() for r in rest] == [[0, 6, 10, 12]] * 4  # type: ignore[attr-defined]
    assert [r["max_doc_len"] for r in rest] == [6] * 4
    with pytest.warns(UserWarning, match="2 tokens after the last boundary"):
        parts, rest = by_document(Ulysses, 2, 12, [0, 6, 10])
    assert parts == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_llama3_pads_to_the_next_multiple() -> None:
    """The case of 1000 tokens that lost 24."""
    parts, rest = by_document(Llama3, 4, 1000, [0, 300, 1000], pad_values=[-1], length_multiple=16)
    assert [len(part) for part in parts] == [256] * 4
    assert [token for part in parts for token in part] == [*range(1000), *[-1] * 24]
    assert rest[1] | {"cu_doc_lens_q": 0, "cu_doc_lens_k": 0} == {
        "cu_doc_lens_q": 0,
        "cu_doc_lens_k": 0,
        "max_doc_len_q": 212,
        "max_doc_len_k": 300,
        "local_k_slice": slice(0, 512),
    }
    assert rest[1]["cu_doc_lens_q"].tolist() == [0, 44, 256]  # type: ignore[attr-defined]
    assert rest[1]["cu_doc_lens_k"].tolist() == [0, 300, 512]  # type: ignore[attr-defined]
    assert rest[3]["cu_doc_lens_q"].tolist() == [0, 232, 256]  # type: ignore[attr-defined]
    assert rest[3]["cu_doc_lens_k"].tolist() == [0, 700, 724]  # type: ignore[attr-defined]
    assert rest[3]["local_k_slice"] == slice(300, 1024)


def test_llama3_without_padding() -> None:
    parts, rest = by_document(Llama3, 2, 12, [0, 6, 12])
    assert parts == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert rest[1]["local_k_slice"] == slice(6, 12)
    assert rest[1]["cu_doc_lens_k"].tolist() == [0, 6]  # type: ignore[attr-defined]
    x, added = Llama3(cp_rank=0, cp_world_size=2).pad(torch.ones(2, 3), -2, 1, 7.0)
    assert (x.tolist(), added) == ([[1, 1, 1], [1, 1, 1], [7, 7, 7]], 1)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([ZigZag, Llama3, Ulysses]),
    st.integers(1, 9),
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    st.integers(1, 5),
)
def test_every_token_is_held_once(
    kind: type[RingAttentionLoadBalancer], world_size: int, sizes: list[int], multiple: int
) -> None:
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    length_multiple = multiple * world_size if kind is Ulysses else multiple
    parts, rest = by_document(kind, world_size, bounds[-1], bounds, pad_values=[-1], length_multiple=length_multiple)
    assert sorted(token for part in parts for token in part if token >= 0) == list(range(bounds[-1]))
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) % multiple == 0
    whole = len(parts[0]) * (world_size if kind is Ulysses else 1)
    for found in rest:
        assert found["cu_doc_lens_q" if kind is Llama3 else "cu_doc_lens"][-1] == whole  # type: ignore[index]


@pytest.mark.parametrize("kind", [ZigZag, Llama3, Ulysses])
def test_refusals(kind: type[RingAttentionLoadBalancer]) -> None:
    balancer = kind(cp_rank=0, cp_world_size=2)

    def shard(bounds: Tensor, **options: object) -> None:
        arguments = {"inputs": [tokens(7)], "seq_dims": [1], "cu_doc_lens": bounds} | options
        balancer.batch_shard_by_document(**arguments)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match=r"must be divisible by \d, otherwise provide 'pad_values'"):
        shard(torch.tensor([0, 7]))
    with pytest.raises(RuntimeError, match="to be on CPU, got meta"):
        shard(torch.tensor([0, 7], device="meta"))
    with pytest.raises(RuntimeError, match=r"to be a 1D tensor, got the shape \[1, 2\]"):
        shard(torch.tensor([[0, 7]]))
    with pytest.raises(RuntimeError, match=r"to start with a 0, got \[1\]"):
        shard(torch.tensor([1, 7]))
    with pytest.raises(RuntimeError, match=r"to ascend, got \[0, 5, 3, 7\]"):
        shard(torch.tensor([0, 5, 3, 7]), pad_values=[0])
    with pytest.raises(RuntimeError, match=r"the last boundary.* 7"):
        shard(torch.tensor([0, 8]), pad_values=[0])
    with pytest.raises(ValueError, match="1 inputs need as many seq_dims and pad_values, got 1 and 2"):
        shard(torch.tensor([0, 7]), pad_values=[0, 0])
    with pytest.raises(ValueError, match=r"inputs must have one length on their sequence dimension, got \[7, 9\]"):
        shard(torch.tensor([0, 7]), inputs=[tokens(7), tokens(9)], seq_dims=[1, 1])


def test_llama3_refuses_tokens_after_the_last_boundary() -> None:
    with pytest.raises(
        RuntimeError, match="expected inputs of size 10 on the sequence dimension, the last boundary, got 12"
    ):
        by_document(Llama3, 2, 12, [0, 6, 10])


def test_length_multiples_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"length multiple \(6\) must be divisible by 2 x CP degree \(4\)"):
        shards(ZigZag, 2, 12, length_multiple=6)
    with pytest.raises(RuntimeError, match=r"length multiple \(5\) must be divisible by CP degree \(2\)"):
        shards(Ulysses, 2, 12, length_multiple=5)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "kind"), [("zig_zag", ZigZag), ("llama3", Llama3), ("ulysses", Ulysses)])
def test_build(name: str, kind: type[RingAttentionLoadBalancer], four_ranks: None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    balancer = RingAttentionLoadBalancerType(name).build(mesh["cp"])
    assert type(balancer) is kind
    assert (balancer.cp_rank, balancer.cp_world_size) == (0, 2)
    assert RingAttentionLoadBalancerType(name).build(mesh["dp"]).cp_rank == 1


def test_styles() -> None:
    assert UlyssesContextParallelStyle().load_balancer == "ulysses"
    ring = RingContextParallelStyle()
    assert (ring.load_balancer, ring.head_stride) == ("zig_zag", 1)
    ring.load_balancer, ring.head_stride = RingAttentionLoadBalancerType.llama3, 2
    assert ring == RingContextParallelStyle(RingAttentionLoadBalancerType.llama3, 2)
    assert [field.name for field in fields(RingContextParallelStyle)] == ["load_balancer", "head_stride"]
    assert [str(kind) for kind in RingAttentionLoadBalancerType] == ["zig_zag", "llama3", "ulysses"]
