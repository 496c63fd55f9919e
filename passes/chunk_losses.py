"""Chunk losses: logits that only a loss reads are computed for some tokens at a time, with the loss and their gradients.

before  logits = aten.linear(hidden, weight); loss = aten.cross_entropy_loss(logits, labels, None, SUM)
after   loss, = cp.chunked_loss(hidden, weight, None, [labels], [], body, 2048)

Cross entropy may be that of another package: `loss_provider`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from cpcompile.analysis.gradient_flow import needs_no_gradient
from cpcompile.analysis.patterns.cross_entropy import FoundLoss, OtherLossError, find_cross_entropy
from cpcompile.analysis.token_rows import NotByRowsError, RowRegion, region_of
from cpcompile.errors import ConfigError, where
from cpcompile.ir.annotation import annotate, placement_of
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.tiles import loss_providers
from cpcompile.runtime.tiles.loss_body import Body, Result, add_body
from cpcompile.runtime.tiles.loss_providers import OWN, CrossEntropy, compute, obstacle

aten, cp = torch.ops.aten, torch.ops.cpcompile
FEW = 1 / 64  # of the values of a token's logits may leave a chunk
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default)


def chunk_losses(gm: fx.GraphModule, *, chunk: int, may_return_logits: bool, provider: str = "auto") -> int:
    """Return how many heads have their losses computed in chunks of `chunk` tokens.

    Args:
        gm: the graph of every rank.
        chunk: how many tokens.
        may_return_logits: whether logits that the model returns as well are made only when they are read (`defer_outputs`).
        provider: what computes cross entropies: `own`, one of `loss_providers`, or `auto`, the fastest that can.

    Raises:
        ConfigError: a provider that was asked for cannot compute some loss exactly.

    Needs: reductions rewritten (`rewrite_reductions`), so that what is left are sums.
    Gives: `cp.chunked_loss`; logits that are returned stay beside it.
    """
    count, offences = 0, list[str]()
    for node in list(gm.graph.nodes):
        head = head_of(node)
        if head is None or value_of(node).dim() < 2:
            continue
        try:
            region = region_of(node, needs_no_gradient)
        except NotByRowsError:
            continue
        results = results_of(region, may_return_logits)
        try:
            count += bool(results) and replace_by_chunks(region, head, results, chunk, provider)
        except UnableError as error:
            offences.append(f"{provider} {error}.\n{where(node)}")
    if offences:
        raise ConfigError(
            f"loss_provider={provider!r} was asked for:\n"
            + "\n".join(offences)
            + "\nloss_provider='auto' computes every loss."
        )
    if count:
        gm.graph.eliminate_dead_code()
    return count


def head_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return (hidden states, weight `[classes, features]`, bias) of a product with a weight; None for another operator."""
    if node.target is aten.linear.default:
        hidden, weight, *bias = node.args
        return hidden, weight, bias[0] if bias else None  # type: ignore[return-value]
    if node.target in (aten.matmul.default, aten.mm.default) and len(node.args) == 2:
        hidden, turned = node.args
        is_turned = isinstance(turned, fx.Node) and turned.target in _TRANSPOSES and value_of(turned).dim() == 2
        if is_turned and is_tensor(hidden):
            return hidden, turned.args[0], None  # type: ignore[union-attr, return-value]
    return None


def results_of(region: RowRegion, may_return_logits: bool) -> list[fx.Node]:
    """Return what the rest of the graph reads of a region; nothing if that is the logits themselves, or as large."""
    few = max(FEW * value_of(region.source).shape[-1], 1)
    results = []
    for node in (region.source, *region.nodes):
        outside = region.readers(node)
        rows = region.rows[node]
        if not outside:
            continue
        if rows is None or torch.Size(rows.inner).numel() <= few:
            results.append(node)
        elif not may_return_logits or any(user.op != "output" for user in outside):
            return []
    return results if region.with_gradient().intersection(results) else []


def replace_by_chunks(
    region: RowRegion,
    head: tuple[fx.Node, fx.Node, fx.Node | None],
    results: list[fx.Node],
    chunk: int,
    provider: str,
) -> bool:
    """Let what reads the results of a region read those of `cp.chunked_loss`; False where nothing can stand in its place.

    Raises:
        UnableError: the provider cannot compute them.
    """
    function, rows, others = region.body(results)
    hidden, weight, bias = head
    first = region.first_reader(results)
    read = (hidden, weight, bias, *rows, *others, *region.read_to_write(results))
    if any(x >= first for x in read if x is not None):
        return False
    smooth = region.with_gradient()
    inner = [None if (rows_of := region.rows[node]) is None else rows_of.inner for node in results]
    kinds = [Result(sizes, value_of(x).dtype, x in smooth) for sizes, x in zip(inner, results, strict=True)]
    flat = [_flat_rows(x, region.num_lead[x], first) for x in rows]
    body = Body(function, tuple(kinds))
    if provider != OWN:
        body = body_of_provider(body, head, [value_of(x) for x in flat], chunk, provider)
    key = add_body(body)
    arguments = (hidden, weight, bias, flat, list(others), key, chunk, False)
    call = insert_call(first, cp.chunked_loss.default, *arguments)
    keep_source(call, region.source)
    region.replace(results, call, first)
    return True


def _flat_rows(x: fx.Node, num_lead: int, before: fx.Node) -> fx.Node:
    """Insert the leading dims of `x` as one, of which each row of the loss is an element."""
    shape, at = value_of(x).shape, placement_of(x)
    flat = insert_call(before, aten.reshape.default, x, [-1, *shape[num_lead:]])
    if isinstance(at, Sharded):
        at = replace(at, dim=0, inner=at.inner * math.prod(shape[at.dim + 1 : num_lead]))
    annotate(flat, placement=at)
    return flat


class UnableError(Exception):
    """A provider cannot compute a loss exactly; says why."""


def body_of_provider(
    body: Body, head: tuple[fx.Node, fx.Node, fx.Node | None], rows: list[torch.Tensor], chunk: int, provider: str
) -> Body:
    """Return a body that a provider computes; the same where `auto` finds that ours is the fastest that can.

    Raises:
        UnableError: the one that was asked for cannot.
    """
    hidden, _, bias = head
    value = value_of(hidden)
    if provider == "auto" and loss_providers.BY_SPEED[0] == OWN:
        return body
    try:
        found = find_cross_entropy(body.function.graph, value.dtype, rows)
    except OtherLossError as error:
        if provider == "auto":
            return body
        raise UnableError(f"computes cross entropy alone: {error}") from None
    loss = CrossEntropy(device=value.device.type, dtype=value.dtype, has_bias=bias is not None, **found.terms)
    chosen = (
        next(name for name in loss_providers.BY_SPEED if not obstacle(name, loss)) if provider == "auto" else provider
    )
    if chosen == OWN:
        return body
    if reason := obstacle(chosen, loss):
        raise UnableError(reason)
    return Body(function_of_provider(body.function.graph, found, loss, chunk, chosen), body.results, chosen)


def function_of_provider(
    graph: fx.Graph, found: FoundLoss, loss: CrossEntropy, chunk: int, provider: str
) -> fx.GraphModule:
    """Return a function of hidden states, weight and bias in the place of logits, in which a provider computes cross entropy."""
    made = fx.Graph()
    head = [made.placeholder(name) for name in ("hidden", "weight", "bias")]
    _, *given = graph.find_nodes(op="placeholder")
    copies = {node: made.placeholder(node.name) for node in given}
    terms = {name: getattr(loss, name) for name in ("reduction", "ignore_index", "label_smoothing", "softcap")}
    settings = {"provider": provider, "dtype": loss.loss_dtype, "chunk": chunk, **terms}
    for node in graph.nodes:
        if node is found.node:
            weights = None if found.class_weights is None else copies[found.class_weights]
            copies[node] = made.call_function(compute, (*head, copies[found.labels], weights), settings)
        elif node.op == "call_function" and all(x in copies for x in node.all_input_nodes):
            copies[node] = made.node_copy(node, copies.__getitem__)
    (output,) = graph.find_nodes(op="output")
    made.output(tuple(copies[x] for x in output.args[0]))
    return fx.GraphModule({}, made)
