"""What a GPU holds at the peak of a step, from the history of torch's allocator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

MAX_ENTRIES = 1_000_000
OWN = ("cpcompile", "torchinductor", "modeling_", "fsdp_step", "train_step")


def peak_of(step: Callable[[], Any], rows: int = 25) -> str:
    """Return a table of what is held at the peak of a step, by the line that allocated it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    step()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    live: dict[int, tuple[int, str]] = {}
    held, most, at_peak, last = 0, 0, Counter[tuple[str, int]](), ""
    for event in trace:
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"], place(event["frames"])
            held += event["size"]
            if held > most:
                most, at_peak, last = held, by_place(live), live[event["addr"]][1]
        elif event["action"] == "free_completed" and event["addr"] in live:
            held -= live.pop(event["addr"])[0]
    lines = [
        f"{before / 2**30:8.2f} GiB  before the step",
        f"{most / 2**30:8.2f} GiB  of the step, at its peak in {last}:",
    ]
    largest = sorted(at_peak.items(), key=lambda each: -each[0][1] * each[1])[:rows]
    return "\n".join(
        lines + [f"{n * b / 2**30:8.2f} GiB  {n} x {b / 2**20:.1f} MiB  {text}" for (text, b), n in largest]
    )


def by_place(live: dict[int, tuple[int, str]]) -> Counter[tuple[str, int]]:
    """Return how many pieces of memory each place holds, by their bytes."""
    return Counter((text, size) for size, text in live.values())


def place(frames: list[dict[str, Any]]) -> str:
    """Return the innermost two lines that are not torch's own."""
    own = [f"{f['filename'].rpartition('/')[2]}:{f['line']} {f['name']}" for f in frames if is_own(f["filename"])]
    return " < ".join(own[:2]) or "torch"


def is_own(file: str) -> bool:
    """Tell whether a file is the compiler's, a model's, a generated program's or a benchmark's."""
    return any(part in file for part in OWN)
