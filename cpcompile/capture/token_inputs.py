"""Token inputs: which inputs of a graph hold the tokens of the sequence, and along which dim.

This only says which logical axis to shard. That the sharded program computes the same is for the rules to
prove.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from cpcompile.errors import InputError
from cpcompile.options.checking import did_you_mean

KNOWN = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "decoder_input_ids": 1,
    "decoder_inputs_embeds": 1,
}
aten = torch.ops.aten


def find_token_dims(gm: fx.GraphModule, inputs: Mapping[str, str], declared: Mapping[str, int]) -> dict[str, int]:
    """Return the token dim of each token input of `gm`, by placeholder name.

    `inputs` maps placeholder names to the user's argument names. Declared inputs come first, then `input_ids`
    and `inputs_embeds`, then integer inputs that an embedding looks up directly (their last dim).

    Raises:
        InputError: a declared input does not exist, or no input with tokens is found.
    """
    nodes = {node.name: node for node in gm.graph.find_nodes(op="placeholder") if node.name in inputs}
    tensors = {name: node for name, node in nodes.items() if isinstance(node.meta.get("val"), torch.Tensor)}
    found: dict[str, int] = {}
    for wanted in (declared, KNOWN):
        for name, node in tensors.items():
            if inputs[name] in wanted and not found.keys() & {name}:
                found[name] = token_dim(inputs[name], node.meta["val"], wanted[inputs[name]])
        unknown = sorted(set(declared) - set(inputs.values()))
        if wanted is declared and unknown:
            listed = ", ".join(sorted(set(inputs.values()))) or "none"
            meant = "".join(did_you_mean(name, inputs.values()) for name in unknown)
            raise InputError(
                f"token_dims names {', '.join(unknown)}, but the inputs of the model are: {listed}.{meant}"
            )
        if found:
            break
    found = found or {name: node.meta["val"].dim() - 1 for name, node in tensors.items() if is_looked_up(node)}
    if not found:
        listed = ", ".join(f"{inputs[name]} {list(node.meta['val'].shape)}" for name, node in tensors.items()) or "none"
        example = next((inputs[name] for name, node in tensors.items() if node.meta["val"].dim() > 1), "x")
        raise InputError(
            f"cannot tell which input holds the tokens (inputs of this graph: {listed}). Name it and the dim of its tokens, e.g. "
            f"token_dims={{{example!r}: 1}}. If the model was cut by a graph break, remove the break (fullgraph=True shows it)."
        )
    return found | labels_of_another_sequence(tensors, inputs, found)


def token_dim(name: str, x: torch.Tensor, dim: int) -> int:
    """Return the dim of the tokens of an input, counted from the front.

    Raises:
        InputError: the input has no such dim.
    """
    if not -x.dim() <= dim < x.dim():
        raise InputError(
            f"token_dims={{{name!r}: {dim}}}: the input {name!r} of shape [{', '.join(map(str, x.shape))}] has "
            f"{x.dim()} dims: the dim of its tokens is one of {', '.join(map(str, range(x.dim()))) or 'none'}."
        )
    return dim % x.dim()


def labels_of_another_sequence(
    tensors: Mapping[str, fx.Node], inputs: Mapping[str, str], found: Mapping[str, int]
) -> dict[str, int]:
    """Return the token dim of labels of another length than the inputs: those of a decoder that has no inputs of its own."""
    lengths = {str(tensors[name].meta["val"].shape[dim]) for name, dim in found.items()}
    is_decoder_given = any(inputs[name].startswith("decoder_") for name in found)
    return {
        name: 1
        for name, node in tensors.items()
        if inputs[name] == "labels"
        and not is_decoder_given
        and node.meta["val"].dim() == 2
        and not node.meta["val"].is_floating_point()
        and str(node.meta["val"].shape[1]) not in lengths
    }


def is_looked_up(node: fx.Node) -> bool:
    """Tell whether an input holds integers of at least two dims that an embedding looks up."""
    value = node.meta["val"]
    is_index = not value.is_floating_point() and value.dim() >= 2
    return is_index and any(user.target is aten.embedding.default and user.args[1] is node for user in node.users)
