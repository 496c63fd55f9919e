"""Record: the last operators of this process that send messages, whatever carries these, for a job that is stuck.

An entry is made when an operator runs, so that it is there while the host waits inside. Entries are numbered by group: ranks
of a group run the same operators, so that who is behind has the smaller number. With one rank nothing is sent, nor recorded.

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
        is_on_gpu: the host launches it, and does not know when it ends.
        backward: the number of the backward that it runs in, -1 for none.
        start: by the monotonic clock.
        state: `running` while the host is in it, then `returned`, or `failed` where it has raised.
    """

    number: int
    operator: str
    layer: str
    group: str
    num_bytes: int
    is_on_gpu: bool
    backward: int
    start: float
    state: str


# The fields of an entry in a list: a class, or a context around each call, would take three times as long.
Row = list[Any]
_STATE = Entry._fields.index("state")
_ROWS: deque[Row] = deque(maxlen=SIZE)
_NUMBERS: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))
_COUNTS: defaultdict[tuple[str, str, bool], int] = defaultdict(int)
RECORDED: set[str] = set()  # the operators whose calls are recorded


def begin(operator: str, group: str, x: torch.Tensor | None = None, layer: str = "") -> Row:
    """Make an entry for what sends messages in a group; `x` is its first operand."""
    backward = backward_number()
    num_bytes, is_on_gpu = (0, False) if x is None else (x.nbytes, x.is_cuda)
    row = [next(_NUMBERS[group]), operator, layer, group, num_bytes, is_on_gpu, backward, monotonic(), RUNNING]
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
    """Call an operator that sends messages. Making the entry takes about a microsecond."""
    row = begin(operator, group, x, layer)
    try:
        results = run(*args, **axis)
    except BaseException:
        row[_STATE] = FAILED
        raise
    row[_STATE] = RETURNED
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
