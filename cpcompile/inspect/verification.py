"""Verification: what a comparison of the ranks with one device found, as data and as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cpcompile.compile.transform import Transformed
from cpcompile.errors import VerificationError
from cpcompile.inspect.explain import how_computed, made_attentions
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
        plan, (name, error) = self.transformed.plan, self.worst_gradient
        loss_error = f"error {self.loss_error:.1e}" if self._has_loss else "not compared"
        lines = [
            f"{self.verdict} for {self.world_size} ranks, layout {plan.layout}, attention "
            f"{', '.join(self.attentions) or 'none'} (tolerance {self.tolerance:.1e}, relative)",
            f"  loss       {self.loss[0]:.10g}   single device {self.reference_loss:.10g}   {loss_error}",
            f"  gradients  {len(self.gradient_errors)} compared   worst {name or '-'}   error {error:.1e}",
        ]
        if self.stand_in:
            lines.insert(2, f"             the model returns none: {self.stand_in} stands for it")
        if self.state_errors:
            name, error = worst(self.state_errors)
            lines.append(f"  buffers    {len(self.state_errors)} changed   worst {name}   error {error:.1e}")
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


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """Return the name with the largest error; NaN counts as most."""
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=("", 0.0))
