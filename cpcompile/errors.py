"""Errors that users can act on: each says what, where (the user's line and module), with which values, and what to do."""

from __future__ import annotations

import importlib.util
import linecache
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
# Found without importing it: a help text needs errors, and not torch.
TORCH = str(Path(getattr(importlib.util.find_spec("torch"), "origin", "") or "").parent)


DOCS = "docs"  # the documentation: the folder of the repository, until its site has an address


class CPError(ValueError):
    """Base of every error that cpcompile raises for a user's model, inputs or configuration.

    A note says where to read more; tracebacks and the command line show it behind the message.
    """

    def __init__(self, *message: object, page: str = "") -> None:
        """Make an error with a message, and a page of the documentation with an anchor; by default that of the class."""
        super().__init__(*message)
        self.see(page or f"diagnostics.md#{type(self).__name__.lower()}")

    def see(self, page: str) -> None:
        """Add a place to read more at."""
        self.add_note(f"Read more: {DOCS}/{page}")


class ConfigError(CPError):
    """An option, a mesh or an axis that does not fit."""


class InputError(CPError):
    """Inputs that the model does not take, or whose token dim cannot be found."""


class RanksDiffer(InputError):
    """What all ranks must have alike differs between them: inputs, weights, options, modes, versions or graphs."""


class RankFailed(RanksDiffer):
    """Another rank has ended a call with an error, so that this one cannot go on."""


class StorageError(CPError):
    """A file or a folder that cannot be read or written, or is in use by another run."""


class GraphBreakError(CPError):
    """The model does not trace as one graph."""


class NoRule(CPError):
    """An operator whose operands cannot stay sharded."""


class LengthDependent(NoRule):
    """No one graph for all lengths can stay sharded; one for the length of a batch may."""


class CannotFollow(ConfigError):
    """A layout cannot follow the documents that attentions see."""


class NoChunks(NoRule):
    """An operator needs equal chunks of tokens, and the layout follows the documents."""


class VerificationError(CPError):
    """The transformed program does not compute what the original computes."""


class NotFiniteError(CPError):
    """A value or a gradient of a step is NaN or infinite, and `check_finite` asked for an error then."""


class DebuggerQuit(CPError):
    """A debugger that `cpcompile.show(..., pause=True)` had opened was ended with `quit`."""


class InternalError(CPError):
    """An error of another kind while compiling, its `__cause__`: a fault of cpcompile or of the inner compiler."""


def user_frame(node: fx.Node) -> tuple[str, int, str] | None:
    """Return (file, line, source line) of the innermost frame outside torch that made `node`."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        if not file.startswith(TORCH) and not file.startswith("<"):
            return file, int(line), linecache.getline(file, int(line)).strip()
    return None


def source_place(node: fx.Node) -> str:
    """Return file and line of the user's code for `node`, e.g. `model.py:41`, or ''."""
    frame = user_frame(node)
    return f"{Path(frame[0]).name}:{frame[1]}" if frame else ""


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that made `node`, e.g. `model.layers.0.self_attn`, or ''."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")  # of a node of backward
    if not stack:
        return ""
    return clean_path(str(list(stack.values())[-1][0]))


def clean_path(path: str) -> str:
    """Return the path of a module as users write it: `model.layers.0` for Dynamo's `L['self'].model.layers[0]`."""
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = re.sub(r"^L\.?(self|fn|model)?\.?", "", path).replace("_modules.", "").replace("slf.", "")
    return path.strip(".")


def where(node: fx.Node) -> str:
    """Return one line that shows the user's source for `node`, its place and its module."""
    frame = user_frame(node)
    if frame is None:
        inputs = [n.name for n in node.all_input_nodes if n.op == "placeholder"]
        return f"  {node.name}" + (f", from the input {', '.join(inputs)}" if inputs else "")
    module = module_path(node)
    place = source_place(node) + (f", in {module}" if module else "")
    return f"  {frame[2] or node.name:<60} {place}"
