"""Show: what users write into a model to see a value of it while it runs."""

from __future__ import annotations

import torch

from cpcompile import runtime  # noqa: F401  (registers the operator)


def show(x: torch.Tensor, name: str, *, gradient: bool = False, pause: bool = False) -> torch.Tensor:
    """Return `x`, and print what it is each time this line runs, on one device and, once the model is parallel, on every rank.

        x = cpcompile.show(self.norm(x), "after the norm")

        after the norm, rank 1, tokens 4:8 24:28 of 32 along dim 1: float32 [1, 8, 64], from -3.1 to 2.9, mean 0.01, first ...

    A rank prints the tokens that it holds, without padding, or the whole value where it holds that. What is returned must be
    used: an operator whose result nobody reads is not run. It is a copy, which takes memory, and the host waits for the device.
    Inside of what cpcompile recognises as one operator, between the products of an attention, it keeps that from being found.
    Inside of an activation checkpoint it prints again when backward computes that again, as on one device.

    Args:
        x: any value of the model.
        name: how it is called in what is printed.
        gradient: print the gradient of `x` in backward too. Of a value that every rank holds whole, it is this rank's addend.
        pause: also stop here, and at the gradient, in Python's debugger: on the first rank that shares the sequence, while the
            others wait, however long. It has `value`, `tokens` (their positions) and `rank`; `c` goes on, `q` ends all ranks with
            a `DebuggerQuit`. A process without a terminal says so once, and goes on.
    """
    shown: torch.Tensor = torch.ops.cpcompile.show(x, name, gradient, pause)
    return shown
