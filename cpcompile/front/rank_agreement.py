"""Rank agreement: what every rank of the axis must have alike, compared in one small all-reduce before ranks wait for each other.

Each rank passes the whole batch to the same model with the same weights, modes and options, and all run the same graph. Where
they do not, they would train on a sequence that nobody has, or wait for each other without an end. What is compared every time
is a fingerprint; only when it differs do the ranks say what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from cpcompile.errors import RankFailed, RanksDiffer
from cpcompile.front.fingerprint import joined, text_fingerprint, value_fingerprint
from cpcompile.front.graph_text import means_same
from cpcompile.front.weights import describe_weight
from cpcompile.options.mesh import Axis
from cpcompile.runtime.record import recorded

# What a rank holds, by (kind, name); and the same with the fingerprints of values, where there are any.
Details = Mapping[tuple[str, str], str]
Held = Mapping[tuple[str, str], tuple[str, int]]


class Kind(NamedTuple):
    """How a difference is told: what differs, what a rank has that lacks it, and the remedy."""

    title: str
    lacking: str
    remedy: str


_MODEL = "Every rank of the context-parallel axis must call the same model in the same state"
NO_CALL, FAILURE = (
    "no call",
    "failure",
)  # a rank ended a call with an error, before it could say what it was given, or after
# In the order in which they are told: what differs first may be why the others do.
KINDS: Mapping[str, Kind] = {
    NO_CALL: Kind("", "", ""),
    "version": Kind("the version of {!r}", "not installed", "Install the same versions for every rank."),
    "option": Kind("the option {!r}", "not given", "Every rank must pass the same options to cpcompile."),
    "setting": Kind("{}", "not set", f"{_MODEL} and under the same settings."),
    "training": Kind("the training mode of {!r}", "no such module", f"{_MODEL}: call train() or eval() on every rank."),
    "weight": Kind("the parameter or buffer {!r}", "not there", f"{_MODEL}: make it alike on every rank."),
    "input": Kind(
        "the input {!r}",
        "not given",
        "Every rank of the context-parallel axis must be given the same whole batch: shard data over the other axes only.",
    ),
    "generator": Kind(
        "the state of the {} generator",
        "not drawn from",
        "The random generators of the ranks are in different states, but this model draws numbers that all ranks must "
        "draw alike (dropout with exact_dropout=True, or another random operator on values that every rank holds whole). "
        "Call torch.manual_seed with the same seed on every rank of the context-parallel axis, and draw nothing on some "
        "ranks only (shuffle data by a torch.Generator of its own), or leave exact_dropout off.",
    ),
    FAILURE: Kind("", "", ""),
    "operator": Kind(
        "operator {} of the transformed graph",
        "not there",
        "Every rank must run the same program: nothing that the model computes may depend on the rank, on the time or on the "
        "environment.",
    ),
}


def agree(
    header: int,
    tensors: Mapping[tuple[str, str], torch.Tensor],
    axis: Axis,
    details: Callable[[], Details],
    *flags: int,
) -> tuple[list[int], Details | None]:
    """Compare a fingerprint, and the values of tensors, with those of the other ranks. Collective.

    Args:
        header: a fingerprint of all that `details` says.
        tensors: by kind and name; `details` has their dtypes and shapes.
        axis: the ranks.
        details: what this rank holds; called when fingerprints differ.
        flags: numbers of which the least of all ranks is wanted.

    Returns:
        The least of each flag; and what rank 0 holds, where its fingerprint was another one though it means the same.

    Raises:
        RanksDiffer: the ranks do not hold the same; raised on every rank.
    """
    device = device_of(axis)
    host = torch.tensor([header, *flags]).to(device, non_blocking=True)
    total = joined([host[0], *(value_fingerprint(x).to(device) for x in tensors.values())])
    least = torch.cat([torch.stack([total, ~total]), host[1:]])  # the least of ~x is the complement of the most of x
    with recorded("compare_ranks", axis.group):  # the host waits for the result
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=axis.process_group)
        low, complement, *lowest = least.tolist()
    if low == ~complement:
        return lowest, None
    values = {entry: int(value_fingerprint(x)) for entry, x in tensors.items()}
    held: list[Held] = [{} for _ in range(axis.world_size)]
    own = {entry: (text, values.get(entry, 0)) for entry, text in details().items()}
    dist.all_gather_object(held, own, group=axis.process_group)
    error = difference(held)
    if error is not None:
        raise error
    return lowest, {entry: text for entry, (text, _) in held[0].items()}


def device_of(axis: Axis) -> torch.device:
    """Return a device whose tensors the group of the axis sends."""
    is_on_gpu = axis.device_type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if is_on_gpu else torch.device("cpu")


def difference(held: Sequence[Held]) -> RanksDiffer | None:
    """Return the error that says what differs between what the ranks hold, and on which ranks; None if nothing does."""
    first = held[0]
    entries = dict.fromkeys(entry for of_rank in held for entry in of_rank)
    others = {
        entry: [rank for rank, of_rank in enumerate(held) if not is_same(entry, first.get(entry), of_rank.get(entry))]
        for entry in entries
    }
    differing = sorted((entry for entry in entries if others[entry]), key=lambda entry: [*KINDS].index(entry[0]))
    for kind, name in differing:
        texts = [of_rank[kind, name][0] if (kind, name) in of_rank else None for of_rank in held]
        if kind in (NO_CALL, FAILURE):
            return failure([rank for rank, text in enumerate(texts) if text is not None], texts)
        what = by_rank([KINDS[kind].lacking if text is None else text for text in texts])
        num_more = sum(entry[0] == kind for entry in differing) - 1
        more = f"; {num_more} more" if num_more else ""
        title = KINDS[kind].title.format(name)
        return RanksDiffer(
            f"{title} differs between rank 0 and {named(others[kind, name])} ({what}{more}). {KINDS[kind].remedy}"
        )
    return None


def is_same(entry: tuple[str, str], one: tuple[str, int] | None, other: tuple[str, int] | None) -> bool:
    """Tell whether what two ranks have of an entry may be the same."""
    if one == other or one is None or other is None:
        return one == other
    return entry[0] == "operator" and means_same(one[0], other[0])


def failure(ranks: Sequence[int], texts: Sequence[str | None]) -> RankFailed:
    """Return the error that tells the other ranks why they cannot go on."""
    return RankFailed(
        f"{named(ranks)} ended this call with an error, so that the others cannot go on:\n\n{texts[ranks[0]]}"
    )


def by_rank(texts: Sequence[str]) -> str:
    """Return what each rank has, ranks with the same together."""
    if len(set(texts)) == 1:
        return f"{texts[0]}, in its values"
    ranks = {text: [rank for rank, other in enumerate(texts) if other == text] for text in texts}
    return "; ".join(f"{named(of_text) if of_text != [0] else 'rank 0'}: {text}" for text, of_text in ranks.items())


def named(ranks: Sequence[int]) -> str:
    """Return ranks for people."""
    return f"rank(s) {', '.join(map(str, ranks))}"


def check_same_inputs(inputs: Mapping[str, torch.Tensor], axis: Axis) -> None:
    """Compare inputs of all ranks of the axis. Collective.

    Raises:
        RanksDiffer: they differ; the message names the first input that does, and the ranks. Raised on every
            rank.
    """
    if axis.world_size == 1:
        return
    tensors = {("input", name): inputs[name] for name in sorted(inputs)}  # the order of keyword arguments means nothing
    details = {entry: describe_weight(x) for entry, x in tensors.items()}
    agree(text_fingerprint(repr(details).encode()), tensors, axis, lambda: details)
