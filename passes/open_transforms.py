"""Open transforms: a Fourier transform of several dims becomes one of each.

before  y = aten.fft_rfft2(x, s=[n, m], dim=[-2, -1])
        z = aten.fft_irfftn(y, s=[n, m], dim=[-2, -1])
after   y = aten.fft_fft(aten.fft_rfft(x, m, -1), n, -2)
        z = aten.fft_irfft(aten.fft_ifft(y, n, -2), m, -1)

The dim of the tokens is then transformed by itself.
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten

# What the last dim takes, what the others take, and whether the last one is transformed first.
OPENED = {
    **dict.fromkeys((aten.fft_fft2.default, aten.fft_fftn.default), (aten.fft_fft.default, aten.fft_fft.default, True)),
    **dict.fromkeys(
        (aten.fft_ifft2.default, aten.fft_ifftn.default), (aten.fft_ifft.default, aten.fft_ifft.default, True)
    ),
    **dict.fromkeys(
        (aten.fft_rfft2.default, aten.fft_rfftn.default), (aten.fft_rfft.default, aten.fft_fft.default, True)
    ),
    **dict.fromkeys(
        (aten.fft_irfft2.default, aten.fft_irfftn.default), (aten.fft_irfft.default, aten.fft_ifft.default, False)
    ),
}


def open_transforms(gm: fx.GraphModule) -> int:
    """Return how many transforms were opened.

    Needs: nothing.
    Gives: transforms of one dim.
    """
    count = 0
    for target, (of_last, of_others, is_first) in OPENED.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            call = Call.of(node)
            dims, sizes = dims_of(call), call["s"] or [None] * len(dims_of(call))
            steps = [
                *((of_others, d, n) for d, n in zip(dims[:-1], sizes, strict=False)),
                (of_last, dims[-1], sizes[-1]),
            ]
            x = call["self"]
            for one, dim, size in reversed(steps) if is_first else steps:
                x = insert_call(node, one, x, None if size == -1 else size, dim, call["norm"])
            replace_uses(node, x)
            gm.graph.erase_node(node)
            count += 1
    return count


def dims_of(call: Call) -> list[int]:
    """Return the dims that are transformed: where none are given, the last ones, as many as there are sizes, or all."""
    if call["dim"] is not None:
        return list(call["dim"])
    rank = len(call.shape("self"))
    return list(range(rank - len(call["s"]) if call["s"] else 0, rank))
