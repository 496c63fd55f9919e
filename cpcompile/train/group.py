"""Group: how a process becomes one of the ranks."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cpcompile.train import loop
from cpcompile.train.options import TrainOptions

# The reference step of rank 0 keeps the others waiting.
TIMEOUT = datetime.timedelta(hours=1)


@contextlib.contextmanager
def process_group(
    options: TrainOptions, rank: int, world_size: int, local_rank: int, init_method: str
) -> Iterator[torch.device]:
    """Join the ranks, set this one's device and threads, and leave at the end."""
    device, backend = torch.device("cpu"), "gloo"
    if options.device == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, loop.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield device
    finally:
        # After an error the others may be gone, and a group that waits for them does not end.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
