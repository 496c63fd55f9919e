"""Traces: artifacts of `TORCH_TRACE`, which tlparse shows beside those of torch, and whether a profiler writes one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._logging._internal import trace_structured


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the trace of the compilation that runs, if there is one; it is made only then."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text, expect_trace_id=False
    )


def is_profiled() -> bool:
    """Tell whether a profiler records this thread; a quarter of a microsecond."""
    return torch._C._autograd._profiler_enabled()
