"""Saved results: on the graph of forward and backward, results are tagged as selective checkpoints say of their operators.

before  y = aten.mm(x, w)      # recompute: PREFER_RECOMPUTE, the policy says MUST_SAVE of aten.mm
after   y = aten.mm(x, w)      # recompute: MUST_SAVE
"""

from __future__ import annotations

import operator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.choose.attention_sites import REWRITTEN
from cpcompile.ir.checkpoint_answers import answers_of, set_answers, strongest
from cpcompile.ir.operator_call import is_view


def keep_attention(graph: fx.Graph, keeps_all: bool) -> None:
    """Have the results of attentions inside activation checkpoints saved: of all of them, or of those that a policy has saved.

    They take as much memory as the input of a layer; to compute them again takes a third of the time of attention or more. A
    policy that says that they must not be saved is followed. What was received and computed by heads is not saved: q, k and v
    are computed again in backward anyway, and exchanged once more, which takes little beside attention.
    """
    for node in graph.nodes:
        if node.target not in REWRITTEN or node.meta.get("recompute") is not CheckpointPolicy.PREFER_RECOMPUTE:
            continue
        answers = answers_of(node)
        if keeps_all and CheckpointPolicy.MUST_RECOMPUTE not in answers.values():
            set_answers(node, [*answers.items(), (node.target, CheckpointPolicy.MUST_SAVE)])
        has_heads = any(argument.name == "keeps_heads" for argument in node.target._schema.arguments)
        if has_heads and keeps_result(node, keeps_all):
            node.kwargs = node.kwargs | {"keeps_heads": False}


def keeps_result(node: fx.Node, keeps_all: bool) -> bool:
    """Tell whether the result of an attention inside of an activation checkpoint is saved, so that it runs only once."""
    answers = answers_of(node).values()
    if keeps_all and CheckpointPolicy.MUST_RECOMPUTE not in answers:
        return True
    saved = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE
    return bool(answers) and strongest(answers) in saved


def tag_saved_results(graph: fx.Graph) -> int:
    """Return how many results are tagged. The graph is that of forward and backward, below autograd."""
    count = 0
    for node in graph.nodes:
        policy = policy_of(node)
        if policy is not None:
            node.meta["recompute"] = policy
            count += 1
    return count


def policy_of(node: fx.Node) -> CheckpointPolicy | None:
    """Return what the policy of its checkpoint says of a node; None where it says nothing in particular.

    An attention of ours is saved where anything was that it took the place of. Views are never saved, but what they view.
    """
    if "recompute" not in node.meta:
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        return policy_of(parent) if isinstance(parent, fx.Node) else None
    answers = answers_of(node)
    if not answers or is_view(node.target):
        return None
    if node.target in REWRITTEN:
        return strongest(answers.values())
    # Compilers write some operators as several others, which have the first one's name beside theirs.
    return answers.get(str(node.target)) or answers.get(str(node.meta.get("original_aten")))


def tags_of(graph: fx.Graph) -> str:
    """Return all that is said of what backward computes again, which the code of a graph does not show."""
    said = [
        (i, str(node.meta["recompute"]), answers_of(node))
        for i, node in enumerate(graph.nodes)
        if "recompute" in node.meta
    ]
    return repr(said) if said else ""


def is_recomputed(graph: fx.Graph) -> bool:
    """Tell whether anything is to be computed again in backward."""
    recomputed = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return any(node.meta.get("recompute") in recomputed for node in graph.nodes)
