"""Step time: the seconds of a training step on the slowest rank, by kind, estimated without running it.

Kernels follow one another on a GPU, and their times add up. Messages of tokens are waited for. Those of parameters and their
gradients run beside the computation of their pass, forward or backward, as far as that lasts; nothing hides the first gather of
forward and the last sum of backward, and without `prefetch` nothing hides any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpcompile.choose.cost import bandwidth_on, link_on
from cpcompile.choose.machine import Machine
from cpcompile.choose.rates import BYTES, LATENCY, SLOWDOWN
from cpcompile.inspect.kernel_time import AGAIN, MEMORY, PRODUCTS, KernelTime, Spent, Transfer
from cpcompile.inspect.text import duration, table
from cpcompile.memory.ledger import Divided

ATTENTION, MESSAGES, OPTIMIZER = "attention", "messages", "optimizer"
KINDS = {
    ATTENTION: "kernels, and messages of keys, values and heads that these do not hide",
    PRODUCTS: "products and convolutions, forward and backward",
    MEMORY: "norms, elementwise operators, losses, rotary, embeddings, copies",
    AGAIN: "products and elementwise results that backward computes once more",
    MESSAGES: "other messages that computation does not hide",
    OPTIMIZER: "parameters, gradients and states, read and written once",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a training step is estimated to take on the slowest rank.

    Attributes:
        seconds: by kind, of `KINDS`.
        hidden: seconds of messages of parameters and gradients beside computation.
        tokens: of all sequences of the ranks that share them.
        ranks: that share these.
        mfu: the share of the GPUs' peak that the step reaches, where computing again counts as nothing; 0 where the peak is not
            known.
    """

    seconds: Mapping[str, float]
    hidden: float
    tokens: int
    ranks: int
    mfu: float

    @property
    def total(self) -> float:
        """The seconds of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        return self.tokens / self.ranks / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return asdict(self) | {"total": self.total, "tokens_per_second": self.tokens_per_second}

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Kind, time, share and what is in it, for a table."""
        return [
            (kind, duration(self.seconds[kind]), f"{self.seconds[kind] / self.total:.0%}", text)
            for kind, text in KINDS.items()
            if self.seconds.get(kind)
        ]

    def __str__(self) -> str:
        share = f", {self.mfu:.0%} of the peak (MFU)" if self.mfu else ""
        return "\n".join(
            [
                f"a training step is estimated to take {duration(self.total)}: {self.tokens_per_second:.4g} tokens/s of each "
                f"GPU{share}",
                *table(("kind", "time", "share", "of"), self.rows),
                f"messages of parameters and gradients that computation hides: {duration(self.hidden)}",
            ]
        )


def step_time(
    halves: Divided,
    *,
    machine: Machine | None,
    ranks: int,
    attention: float,
    exchanged: Sequence[tuple[int, int]],
    trained: int,
    states: int,
    prefetch: int,
    tokens: int,
    model_flops: float,
) -> StepTime | None:
    """Return what a step takes; None where nothing takes a gradient.

    Args:
        halves: the graphs of a rank.
        machine: that it runs on; None for CPUs.
        ranks: that share the sequence.
        attention: seconds of all attentions, as they are estimated.
        exchanged: of each collective of tokens, the calls and the bytes that a rank sends.
        trained: bytes of the parameters of a rank that are trained.
        states: tensors of the size of a parameter that the optimizer keeps.
        prefetch: how many blocks are gathered ahead.
        tokens: of the sequences that these ranks share.
        model_flops: of forward and backward on all ranks, without what is computed again.
    """
    if halves.backward is None:
        return None
    walk = KernelTime(machine, ranks)
    forward, backward = walk.of(halves.forward.graph), walk.of(halves.backward.graph, is_backward=True)
    # An attention's backward has two and a half times the work of its forward.
    shares = ((forward, attention * 2 / 7, 0), (backward, attention * 5 / 7, -1))
    exposed = hidden = 0.0
    for spent, of_attention, unhidden in shares:
        waited, beside = parameters_sent(spent, machine, spent.seconds.total() + of_attention, unhidden, prefetch)
        exposed, hidden = exposed + waited, hidden + beside
    seconds = {
        ATTENTION: attention,
        **{kind: forward.seconds[kind] + backward.seconds[kind] for kind in (PRODUCTS, MEMORY, AGAIN)},
        MESSAGES: exposed + tokens_sent(exchanged, machine, ranks),
        OPTIMIZER: (3 + 2 * states)
        * trained
        / bandwidth_on(machine),  # parameters, gradients and states; two are written
    }
    total = sum(seconds.values())
    mfu = model_flops / total / ranks / machine.peak if machine is not None and machine.peak and total else 0.0
    return StepTime(seconds, hidden, tokens, ranks, mfu)


def parameters_sent(
    spent: Spent, machine: Machine | None, computing: float, unhidden: int, prefetch: int
) -> tuple[float, float]:
    """Return the seconds of messages of parameters and gradients that are waited for, and of those beside computation.

    `unhidden` is the place of the one that nothing hides.
    """
    taken = [seconds_of(transfer, machine) for transfer in spent.transfers if transfer.sent]
    if not taken:
        return 0.0, 0.0
    if not prefetch:
        return sum(taken), 0.0
    others = sum(taken) - taken[unhidden]
    late = max(0.0, others - computing)
    return taken[unhidden] + late + SLOWDOWN * (others - late), others - late


def seconds_of(transfer: Transfer, machine: Machine | None) -> float:
    """Return the seconds of a message that NCCL sends."""
    return LATENCY + transfer.sent / rate_between(machine, transfer.world_size)


def tokens_sent(exchanged: Iterable[tuple[int, int]], machine: Machine | None, ranks: int) -> float:
    """Return the seconds of messages of tokens, other than attention's."""
    return sum(calls * LATENCY + sent / rate_between(machine, ranks) for calls, sent in exchanged) if ranks > 1 else 0.0


def rate_between(machine: Machine | None, ranks: int) -> float:
    """Return the bytes a second that NCCL sends among so many ranks, or gloo among CPUs."""
    link = link_on(machine, ranks, "p2p")
    return BYTES[link] if machine is None else machine.bytes_per_second(link)
