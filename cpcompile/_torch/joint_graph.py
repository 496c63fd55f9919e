"""Joint graph: functions that run on the graph of forward and backward, before compilers divide it and on its halves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch._inductor.config
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

Halves = tuple[fx.GraphModule, fx.GraphModule]


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


@dataclass(frozen=True)
class HalvesPass:
    """A pass on forward and backward, just divided.

    Attributes:
        function: edits both; its third argument is how many outputs of forward are not kept for backward.
        key: tells passes apart.
    """

    function: Callable[[fx.GraphModule, fx.GraphModule, int], Any]
    key: str

    def __reduce__(self) -> Any:
        return str, (self.key,)  # pickled only to be told apart by caches

    @classmethod
    def of(cls, passes: Sequence[HalvesPass]) -> HalvesPass | None:
        """Return the pass that runs these in turn, None for none."""

        def run(forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int) -> None:
            for each in passes:
                each.function(forward, backward, num_outputs)

        return cls(run, repr([each.key for each in passes])) if passes else None


def is_computed_again(node: fx.Node) -> bool:
    """Tell whether a node of a graph of backward is one of forward that is computed again (torch 2.11 to 2.14)."""
    return node.meta.get("partitioner_tag") == "is_forward"


@dataclass(frozen=True)
class Partitioner(CustomPartitionerFn):
    """What divides the graph of forward and backward, with our passes around it.

    Attributes:
        divide: the partitioner of a compiler, or of the user.
        joint_pass: runs before it.
        halves_pass: runs behind it.
    """

    divide: Callable[..., Halves]
    joint_pass: JointPass | None = None
    halves_pass: HalvesPass | None = None

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Halves:
        """Return forward and backward."""
        if self.joint_pass is not None:
            self.joint_pass(gm.graph)
        halves = self.divide(gm, joint_inputs, **kwargs)
        # The graph of a call of a subgraph is divided before that of the whole, and comes without inputs (torch 2.11 to 2.14).
        if self.halves_pass is not None and joint_inputs:
            self.halves_pass.function(*halves, kwargs["num_fwd_outputs"])
        return halves

    def uuid(self) -> Any:
        """Return what the caches of Inductor know it by; None keeps it out of them."""
        own = "" if self.halves_pass is None else self.halves_pass.key
        if not isinstance(self.divide, CustomPartitionerFn):
            return own
        given = self.divide.uuid()
        return None if given is None else repr((own, given))


@contextlib.contextmanager
def in_inductor(joint_pass: JointPass | None, halves_pass: HalvesPass | None = None) -> Iterator[None]:
    """Have Inductor run passes on the joint graph, behind those of the user, and on its halves (torch 2.11 to 2.14)."""
    config: Any = torch._inductor.config
    patches: dict[str, Any] = {}
    if joint_pass is not None:
        given = config.joint_custom_pre_pass
        earlier = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
        patches["joint_custom_pre_pass"] = JointPass(joint_pass.function, joint_pass.key, earlier)
    if halves_pass is not None:
        divide = config.custom_partitioner_fn or min_cut_rematerialization_partition
        patches["custom_partitioner_fn"] = Partitioner(divide, halves_pass=halves_pass)
    with config.patch(patches):
        yield
