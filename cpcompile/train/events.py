"""Events: what the ranks tell the process that shows it. They travel through pipes."""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.front.messages import Messages


@dataclass(frozen=True, slots=True)
class Phase:
    """What is being done now, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Steps up to `step` come from a checkpoint."""

    step: int


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: `step` counts from 1, `memory` is the peak in bytes of the rank that needs most."""

    step: int
    loss: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    memory: int


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one backward gave: the loss, and the gradient norm of all parameters together and of each by its name."""

    loss: float
    grad_norm: float
    grad_norms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first step on one device and on the ranks."""

    single: Gradients
    ranks: Gradients
    num_ranks: int
    dtype: str
    exact: bool


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or the trained model lies on disk."""

    path: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank ended with an error, or because of `signal`; `is_user_error`: the text is all a user needs."""

    rank: int
    text: str
    traceback: str
    is_user_error: bool
    time: float
    signal: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """A rank has done all its steps."""

    rank: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank is alive, whatever its main thread is waiting for; `messages` are the last that it has sent."""

    rank: int
    messages: Messages | None = None


Event = Phase | Note | Resumed | Step | Comparison | Saved | Failed | Finished | Beat
