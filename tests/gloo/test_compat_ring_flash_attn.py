"""ring-flash-attn's functions against a plain softmax over the whole sequence: out, lse, dq, dk and dv in float64."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile.compat import ring_flash_attn as names
from cpcompile.compat._ring_attention import Options, Place, terms_of
from cpcompile.compat._ring_layouts import contiguous, starts_of_all
from cpcompile.errors import ConfigError, InputError
from cpcompile.runtime.tokens.dropout import is_kept
from cpcompile.runtime.transport.post import Ring

HEAD_DIM, SEED = 8, 7
FAMILIES = ("ring", "zigzag_ring", "stripe")
SHARED = (
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
    "group",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"causal": True, "softmax_scale": 0.7},
    "window": {"causal": True, "window_size": (5, 5)},
    "window_of_one_token": {"causal": True, "window_size": (0, 0)},
    "window_both_sides": {"window_size": (4, 3)},
    "window_after": {"window_size": (-1, 2)},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "dropout": {"causal": True, "dropout_p": 0.3},
    "deterministic": {"causal": True, "deterministic": True},
    "everything": {
        "dropout_p": 0.2,
        "window_size": (9, 6),
        "softmax_scale": 0.4,
        "alibi_slopes": torch.tensor([0.4, 0.3, 0.2, 0.1]),
    },
}
HEADS = ((4, 2), (4, 4), (4, 1))
# Tokens of documents, of all ranks for llama3, else in units of what a document must be a multiple of.
DOCUMENTS: dict[str, tuple[int, ...]] = {
    "one": (48,),
    "two": (10, 38),
    "single_tokens": (1, 1, 46),
    "on_the_edges": (12, 12, 12, 12),
    "five": (5, 20, 3, 15, 5),
    "six": (1, 2, 3, 4, 5, 33),
    "empty": (0, 24, 0, 0, 23, 1, 0),
}
UNITS: dict[str, tuple[int, ...]] = {
    "one": (5,),
    "two": (1, 3),
    "four": (3, 1, 5, 2),
    "six": (1, 1, 4, 2, 1, 3),
    "empty": (0, 2, 0, 1),
}


def inputs(batch: int, length: int, num_query: int, num_key: int) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of out, `[B, S, heads, D]`."""
    torch.manual_seed(0)
    heads = (num_query, num_key, num_key, num_query)
    return [torch.randn(batch, length, n, HEAD_DIM, dtype=torch.float64) for n in heads]


def reference(
    tensors: list[torch.Tensor],
    sizes: tuple[int, ...],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
) -> list[torch.Tensor]:
    """Return (out, lse, dq, dk, dv) by the definitions, for documents of `sizes` tokens."""
    dout = tensors[3].transpose(1, 2)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = torch.arange(q.shape[2])
    row, column = at[:, None], at
    ids = torch.repeat_interleave(torch.tensor(sizes))
    visible = ids[:, None] == ids
    if causal:
        visible = visible & (column <= row)
    left, right = window_size
    if left >= 0:
        visible = visible & (row - column <= left)
    if right >= 0:
        visible = visible & (column - row <= right)
    s = q @ k.transpose(2, 3) * (HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale)
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * (row - column).abs()
    s = s.masked_fill(~visible, -torch.inf)
    p = torch.softmax(s, 3)
    if dropout_p:
        torch.manual_seed(SEED)
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, ())
        p = p * is_kept(seed, 0, torch.arange(p.numel()).view(p.shape), dropout_p) / (1 - dropout_p)
    out = p @ v
    grads = torch.autograd.grad(out, leaves, dout)
    return [out.detach().transpose(1, 2), s.logsumexp(3).detach(), *grads]


def tokens_of(rank: int, world_size: int, family: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return which tokens a rank holds, in its order."""
    if family == "llama3":
        return torch.arange(sum(sizes)).chunk(world_size)[rank]
    found = []
    for document in torch.arange(sum(sizes)).split(list(sizes)):
        if family == "stripe":
            found.append(document[rank::world_size])
        elif family == "zigzag_ring":
            chunks = document.view(2 * world_size, -1)
            found += [chunks[rank], chunks[2 * world_size - 1 - rank]]
        else:
            found.append(document.view(world_size, -1)[rank])
    return torch.cat(found)


def ends(sizes: tuple[int, ...]) -> torch.Tensor:
    """Return cu_seqlens."""
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def attend(rank: Any, function: str, cases: list[tuple[Any, ...]]) -> list[list[torch.Tensor]]:
    """Return [out, lse, dq, dk, dv] of this rank for each case (batch, sizes, heads, options, heads_k_stride)."""
    family, is_varlen = function.split("_flash_attn")[0], "varlen" in function
    results = []
    for batch, sizes, heads, options, stride in cases:
        at = tokens_of(rank.rank, rank.world_size, family, sizes)
        local = [x[:, at] for x in inputs(batch, sum(sizes), *heads)]
        local = [x.squeeze(0) for x in local] if is_varlen else local
        *leaves, dout = local
        documents: list[Any] = []
        if family == "llama3":
            found = names.llama3_flash_attn_prepare_cu_seqlens(
                ends(sizes), options.get("causal", False), rank.rank, rank.world_size
            )
            documents = [*found[:4], stride, found[4]]
        elif is_varlen:
            parts = tuple(size // rank.world_size for size in sizes)
            documents = [ends(parts), max(parts)]
        for x in leaves:
            x.requires_grad_()
        torch.manual_seed(SEED + rank.rank)  # the first rank's generator decides
        out, lse, none = getattr(names, function)(
            *leaves, *documents, **options, return_attn_probs=True, group=rank.process_group
        )
        assert none is None and not lse.requires_grad and out.is_contiguous()
        results.append([out.detach(), lse, *torch.autograd.grad(out, leaves, dout)])
    return results


def check(pool: Any, world_size: int, function: str, cases: dict[str, tuple[Any, ...]]) -> None:
    """Compare every case, joined by token, with the reference."""
    family = function.split("_flash_attn")[0]
    ranks = pool.run(world_size, attend, function, list(cases.values()))
    for index, (name, (batch, sizes, heads, options, _)) in enumerate(cases.items()):
        order = torch.cat([tokens_of(rank, world_size, family, sizes) for rank in range(world_size)])
        expected = reference(inputs(batch, sum(sizes), *heads), sizes, **options)
        for what, i in (("out", 0), ("lse", 1), ("dq", 2), ("dk", 3), ("dv", 4)):
            parts = [rank[index][i].unsqueeze(0) if "varlen" in function else rank[index][i] for rank in ranks]
            dim = 2 if what == "lse" else 1
            joined = torch.empty_like(expected[i]).index_copy_(dim, order, torch.cat(parts, dim))
            error = ((joined - expected[i]).abs().max() / expected[i].abs().max().clamp(min=1.0)).item()
            assert error < 1e-12, f"{name}: {what} is off by {error:.1e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches(pool: Any, family: str, world_size: int) -> None:
    cases = {name: (2, (48,), (4, 2), options, 0) for name, options in OPTIONS.items()}
    cases |= {f"heads_{heads}": (1, (48,), heads, {"causal": True}, 0) for heads in HEADS}
    odd = world_size * (2 if family == "zigzag_ring" else 1) * 5
    cases["odd"] = (1, (odd,), (4, 2), {"causal": True}, 0)
    check(pool, world_size, f"{family}_flash_attn_func", cases)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["ring", "zigzag_ring"])
def test_documents_that_are_split_over_all_ranks(pool: Any, family: str, world_size: int) -> None:
    unit = world_size * (2 if family == "zigzag_ring" else 1)
    cases = {}
    for (name, units), heads in zip(UNITS.items(), HEADS + HEADS, strict=False):
        sizes = tuple(unit * size for size in units)
        cases |= {f"{name}_{is_causal}": (1, sizes, heads, {"causal": is_causal}, 0) for is_causal in (False, True)}
    cases |= {name: (1, (unit, 4 * unit, 2 * unit), (4, 2), options, 0) for name, options in OPTIONS.items()}
    check(pool, world_size, f"{family}_flash_attn_varlen_func", cases)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_documents_one_after_the_other(pool: Any, world_size: int) -> None:
    cases = {}
    for (name, sizes), heads in zip(DOCUMENTS.items(), HEADS * 3, strict=False):
        cases |= {f"{name}_{is_causal}": (1, sizes, heads, {"causal": is_causal}, 1) for is_causal in (False, True)}
    for stride in (1, 2):
        cases |= {
            f"{name}_{stride}": (1, DOCUMENTS["five"], (4, 2), options, stride) for name, options in OPTIONS.items()
        }
    check(pool, world_size, "llama3_flash_attn_varlen_func", cases)


def with_packed_forms(rank: Any) -> None:
    """Compare the packed forms, by position and by keyword, with the function itself; the default group is all four ranks."""
    torch.manual_seed(rank.rank)
    for function in [name for name in dir(names) if name.endswith(("_attn_func", "_varlen_func"))]:
        is_varlen = "varlen" in function
        shape = (12, 3, 4, HEAD_DIM) if is_varlen else (2, 12, 3, 4, HEAD_DIM)
        qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        documents: list[Any] = [ends((4, 8)), 8] if is_varlen else []
        if "llama3" in function:
            found = names.llama3_flash_attn_prepare_cu_seqlens(ends((20, 28)), True, rank.rank, 4)
            documents = [*found[:4], 1, found[4]]
        q, kv = qkv.select(-3, 0), qkv.narrow(-3, 1, 2)
        stem = function.removesuffix("func")
        kvpacked, qkvpacked = getattr(names, f"{stem}kvpacked_func"), getattr(names, f"{stem}qkvpacked_func")
        expected = getattr(names, function)(*qkv.unbind(-3), *documents, 0.0, 0.3, True)
        found = [kvpacked(q, kv, *documents, 0.0, 0.3, True), qkvpacked(qkv, *documents, 0.0, 0.3, True)]
        found += [kvpacked(*[], q=q, kv=kv, **dict(zip(extra_of(kvpacked), documents, strict=True)), **PACKED_OPTIONS)]
        grads = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (expected, *found)]
        assert all(torch.equal(expected, out) for out in found), function
        assert all(torch.equal(grads[0], x) for x in grads), function


def compiled(rank: Any, backend: str) -> float:
    """Return how far out and gradient within `torch.compile` are from those without, dropout included."""
    torch._dynamo.reset()

    def function(qkv: torch.Tensor) -> torch.Tensor:
        options = {"causal": True, "dropout_p": 0.2, "group": rank.process_group}
        return names.stripe_flash_attn_qkvpacked_func(2 * qkv, **options).sin()

    qkv, found = torch.randn(2, 6, 3, 4, HEAD_DIM, requires_grad=True), []
    for each in (function, torch.compile(function, backend=backend)):
        torch.manual_seed(SEED)
        out = each(qkv)
        found.append(torch.stack([out.sum(), *torch.autograd.grad(out.sum(), qkv)[0].flatten()]))
    return (found[0] - found[1]).abs().max().item()


def test_within_compiled_functions(pool: Any) -> None:
    assert pool.run(2, compiled, "aot_eager", timeout=120) == [0.0, 0.0]


PACKED_OPTIONS = {"softmax_scale": 0.3, "causal": True}


def extra_of(function: Any) -> list[str]:
    """Return the parameters between the tensors and those that all functions share."""
    return [
        name for name in inspect.signature(function).parameters if name not in (*SHARED, "q", "k", "v", "kv", "qkv")
    ]


def test_packed_forms(pool: Any) -> None:
    pool.run(4, with_packed_forms)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("ring_flash_attn", []),
        ("zigzag_ring_flash_attn", []),
        ("stripe_flash_attn", []),
        ("ring_flash_attn_varlen", ["cu_seqlens", "max_seqlen"]),
        ("zigzag_ring_flash_attn_varlen", ["cu_seqlens", "max_seqlen"]),
        (
            "llama3_flash_attn_varlen",
            ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride", "local_k_slice"],
        ),
    ],
)
def test_signatures(family: str, extra: list[str]) -> None:
    for form, tensors in (("", ["q", "k", "v"]), ("kvpacked_", ["q", "kv"]), ("qkvpacked_", ["qkv"])):
        function = getattr(names, f"{family}_{form}func")
        parameters = inspect.signature(function).parameters
        assert function.__name__ == f"{family}_{form}func"
        assert list(parameters) == [*tensors, *extra, *SHARED]
        defaults = [parameters[name].default for name in SHARED]
        assert defaults == [0.0, None, False, (-1, -1), None, False, False, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [sizes for name, sizes in DOCUMENTS.items() if name != "empty"])
def test_prepared_documents_are_those_that_the_rank_sees(sizes: tuple[int, ...], causal: bool) -> None:
    ids = torch.repeat_interleave(torch.tensor(sizes))
    for rank in range(4):
        cu_q, cu_k, longest_q, longest_k, keys = names.llama3_flash_attn_prepare_cu_seqlens(
            ends(sizes), causal, rank, 4
        )
        own = torch.arange(48).chunk(4)[rank]
        seen = torch.isin(ids, ids[own]) & ((torch.arange(48) <= own[-1]) | (not causal))
        assert seen.nonzero().flatten().tolist() == list(range(48))[keys]
        counts_q, counts_k = (ids[x].unique(return_counts=True)[1].tolist() for x in (own, seen))
        assert cu_q.tolist() == ends(tuple(counts_q)).tolist() and cu_q.dtype == torch.int32
        assert cu_k.tolist() == ends(tuple(counts_k)).tolist() and cu_k.dtype == torch.int32
        assert (longest_q, longest_k) == (max(counts_q), max(counts_k))


def starts_after_changes(rank: Any) -> list[tuple[int, ...]]:
    """Return the documents found for one tensor, again, and after it was overwritten."""
    ring, first = Ring.of(rank.group, 2), slice(0, None)
    cu_seqlens = torch.tensor([0, 2, 6])
    found = [starts_of_all(cu_seqlens, first, 6, ring) for _ in range(2)]
    cu_seqlens[1] = 4
    return [*found, starts_of_all(cu_seqlens, first, 6, ring)]


def test_documents_of_all_ranks_are_remembered_until_the_tensor_changes(pool: Any) -> None:
    for found in pool.run(2, starts_after_changes):
        assert found == [(0, 2, 8), (0, 2, 8), (0, 4, 10)]
        assert found[0] is found[1]


def refused(rank: Any) -> dict[str, str]:
    """Return the messages of calls that do not fit."""
    x = torch.randn(1, 6, 4, HEAD_DIM)
    row, cu_seqlens, keys = x[0], torch.tensor([0, 2, 6]), slice(0, 6)
    calls: dict[str, Any] = {
        "tokens": lambda: names.ring_flash_attn_func(x, x[:, :5], x),
        "heads": lambda: names.stripe_flash_attn_func(x[:, :, :3], x[:, :, :2], x[:, :, :2]),
        "dtype": lambda: names.stripe_flash_attn_func(x, x.double(), x),
        "dropout": lambda: names.ring_flash_attn_func(x, x, x, dropout_p=1.0),
        "slopes": lambda: names.ring_flash_attn_func(x, x, x, alibi_slopes=torch.ones(1, 4)),
        "learned": lambda: names.ring_flash_attn_func(x, x, x, alibi_slopes=torch.ones(4, requires_grad=True)),
        "odd": lambda: names.zigzag_ring_flash_attn_func(x[:, :5], x[:, :5], x[:, :5], causal=True),
        "short": lambda: names.ring_flash_attn_varlen_func(row, row, row, torch.tensor([0, 2, 5]), 3),
        "odd part": lambda: names.zigzag_ring_flash_attn_varlen_func(row, row, row, torch.tensor([0, 3, 6]), 3),
        "stride": lambda: names.llama3_flash_attn_varlen_func(row, row, row, cu_seqlens, cu_seqlens, 4, 4, 0, keys),
        "whole": lambda: names.llama3_flash_attn_varlen_func(
            row, row, row, 2 * cu_seqlens, 2 * cu_seqlens, 8, 8, 1, keys
        ),
        "group": lambda: names.ring_flash_attn_func(x, x, x, group=rank.pairs[2, 3]),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises((InputError, ConfigError)) as caught:
            call()
        found[name] = str(caught.value)
    return found


def test_refusals_say_what_to_do(pool: Any) -> None:
    expected = {
        "tokens": "[1, 5, 4, 8]",
        "heads": "a multiple of those of k and v",
        "dtype": "cast them to one dtype",
        "dropout": "below 1",
        "slopes": "one slope a head, [4]",
        "learned": "detach it",
        "odd": "multiple of 8 tokens",
        "short": "ends with 6",
        "odd part": "multiple of 8 tokens",
        "stride": "1 or more",
        "whole": "llama3_flash_attn_prepare_cu_seqlens",
        "group": "pass the group that this rank is in",
    }
    (found,) = pool.run(1, refused)
    assert {name: text for name, text in expected.items() if text not in found[name]} == {}


def test_refusals_without_ranks() -> None:
    with pytest.raises(InputError, match="pad the last document to 12 tokens"):
        names.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 10]), True, 0, 4)
    x = torch.randn(1, 4, 2, HEAD_DIM)
    with pytest.raises(ConfigError, match="init_process_group"):
        names.ring_flash_attn_func(x, x, x)


SIZES = (3, 20, 9, 16)


def llama(implementation: str, **changes: Any) -> torch.nn.Module:
    """Return a small model, the same in every process."""
    import transformers

    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
        attn_implementation=implementation,
        **changes,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).double()


def hidden_by_model(rank: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return this rank's logits and its addends of the gradients."""
    names.substitute_hf_flash_attn(rank.process_group, 1)
    names.update_ring_flash_attn_params(ends(SIZES), rank.process_group)
    own = torch.arange(48).chunk(rank.world_size)[rank.rank]
    model = llama("ring_attn")
    places = torch.cat([torch.arange(size) for size in SIZES])
    logits = model(input_ids=torch.arange(48)[None, own], position_ids=places[None, own], use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_models_of_transformers(pool: Any, world_size: int) -> None:
    ranks = pool.run(world_size, hidden_by_model, timeout=120)
    alone, logits = llama("eager"), []
    for tokens in torch.arange(48).split(list(SIZES)):
        logits.append(alone(input_ids=tokens[None], use_cache=False).logits)
        logits[-1].square().sum().backward()
    expected = torch.cat(logits, 1)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], 1), expected, rtol=1e-6, atol=1e-6)
    for grads, parameter in zip(zip(*(rank[1] for rank in ranks), strict=True), alone.parameters(), strict=True):
        torch.testing.assert_close(sum(grads), parameter.grad, rtol=1e-5, atol=1e-5)


def refused_by_model(rank: Any) -> list[str]:
    """Return the messages for inputs that do not fit."""
    group = rank.pairs[0, 1]
    names.substitute_hf_flash_attn(group, 1)
    model, tokens = llama("ring_attn"), torch.arange(24)[None]
    padding = torch.ones_like(tokens).index_fill(1, torch.tensor([0]), 0)
    calls: list[dict[str, Any]] = [
        {"input_ids": tokens},
        {"input_ids": tokens.expand(2, -1)},
        {"input_ids": tokens, "attention_mask": padding},
    ]
    found = []
    for inputs in calls:
        with pytest.raises((InputError, ConfigError)) as caught:
            model(**inputs, use_cache=False)
        found.append(str(caught.value))
        names.update_ring_flash_attn_params(ends(SIZES), group)
    from transformers import AttentionInterface

    attention = AttentionInterface()["flash_attention_2"]
    x = torch.randn(1, 2, 24, 8)
    for extra in ({"softcap": 2.0}, {"s_aux": torch.ones(2)}):
        with pytest.raises(InputError) as caught:
            attention(model, x, x, x, None, is_causal=True, **extra)
        found.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        attention(model, x[:, :, :1], x, x, None, is_causal=True)
    return [*found, str(caught.value)]


def test_models_are_refused_with_what_to_do(pool: Any) -> None:
    expected = [
        "update_ring_flash_attn_params",
        "2 rows",
        "and padding",
        "cpcompile.apply",
        "cpcompile.apply",
        "use_cache=False",
    ]
    for found in pool.run(2, refused_by_model, timeout=120):
        assert [text for text, message in zip(expected, found, strict=True) if text not in message] == []


@pytest.mark.slow
def test_example() -> None:
    script = Path(__file__).parents[2] / "examples" / "ring_flash_attn_names.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, documents of [12, 4, 24, 8] tokens: out differs by" in done.stdout


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_kernels_are_told_to_be_deterministic(is_deterministic: bool) -> None:
    q = torch.randn(1, 2, 4, HEAD_DIM)
    place = Place(contiguous(4, 1), Ring("", 1, 0))
    options = Options(0.0, None, True, (-1, -1), None, is_deterministic, False, None)
    terms = terms_of(q, q, options, place)
    (piece,) = terms.pieces(place.spans[0], place.spans[0])
    assert terms.block(piece, q.device).is_deterministic == is_deterministic
