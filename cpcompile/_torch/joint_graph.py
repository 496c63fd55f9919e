"""Joint graph: a function that runs on the graph of forward and backward, before compilers divide it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass


@dataclass(frozen=True)
class JointPass(CustomGraphPass):
    """A pass on the joint graph.

    Attributes:
        function: edits the graph.
        key: tells graphs apart that caches of compilers take for one: their keys have the code of a graph, not its tags.
        earlier: passes that the user has asked Inductor for.
    """

    function: Callable[[fx.Graph], Any]
    key: str
    earlier: tuple[Any, ...] = ()

    def __call__(self, graph: fx.Graph) -> None:
        """Edit the graph."""
        for function in self.earlier:
            function(graph)
        self.function(graph)

    def uuid(self) -> Any:
        """Return what the caches of Inductor know the pass by; None, if a pass of the user has no name, keeps it out of them."""
        names = [function.uuid() if hasattr(function, "uuid") else None for function in self.earlier]
        return None if None in names else repr((self.function.__qualname__, self.key, names))


@contextlib.contextmanager
def in_inductor(joint_pass: JointPass | None) -> Iterator[None]:
    """Have Inductor run a pass on the joint graph, behind those of the user (torch 2.13: `joint_custom_pre_pass`)."""
    if joint_pass is None:
        yield
        return
    given: Any = torch._inductor.config.joint_custom_pre_pass
    earlier = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    own = JointPass(joint_pass.function, joint_pass.key, earlier)
    with torch._inductor.config.patch(joint_custom_pre_pass=own):
        yield
