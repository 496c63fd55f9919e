"""Flight recorder: the collectives that NCCL and gloo were given, whoever gave them, as torch keeps them."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import torch


class Collective(NamedTuple):
    """A collective that has not ended.

    Attributes:
        number: how many of its group there were before it, and 1. All ranks of the group count alike.
        operator: what torch calls it: `nccl:all_gather`.
        group, purpose: the name of the process group, and its description.
        seconds: how long ago the host gave it to the backend.
        has_begun: on a GPU, its kernel runs.
    """

    number: int
    operator: str
    group: str
    purpose: str
    seconds: float
    has_begun: bool


def unfinished_collectives() -> list[Collective]:
    """Return the collectives that have not ended, oldest first; none where torch keeps none (`TORCH_FR_BUFFER_SIZE=0`).

    The fields that are read are those of torch 2.13 with gloo; messages between two ranks are left out.
    """
    module = getattr(torch._C, "_distributed_c10d", None)
    dumps = [getattr(module, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")]
    told: list[dict[str, Any]] = [json.loads(dump(True, True)) for dump in dumps if dump is not None]
    entries = [each for one in told for each in one.get("entries") or ()]
    now = time.time_ns()  # the clock that torch asked
    return [
        Collective(
            each["collective_seq_id"],
            each["profiling_name"],
            each["process_group"][0],
            each["process_group"][1],
            max(0, now - each["time_created_ns"]) / 1e9,
            each["state"] == "started",
        )
        for each in sorted(entries, key=lambda each: each["time_created_ns"])
        if not each["retired"] and each["state"] != "completed" and not each["is_p2p"]
    ]
