"""Classify: from what happened to a model to an outcome, with a reason that models with the same cause share."""

from __future__ import annotations

import re
import traceback

import torch

from cpcompile.errors import CPError, GraphBreakError, InternalError
from cpcompile.zoo.build import NotAvailable
from cpcompile.zoo.evidence import Unsound
from cpcompile.zoo.result import CRASH, NOT_AVAILABLE, NOT_CAPTURED, REFUSED

LONGEST = 400


def classify(error: BaseException) -> tuple[str, str, str]:
    """Return (outcome, reason, detail) of an error that building, running or transforming a model raised."""
    match error:
        case NotAvailable():
            return NOT_AVAILABLE, str(error), ""
        case Unsound():
            return NOT_CAPTURED, f"one device: {error}", ""
        case GraphBreakError():
            return NOT_CAPTURED, f"graph break: {normalise(graph_break_reason(error))}", detail_of(error)
        case InternalError():
            cause = error.__cause__ or error
            return CRASH, crash_reason(cause), detail_of(error)
        case CPError():
            return REFUSED, normalise(first_line(error)), detail_of(error)
        case torch._dynamo.exc.BackendCompilerFailed():
            return CRASH, crash_reason(error.inner_exception), shorten(str(error.inner_exception))
        case _ if is_from_dynamo(error):
            return NOT_CAPTURED, f"Dynamo: {type(error).__name__}: {normalise(first_line(error))}", shorten(str(error))
    return CRASH, crash_reason(error), shorten(str(error))


def is_from_dynamo(error: BaseException) -> bool:
    """Tell whether Dynamo gave up on the model's own code: nothing of ours ran but the call of the compiled model."""
    own = own_frames(error)
    is_from_tracing = any("/torch/_dynamo/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return is_from_tracing and (not own or own[-1].filename.endswith("/cpcompile/capture/dynamo.py"))


def own_failure(error: BaseException) -> tuple[str, str, str]:
    """Return (outcome, reason, detail) of an error that the untouched model raised."""
    if isinstance(error, (NotAvailable, Unsound)):
        return classify(error)
    return NOT_CAPTURED, f"one device: {type(error).__name__}: {normalise(first_line(error))}", last_frame(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def graph_break_reason(error: GraphBreakError) -> str:
    """Return why Dynamo stopped, without our own introduction."""
    return first_line(error).removeprefix("The model does not trace as one graph: ").rstrip(".")


def detail_of(error: BaseException) -> str:
    """Return the message and the user's line that it shows."""
    paragraphs = [p.strip() for p in str(error).split("\n\n") if p.strip()]
    return shorten("\n".join(p.splitlines()[0] for p in paragraphs[:2]))


def shorten(text: str) -> str:
    """Return the text, cut when it is long."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def crash_reason(error: BaseException) -> str:
    """Return the error's type and text, and where in cpcompile, or else in torch, it was raised."""
    return f"{type(error).__name__}: {normalise(first_line(error))} ({last_frame(error)})"


def last_frame(error: BaseException) -> str:
    """Return file and function of the innermost frame in cpcompile, or else of the innermost frame."""
    frames = own_frames(error) or traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no traceback"
    frame = frames[-1]
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.name}"


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames in cpcompile, without those of the zoo."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if re.search(r"/(cpcompile|passes)/(?!zoo/)", frame.filename)]


# What differs between models with the same cause: nodes, shapes, symbols, numbers.
_DIFFERENCES = (
    (re.compile(r" \(inputs of this graph: [^)]*\)"), ""),
    (re.compile(r"(?<=\w\.) [A-Z].*"), ""),  # what comes after the first sentence
    (re.compile(r"^%?(\w+) : (\[num_users=\d+\] )?= "), ""),
    (re.compile(r"0x[0-9a-f]+"), "0x.."),
    (re.compile(r"\[[-\w\s,*+/().]*\d[-\w\s,*+/().]*\]"), "[..]"),
    (re.compile(r"\(\s*-?\d[-\d\s,]*\)"), "(..)"),
    (re.compile(r"%?\b([a-zA-Z][a-zA-Z_]*?)(_\d+)+\b"), r"\1"),
    (re.compile(r"\b[su]\d+\b"), "s"),
    (re.compile(r"\.\d+(?=\.)"), ".N"),  # layers of a module path
    (re.compile(r"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?\b"), "N"),
)


def normalise(text: str) -> str:
    """Return a reason without node names' numbers, shapes and other numbers."""
    for pattern, replacement in _DIFFERENCES:
        text = pattern.sub(replacement, text)
    return shorten(text.strip())
