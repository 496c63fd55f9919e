"""Record: the last operators of this process that send messages, whatever carries these, for a job that is stuck.

An entry is made when an operator runs, so that it is there while the host waits inside. Entries are numbered by group: ranks
of a group run the same operators, so that who is behind has the smaller number. With one rank nothing is sent, nor recorded.
On a GPU an event behind each operator tells whether the GPU has ended it, also to a thread that looks while the host waits.

    call("ring_attention", group, q, layer, run, args, axis)        # an operator
    with recorded("compare_ranks", group): ...                      # what is no operator
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

import torch

from cpcompile._torch import CustomOpDef, backward_number

SIZE = 256
RUNNING, RETURNED, FAILED = "running", "returned", "failed"


class Entry(NamedTuple):
    """An operator that sends messages.

    Attributes:
        number: how many of its group there were before, and 1.
        operator, layer: its name, and the module that it belongs to where that is known.
        group: the name of the process group.
        num_bytes: of its first operand.
        gpu: the number of the GPU, which goes on behind the host; -1 on a CPU.
        backward: the number of the backward that it runs in, -1 for none.
        start: by the monotonic clock.
        state: `running` while the host is in it, then `returned`, or `failed` where it has raised.
        event: behind it on the GPU, once the host has returned; None on a CPU, and while a CUDA graph is captured.
    """

    number: int
    operator: str
    layer: str
    group: str
    num_bytes: int
    gpu: int
    backward: int
    start: float
    state: str
    event: torch.cuda.Event | None


# The fields of an entry in a list: a class, or a context around each call, would take three times as long.
Row = list[Any]
_GPU, _STATE, _EVENT = (Entry._fields.index(name) for name in ("gpu", "state", "event"))
_ROWS: deque[Row] = deque(maxlen=SIZE)
# Used in turn: twice as many as rows, since what begins first may return last.
_EVENTS: defaultdict[int, list[torch.cuda.Event]] = defaultdict(lambda: [torch.cuda.Event() for _ in range(2 * SIZE)])  # type: ignore[no-untyped-call]
_TURNS = itertools.count()
_NUMBERS: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))
_COUNTS: defaultdict[tuple[str, str, bool], int] = defaultdict(int)
RECORDED: set[str] = set()  # the operators whose calls are recorded


def begin(operator: str, group: str, x: torch.Tensor | None = None, layer: str = "") -> Row:
    """Make an entry for what sends messages in a group; `x` is its first operand."""
    backward = backward_number()
    num_bytes, gpu = (0, -1) if x is None else (x.nbytes, x.get_device())
    row = [next(_NUMBERS[group]), operator, layer, group, num_bytes, gpu, backward, monotonic(), RUNNING, None]
    _ROWS.append(row)
    _COUNTS[operator, layer, backward != -1] += 1
    return row


@contextlib.contextmanager
def ending(row: Row) -> Iterator[None]:
    """Surround the rest of what an entry is of."""
    try:
        yield
    except BaseException:
        row[_STATE] = FAILED
        raise
    _return(row)


def _return(row: Row) -> None:
    """Note that the host has returned, and leave an event behind what it has launched."""
    gpu = row[_GPU]
    if gpu != -1 and not torch.cuda.is_current_stream_capturing():
        event = _EVENTS[gpu][next(_TURNS) % (2 * SIZE)]
        event.record(torch.cuda.current_stream(gpu))
        row[_EVENT] = event
    row[_STATE] = RETURNED


def recorded(operator: str, group: str, x: torch.Tensor | None = None) -> contextlib.AbstractContextManager[None]:
    """Surround what sends messages and is no operator."""
    return ending(begin(operator, group, x))


def call(
    operator: str,
    group: str,
    x: torch.Tensor | None,
    layer: str,
    run: Callable[..., Any],
    args: Sequence[Any],
    axis: Mapping[str, Any],
) -> Any:
    """Call an operator that sends messages. Making the entry takes about a microsecond, its event some more."""
    row = begin(operator, group, x, layer)
    try:
        results = run(*args, **axis)
    except BaseException:
        row[_STATE] = FAILED
        raise
    _return(row)
    return results


def entries() -> list[Entry]:
    """Return the last entries, oldest first."""
    while True:
        try:
            return [Entry(*row) for row in _ROWS]
        except RuntimeError:  # another thread has added one meanwhile
            continue


def counts() -> dict[tuple[str, str, bool], int]:
    """Return how often each operator has run since the process began, by (operator, layer, whether in a backward)."""
    return dict(_COUNTS)


def collective(name: str, **options: Any) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register an operator that sends messages, as `torch.library.custom_op` does; each of its calls is recorded.

    Its arguments have `world_size`, and behind that `group`; it mutates none.
    """

    def register(run: Callable[..., Any]) -> CustomOpDef:
        signature = inspect.signature(run, eval_str=True)
        operator, place = name.removeprefix("cpcompile::"), list(signature.parameters).index("world_size")
        RECORDED.add(operator)

        @functools.wraps(run)
        def run_recorded(*args: Any) -> Any:
            if args[place] == 1:
                return run(*args)
            x = args[0] if isinstance(args[0], torch.Tensor) else None
            return call(operator, args[place + 1], x, "", run, args, {})

        # torch reads types where the function is written.
        run_recorded.__signature__ = signature  # type: ignore[attr-defined]
        return torch.library.custom_op(name, run_recorded, mutates_args=(), **options)

    return register
