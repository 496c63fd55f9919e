"""Faults: what goes wrong inside the compiler comes out as an error of our own, with the user's line and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

from torch import fx

from cpcompile import _torch
from cpcompile.errors import CPError, InternalError, NoRule, where

REMEDY = (
    "This is a fault of cpcompile, not of your model: please report it with the lines above. Until it is mended, write this "
    "line with other operators, or compute it outside the model (after cpcompile.unshard)."
)
DATA_REMEDY = (
    "Such a size cannot be shared out when compiling: keep all tokens and mask what is not wanted (torch.where, masked_fill), "
    "or compute it outside the model."
)


@contextlib.contextmanager
def faults_of(stage: str, remedy: str = REMEDY) -> Iterator[None]:
    """Let only errors of our own out of a stage of the compiler; another becomes one that names the node it was at.

    Raises:
        InternalError: from the original error.
        NoRule: what is done depends on a size that only running the program tells.
    """
    try:
        yield
    except (CPError, Warning):  # a warning that the user's filter makes an error is the user's
        raise
    except _torch.CONTROL_FLOW:
        raise
    except Exception as error:
        node = node_at(error.__traceback__)
        line = f"\n\n{where(node)}" if node is not None else ""
        if isinstance(error, _torch.DATA_DEPENDENT):
            name = node.target if node is not None else stage
            raise NoRule(f"{name}: a size depends on the values of tokens.{line}\n\n{DATA_REMEDY}") from error
        raise InternalError(f"{stage} failed: {summary(error)}{line}\n\n{remedy}") from error


def summary(error: BaseException) -> str:
    """Return the type of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def node_at(traceback: TracebackType | None) -> fx.Node | None:
    """Return the node that an error came up at: the one that the innermost of the frames that know one was working on."""
    found = None
    while traceback is not None:
        local = traceback.tb_frame.f_locals
        for name in ("node", "n", "call"):  # of passes and rules, and of torch's interpreter
            value = getattr(local.get(name), "node", local.get(name))
            found = value if isinstance(value, fx.Node) else found
        traceback = traceback.tb_next
    return found
