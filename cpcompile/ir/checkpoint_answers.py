"""Checkpoint answers: what a selective activation checkpoint says of the results of each operator that a node runs.

A node runs several operators below autograd, of which a policy may save some: `aten.linear` is a view, a product and a view. The
answers are kept beside the source of a node, where every pass carries them along, and compilers to the operators it becomes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

_KEY = "cpcompile_checkpoint"  # of `custom`, whose values are plain data
# What counts where an operator is run twice by one node, the first of them.
_ORDER = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.MUST_RECOMPUTE)


def set_answers(node: fx.Node, answers: Iterable[tuple[Any, CheckpointPolicy]]) -> None:
    """Note what a policy says of the operators of a node; others are recomputed if that is cheaper."""
    said: dict[str, CheckpointPolicy] = {}
    for target, policy in answers:
        if policy in _ORDER:
            said[str(target)] = strongest([policy, said.get(str(target), policy)])
    if said:
        names = {target: policy.name for target, policy in said.items()}
        node.meta["custom"] = (node.meta.get("custom") or {}) | {_KEY: names}


def answers_of(node: fx.Node) -> dict[str, CheckpointPolicy]:
    """Return what a policy says, by the names of operators; empty where none was asked, or says nothing in particular."""
    names = (node.meta.get("custom") or {}).get(_KEY) or {}
    return {target: CheckpointPolicy[name] for target, name in names.items()}


def strongest(policies: Iterable[CheckpointPolicy]) -> CheckpointPolicy:
    """Return the one that counts."""
    return min(policies, key=_ORDER.index)
