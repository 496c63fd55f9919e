"""Separate documents: a row of packed documents is computed as if each were alone.

before  o = cp.attention(q, k, v, None, None, None, ...); y = aten.mul(x, cos); loss = aten.cross_entropy_loss(z, labels)
after   ids, positions = ...                                                              # once, e.g. from the eos tokens
        o = cp.attention(q, k, v, None, ids, None, ...); y = aten.mul(x, aten.embedding(cos, positions))
        loss = aten.cross_entropy_loss(z, aten.masked_fill(labels, is_first, -100))       # if labels are to be masked
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cpcompile.analysis.patterns.boundaries import Boundaries, emit_boundaries
from cpcompile.analysis.patterns.labels import mask_labels
from cpcompile.analysis.patterns.mask_vectors import joined_ids
from cpcompile.analysis.patterns.tables import at_positions, is_prefix
from cpcompile.analysis.patterns.token_walk import MIXED, TokenWalk
from cpcompile.analysis.regions import Region, find_regions
from cpcompile.analysis.regions.rows import locate_rows
from cpcompile.errors import InputError
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.options.documents import Source


def separate_documents(
    gm: fx.GraphModule,
    *,
    source: str,
    masks_labels: bool,
    token_dims: Mapping[str, int],
    inputs: Mapping[str, str],
    token_local: tuple[str, ...] = (),
) -> int:
    """Return how many attentions see documents now.

    Needs: attentions with their masks lifted (`lift_masks`), and the option `documents`.
    Gives: a program of one device that computes each document as if it were alone.

    Raises:
        InputError: the input that tells documents apart is missing, or the model reads several sequences.
        NoRule: an operator mixes the tokens of documents, or reads places in another way than from a table.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = Source.of(source)
    tokens = token_input(placeholders, token_dims, given)
    told = next((node for node in placeholders if inputs.get(node.name) == given.name), None) if given.name else tokens
    if told is None:
        raise InputError(
            f"documents={source!r}: the model was not called with {given.name}, or its graph does not read it (with "
            "cpcompile.apply it always does; with torch.compile the model has to)."
        )
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    regions = {region.nodes[0]: region for region in find_regions(gm, token_local)}
    inside = {node for region in regions.values() for node in region.nodes}
    behind = next(node for node in gm.graph.nodes if node.op != "placeholder")
    walk = Separation(value_of(tokens).shape[1], boundaries=emit_boundaries(behind, given, tokens, told))
    for node in placeholders:
        walk.enter(node)
    for node in nodes:
        if node in regions:
            walk.cross(regions[node])
        elif node not in inside:
            walk.visit(node)
    if masks_labels:
        mask_labels(walk.boundaries, walk.losses)
    return walk.count


def token_input(placeholders: list[fx.Node], token_dims: Mapping[str, int], source: Source) -> fx.Node:
    """Return the input with the tokens, `[B, S, ...]`.

    Raises:
        InputError: there is none, there are several sequences, or their length is a number.
    """
    inputs = [node for node in placeholders if node.name in token_dims]
    found = [node for node in inputs if token_dims[node.name] == 1]
    if source.kind == "eos":
        found = [node for node in found if value_of(node).dim() == 2 and not value_of(node).is_floating_point()]
    lengths = {str(value_of(node).shape[token_dims[node.name]]) for node in inputs}
    if len(lengths) != 1 or not found:
        what = "token ids" if source.kind == "eos" else "tokens"
        raise InputError(
            f"documents=... is for one sequence of {what} [B, S], but the inputs with tokens are {dict(token_dims)}."
        )
    if not isinstance(value_of(found[0]).shape[1], torch.SymInt):
        raise InputError(
            "documents=... needs a length that may change, to tell places from other numbers: leave dynamic=True, and pass more "
            "than one token."
        )
    return found[0]


@dataclass(slots=True, kw_only=True)
class Separation(TokenWalk):
    """A walk that gives attentions the documents, and positions in documents to what reads places."""

    boundaries: Boundaries
    tables: dict[tuple[fx.Node, int, int], fx.Node] = field(default_factory=dict)
    vectors: dict[fx.Node, fx.Node] = field(default_factory=dict)
    joined: dict[fx.Node, fx.Node] = field(default_factory=dict)
    count: int = 0

    def meet(self, call: Call, name: str, table: fx.Node, at: Sharded) -> None:
        """Let an operator read what depends on places by the places in the documents."""
        rank = max(call.tensor(other).dim() for other, _ in call.operands())
        if at.inner != 1 or not at.covers_all or not is_prefix(table, at.dim, self.length):
            raise self.refusal(call.node, f"{table.name} depends on places in the row in a way that is not known")
        key = table, at.dim, rank
        if key not in self.tables:
            found = at_positions(table, at.dim, self.boundaries.positions, rank)
            if found is None:
                raise self.refusal(
                    call.node, f"{table.name} depends on places and does not broadcast to [B, ..., S, ...]"
                )
            self.tables[key] = found
        call.node.args, call.node.kwargs = Call.of(call.node).rebound({name: self.tables[key]})

    def attend(self, call: Call) -> Sharded:
        """Give an attention the documents; one to a memory that is no token needs none."""
        q, k, v = (self.at.get(call[name]) for name in ("q", "k", "v"))
        tokens = Sharded(2)
        if q == tokens and k is None and v is None and call["documents"] is None:
            return tokens
        if not q == k == v == tokens:
            raise self.refusal(call.node, "queries and keys are not the tokens of one row")
        for name, what in (
            ("mask", "its mask is not recognised"),
            ("prefix", "it has a prefix, which is one of the row"),
        ):
            if call[name] is not None:
                raise self.refusal(call.node, f"{what}, so that it is not known what it hides in a document")
        given = [name for name in ("documents", "key_padding") if call[name] is not None]
        call.node.args, call.node.kwargs = call.rebound({name: self.of_tokens(call, name) for name in given})
        call = Call.of(call.node)
        documents = self.boundaries.ids
        if call["documents"] is not None:
            documents = self.joined.get(call["documents"]) or joined_ids(call, [call["documents"], documents])
            self.joined[call["documents"]] = documents
        call.node.args, call.node.kwargs = call.rebound({"documents": documents})
        self.count += 1
        return tokens

    def of_tokens(self, call: Call, name: str) -> fx.Node:
        """Return a value `[B | 1, S]` for each token; ids may be computed from all tokens, as only equal ones count."""
        node: fx.Node = call[name]
        if node in self.at and (name == "documents" or self.at[node] != MIXED):
            return node
        if node in self.at or value_of(node).shape[0] != 1 or not is_prefix(node, 1, self.length):
            raise self.refusal(call.node, f"its {name} depend on places in the row in a way that is not known")
        if node not in self.vectors:
            row = insert_call(call.node, torch.ops.aten.select.int, node, 0, 0)
            self.vectors[node] = insert_call(call.node, torch.ops.aten.index.Tensor, row, [self.boundaries.positions])
        return self.vectors[node]

    def cross(self, region: Region) -> None:
        """Find the tokens of what a token-local region computes."""
        known = {operand: at for operand in region.inputs if isinstance(at := self.at.get(operand), Sharded)}
        for node in region.results if known else ():
            rows = (locate_rows(value_of(o).shape, value_of(node).shape, at, self.length) for o, at in known.items())
            self.at[node] = next((row for row in rows if row is not None), MIXED)
