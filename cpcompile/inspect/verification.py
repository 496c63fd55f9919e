"""Verification: what a comparison of the ranks with one device found, as data and as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cpcompile.compile.transform import Transformed
from cpcompile.errors import VerificationError
from cpcompile.inspect.attention_plan import how_computed, made_attentions
from cpcompile.inspect.first_difference import Difference
from cpcompile.inspect.not_finite import NotFinite

LOSS = "the loss"


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        world_size: ranks of the axis.
        loss: the transformed program's objective, as each rank returned it.
        reference_loss: the untouched model's.
        loss_error: largest relative difference between them; NaN where the untouched model's is not finite.
        gradient_errors: relative difference of each parameter's gradient (norm of the difference over norm), and of each
            input's that requires one.
        tolerance: what all must stay under.
        first_difference: where the forward values first differ, if they do.
        transformed: the graphs and the plan.
        state_errors: relative difference of each buffer, parameter and input that the forward changed, on any rank.
        not_finite: where the untouched model is first NaN or infinite, if its loss, a gradient or a buffer is.
        stand_in: what stands for the loss of a model that returns none.
    """

    world_size: int
    loss: tuple[float, ...]
    reference_loss: float
    loss_error: float
    gradient_errors: Mapping[str, float]
    tolerance: float
    first_difference: Difference | None
    transformed: Transformed
    state_errors: Mapping[str, float] = field(default_factory=dict)
    not_finite: NotFinite | None = None
    stand_in: str = ""

    @property
    def ok(self) -> bool:
        """Whether the loss, every gradient and every buffer agree. What is not finite on one device proves nothing."""
        return self.not_finite is None and not self.is_wrong

    @property
    def is_wrong(self) -> bool:
        """Whether something that is finite on one device differs."""
        errors = [
            *self.gradient_errors.values(),
            *self.state_errors.values(),
            *([self.loss_error] if self._has_loss else []),
        ]
        return not all(error <= self.tolerance for error in errors)

    @property
    def verdict(self) -> str:
        """`exact`, `WRONG`, or `nothing can be compared`."""
        if self.is_wrong:
            return "WRONG"
        return "exact" if self.not_finite is None else "nothing can be compared"

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much; NaN counts as most."""
        return worst(self.gradient_errors)

    @property
    def _has_loss(self) -> bool:
        return self.not_finite is None or LOSS not in self.not_finite.names

    @property
    def attentions(self) -> tuple[str, ...]:
        """How the attentions are computed in the end, each way once."""
        return tuple(sorted({how_computed(made) for _, made in made_attentions(self.transformed)}))

    def raise_if_wrong(self) -> None:
        """Raise `VerificationError` unless `ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        ranks = f"{self.world_size} ranks, layout {self.transformed.plan.layout}"
        lines = compared(self, f"{ranks}, attention {', '.join(self.attentions) or 'none'}", has_loss=self._has_loss)
        if self.not_finite is not None:
            lines += [f"  {self.not_finite}", "  take inputs and weights with which the model is finite on one device"]
        if self.first_difference is not None:
            first = self.first_difference
            lines += [f"  first diverging node: {first.node}, error {first.error:.1e}", f"  {first.place}"]
        elif self.is_wrong:
            kinds = {"gradient(s)": self.gradient_errors, "buffer(s)": self.state_errors}
            parts = [self._differing(kind, errors) for kind, errors in kinds.items()]
            lines.append(f"  every forward value agrees; {'; '.join(filter(None, parts))}")
        return "\n".join(lines)

    def _differing(self, kind: str, errors: Mapping[str, float]) -> str:
        """Return which of one kind differ, or ''."""
        wrong = [name for name, error in errors.items() if not error <= self.tolerance]
        return f"{len(wrong)} {kind} differ: {', '.join(wrong[:8])}" if wrong else ""


class Compared(Protocol):
    """What every comparison with one device has, as in `Verification`."""

    @property
    def verdict(self) -> str: ...
    @property
    def loss(self) -> tuple[float, ...]: ...
    @property
    def reference_loss(self) -> float: ...
    @property
    def loss_error(self) -> float: ...
    @property
    def gradient_errors(self) -> Mapping[str, float]: ...
    @property
    def state_errors(self) -> Mapping[str, float]: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def stand_in(self) -> str: ...


def compared(found: Compared, ranks: str, *, has_loss: bool) -> list[str]:
    """Return a comparison in lines for people.

    Args:
        found: the comparison.
        ranks: who was compared with one device.
        has_loss: the loss is finite on one device.
    """
    name, error = worst(found.gradient_errors)
    loss_error = f"error {found.loss_error:.1e}" if has_loss else "not compared"
    lines = [
        f"{found.verdict} for {ranks} (tolerance {found.tolerance:.1e}, relative)",
        f"  loss       {found.loss[0]:.10g}   single device {found.reference_loss:.10g}   {loss_error}",
        f"  gradients  {len(found.gradient_errors)} compared   worst {name or '-'}   error {error:.1e}",
    ]
    if found.stand_in:
        lines.insert(2, f"             the model returns none: {found.stand_in} stands for it")
    if found.state_errors:
        name, error = worst(found.state_errors)
        lines.append(f"  buffers    {len(found.state_errors)} changed   worst {name}   error {error:.1e}")
    return lines


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """Return the name with the largest error; NaN counts as most."""
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=("", 0.0))
