"""Sweep: one model, verified for several numbers of ranks and several lengths, as a table."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cpcompile.capture.dynamo import token_length
from cpcompile.errors import ConfigError, CPError, InternalError, VerificationError
from cpcompile.inspect.verification import Verification, worst
from cpcompile.inspect.verify import Verifier
from cpcompile.options.config import Config

EXACT, WRONG, REFUSED, FAILED = "exact", "WRONG", "refused", "failed"
HEADS = ("ranks", "tokens", "verdict", "layout", "attention", "loss", "worst gradient", "error", "tolerance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a comparison of so many ranks with one device found, as plain data.

    Attributes:
        world_size: the ranks.
        tokens: of the sequence that they share; 0 where no input tells.
        verdict: `exact`, `WRONG`, `nothing can be compared`, `refused` (by an error of ours) or `failed` (by any other).
        text: what there is to say about it, in lines for people.
        error: the class of the error that ended it, or ''.
        layout, attentions: the plan.
        loss: as each rank returned it.
        reference_loss, loss_error, gradient_errors, state_errors, tolerance, stand_in: as in `Verification`.
    """

    world_size: int
    tokens: int
    verdict: str
    text: str
    error: str = ""
    layout: str = ""
    attentions: tuple[str, ...] = ()
    loss: tuple[float, ...] = ()
    reference_loss: float = math.nan
    loss_error: float = math.nan
    gradient_errors: Mapping[str, float] = field(default_factory=dict)
    state_errors: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = math.nan
    stand_in: str = ""

    @classmethod
    def of(cls, found: Verification, tokens: int) -> Case:
        """Return what `verify` found."""
        return cls(
            world_size=found.world_size,
            tokens=tokens,
            verdict=found.verdict,
            text=str(found),
            layout=found.transformed.plan.layout,
            attentions=found.attentions,
            loss=found.loss,
            reference_loss=found.reference_loss,
            loss_error=found.loss_error,
            gradient_errors=found.gradient_errors,
            state_errors=found.state_errors,
            tolerance=found.tolerance,
            stand_in=found.stand_in,
        )

    @classmethod
    def of_error(cls, error: Exception, world_size: int, tokens: int) -> Case:
        """Return a case that an error ended."""
        is_ours = isinstance(error, CPError)
        text = str(error) if is_ours else "".join(traceback.format_exception(error))
        verdict = REFUSED if is_ours and not isinstance(error, InternalError) else FAILED
        return cls(world_size=world_size, tokens=tokens, verdict=verdict, text=text, error=type(error).__name__)

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return self.verdict == EXACT

    @property
    def row(self) -> tuple[str, ...]:
        """The line of the table, under `HEADS`."""
        head = (str(self.world_size), str(self.tokens or "-"), self.verdict)
        if self.error:
            return (*head, *("-" for _ in HEADS[len(head) :]))
        name, error = worst(self.gradient_errors)
        plan = (self.layout, ", ".join(self.attentions) or "none")
        loss = "-" if math.isnan(self.loss_error) else f"{self.loss_error:.1e}"
        return (*head, *plan, loss, name or "-", f"{error:.1e}", f"{self.tolerance:.1e}")


@dataclass(frozen=True, slots=True)
class Sweep:
    """What was found for each number of ranks and each length.

    Attributes:
        cases: in the order in which they ran.
    """

    cases: tuple[Case, ...]

    @property
    def ok(self) -> bool:
        """Whether all are exact."""
        return all(case.ok for case in self.cases)

    @property
    def exit_code(self) -> int:
        """0 if all are exact, 1 if one is WRONG, else 2: something was refused, failed, or could not be compared."""
        return 0 if self.ok else 1 if any(case.verdict == WRONG for case in self.cases) else 2

    def raise_if_wrong(self) -> None:
        """Raise `VerificationError` unless `ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON has: a number that is not finite is its name."""
        return {"exit_code": self.exit_code, "cases": [_plain(asdict(case)) for case in self.cases]}

    def __str__(self) -> str:
        if len(self.cases) == 1 and not self.cases[0].error:
            return self.cases[0].text
        counts = {verdict: sum(c.verdict == verdict for c in self.cases) for verdict in (c.verdict for c in self.cases)}
        rows = [HEADS, *(case.row for case in self.cases)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        stand_in = next((case.stand_in for case in self.cases if case.stand_in), "")
        if stand_in:
            lines.append(f"The model returns no loss: {stand_in} (and alike for each length) stands for it.")
        lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        said: dict[str, list[str]] = {}
        for case in self.cases:
            if not case.ok:
                said.setdefault(case.text, []).append(f"{case.world_size} ranks, {case.tokens or 'unknown'} tokens")
        for text, which in said.items():
            lines += ["", f"{'; '.join(which)}:", text]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def verify_sweep(
    model: torch.nn.Module,
    inputs: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
    *,
    world_sizes: Sequence[int],
    lengths: Sequence[int] = (),
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    objective: Callable[[Any], torch.Tensor] | None = None,
    told: Callable[[Case], None] = lambda case: None,
    **options: Any,
) -> Sweep:
    """Do what `verify` does for each number of ranks and each length; what is refused for one is found for the others.

    The model is traced once for each length, and run untouched once for each.

    Args:
        model: the single-device model.
        inputs: its keyword arguments, or a function of the length that returns them.
        world_sizes: numbers of ranks to simulate.
        lengths: what `inputs` is called with; only if it is a function.
        inner_size, dtype, tolerance, objective: as in `verify`.
        told: is called with each case as it is found.
        options: the fields of `cpcompile.Config`.

    Raises:
        ConfigError: options that fit no case, or lengths that do not fit `inputs`.
    """
    config = Config.of(options)
    cases = []
    for given in batches(inputs, lengths):
        verifier = Verifier(model, given, dtype=dtype, tolerance=tolerance, objective=objective)
        for world_size in world_sizes:
            try:
                tokens = token_length(given, config, mark_dynamic=False) or 0
            except CPError:
                tokens = 0  # the verifier says why
            try:
                case = Case.of(verifier(world_size=world_size, inner_size=inner_size, **options), tokens)
            except Warning:  # that the user's filter makes an error
                raise
            except Exception as error:
                case = Case.of_error(error, world_size, tokens)
            cases.append(case)
            told(case)
    return Sweep(tuple(cases))


def batches(
    inputs: Mapping[str, Any] | Callable[[int], Mapping[str, Any]], lengths: Sequence[int]
) -> Iterator[Mapping[str, Any]]:
    """Return the inputs of each length.

    Raises:
        ConfigError: inputs that are given have a length of their own, a function needs some.
    """
    if callable(inputs):
        if not lengths:
            raise ConfigError("inputs is a function of the length, and lengths=[...] names none.")
        return map(inputs, lengths)
    if lengths:
        raise ConfigError(
            f"lengths={list(lengths)!r}, but inputs are given, whose length is their own: pass a function that makes inputs of "
            "a length."
        )
    return iter([inputs])
