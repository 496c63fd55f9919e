"""Document bounds: where documents begin, found once a step and brought to the host, which schedules a packed batch by them."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


@torch.library.custom_op("cpcompile::document_bounds", mutates_args=())
def document_bounds(documents: Tensor) -> Tensor:
    """Return where documents begin, int32 `[B, S + 1]` on the CPU: their number n, then n positions, then zeros.

    n is -1 where an id comes back after another one: such documents are no runs of tokens. The host waits for the device here.

    Args:
        documents: ids `[B, S]`.
    """
    batch, length = documents.shape
    # Zeros without `torch.zeros`, which starts all threads of the host.
    bounds = torch.frombuffer(bytearray(batch * (length + 1) * 4), dtype=torch.int32).view(batch, length + 1)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ordered = documents.sort(dim=1).values
    num_ids = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    is_run = is_first.sum(1) == num_ids
    row, start = is_first.nonzero().to("cpu", torch.int32).unbind(1)
    for index, is_known in enumerate(is_run.tolist()):
        found = start[row == index]
        bounds[index, 0] = len(found) if is_known else -1
        bounds[index, 1 : 1 + len(found)] = found
    return bounds


@document_bounds.register_fake
def _(documents: Tensor) -> Tensor:
    return torch.empty(documents.shape[0], documents.shape[1] + 1, dtype=torch.int32, device="cpu")
