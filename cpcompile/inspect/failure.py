"""Failure: how a verification fails, so that two can be told to be of one kind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cpcompile.capture.faults import node_at
from cpcompile.errors import InternalError
from cpcompile.inspect.sweep import WRONG
from cpcompile.ir.annotation import annotation

_OPERATOR = re.compile(r"\b(?:aten|cp|cpcompile|prims|higher_order)\.\w+")


@dataclass(frozen=True, slots=True)
class Failure:
    """How a verification fails: two are of one kind if all but the text is equal.

    Attributes:
        kind: `WRONG`, or the class of the error (and of its cause, where that is no error of ours).
        operator: the operator that the error names first, or ''.
        text: what is said of it.
        node: the first value that differs, or at which the error came up.
    """

    kind: str
    operator: str
    text: str
    node: str = ""

    def is_like(self, other: Failure | None) -> bool:
        """Tell whether the other is of this kind."""
        return other is not None and (self.kind, self.operator) == (other.kind, other.operator)

    def __str__(self) -> str:
        return f"{self.kind} of {self.operator}" if self.operator else self.kind


def failure_of(run: Callable[[], Any]) -> Failure | None:
    """Return how a verification fails, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run()
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InternalError) else None
        kind = type(error).__name__ + (f" ({type(cause).__name__})" if cause is not None else "")
        operator, node = _OPERATOR.search(str(error).partition("\n\n")[0]), node_at(error.__traceback__)
        at = "" if node is None else annotation(node).origin or node.name
        return Failure(kind, operator[0] if operator else "", str(error), at)
    if not found.is_wrong:
        return None
    first = found.first_difference
    return Failure(WRONG, "", str(found), first.node if first is not None else "")
