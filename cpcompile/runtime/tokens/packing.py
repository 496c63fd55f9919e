"""Packing: what tells packed documents apart is checked where it is used, so that a batch that says nonsense ends the step.

On a GPU the device checks, and the host does not wait; where the host waits for the documents anyway, it checks too.
"""

from __future__ import annotations

import torch

from cpcompile._torch import assert_on_device
from cpcompile.errors import InputError

Tensor = torch.Tensor

RULES = {
    "cu_seqlens": "cumulative lengths begin with 0, do not fall, and end with the number of tokens: padding counts too",
    "positions": "the positions of a row begin with 0, and each is the one before plus 1, or 0 where the next document begins",
    "ids": "the tokens of a document follow each other, so that no id comes back: give each document, and padding, another id",
}
SHOWN = 16


@torch.library.custom_op("cpcompile::checked_packing", mutates_args=())
def checked_packing(told: Tensor, kind: str, name: str, num_tokens: int, on_host: bool = False) -> Tensor:
    """Return a copy of what tells documents apart, once it is known to do so.

    Args:
        told: `[N + 1]` for `cu_seqlens`, `[B | 1, S]` for `positions` and `ids`.
        kind: a name of `RULES`.
        name: what the user calls it.
        num_tokens: those of all rows, for `cu_seqlens`.
        on_host: the host waits and checks, also for a GPU.

    Raises:
        InputError: it does not; on a GPU without `on_host` the device stops with the same text, without the values.
    """
    is_right = {"cu_seqlens": is_cumulative, "positions": are_positions, "ids": are_runs}[kind](told, num_tokens)
    text = f"{name} does not tell documents apart: {RULES[kind]}"
    if told.device.type != "cpu" and not on_host:
        assert_on_device(is_right, text)
    elif not bool(is_right):
        raise InputError(f"{text}. Given are {shown(told, kind)} for {num_tokens} tokens.")
    return told.clone()


@checked_packing.register_fake
def _(told: Tensor, kind: str, name: str, num_tokens: int, on_host: bool = False) -> Tensor:
    return torch.empty_like(told)


def is_cumulative(told: Tensor, num_tokens: int) -> Tensor:
    """Tell whether lengths go from 0 to all tokens; a sequence may be empty."""
    if told.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=told.device)
    return (told[0] == 0) & (told[-1] == num_tokens) & (told.diff() >= 0).all()


def are_positions(told: Tensor, num_tokens: int) -> Tensor:
    """Tell whether every row counts from 0, from where it begins and wherever it does not go on."""
    return (told[:, :1] == 0).all() & ((told.diff() == 1) | (told[:, 1:] == 0)).all()


def are_runs(told: Tensor, num_tokens: int) -> Tensor:
    """Tell whether the ids of every row are as many as its runs of equal ids."""
    return ((told.diff() != 0).sum(1) == (told.sort(1).values.diff() != 0).sum(1)).all()


def shown(told: Tensor, kind: str) -> str:
    """Return the values, or the first of the first row that is wrong."""
    if kind == "cu_seqlens":
        values = told.tolist()
    else:
        is_right = {"positions": are_positions, "ids": are_runs}[kind]
        values = next(row.tolist() for row in told if not bool(is_right(row[None], 0)))
    return f"[{', '.join(map(str, values[:SHOWN]))}{', ...' if len(values) > SHOWN else ''}]"
