"""Kernels: which kernels compute the attentions of a graph, and the refusal of one that was asked for and cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.errors import ConfigError, where
from cpcompile.ir.operator_call import Call, size_estimate
from cpcompile.runtime import kernels
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.workload import pieces_of, sampled
from cpcompile.runtime.kernels import Case, adapt
from cpcompile.runtime.kernels.calls import windows_apart
from cpcompile.runtime.schedule import Piece, pieces, whole
from cpcompile.runtime.traffic import TERMS, attention_workload

# Reasons that say no more than that a kernel is for another device.
ELSEWHERE = {"cpu": ("runs on cuda", "pip install"), "cuda": ("runs on cpu",)}
PLANNED = "meta"  # the device of a model without memory, whose GPU nobody knows yet


@dataclass(frozen=True, slots=True)
class Chosen:
    """The kernel of some blocks of an attention, and why none of the faster ones: `name reason`."""

    name: str
    reasons: tuple[str, ...]


def sized(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name, with meta tensors of its sizes in place of nodes."""

    def of(argument: Any) -> Any:
        value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
        if isinstance(value, torch.Tensor):
            return torch.empty([size_estimate(n) for n in value.shape], dtype=value.dtype, device="meta")
        return size_estimate(value) if isinstance(value, torch.SymInt) else value

    return {name: of(argument) for name, argument in call.arguments.items()}


def strategy_of(node: fx.Node) -> str:
    """Return the strategy of a rewritten attention, '' for one that exchanges nothing."""
    name: str = node.target._schema.name.removeprefix("cpcompile::")  # type: ignore[union-attr]
    return name.removesuffix("_attention") if name.endswith("_attention") else ""


def cases_of(node: fx.Node) -> tuple[Case, ...]:
    """Return the cases of the blocks that ranks compute, rewritten or not; none where plain operators compute it.

    Where documents begin is not known before the model runs: blocks of the whole sequence stand for those of long documents, and
    some squares may be those of several short ones.
    """
    call = Call.of(node)
    arguments, device = sized(call), call.tensor("q").device.type
    if arguments["dropout"] and arguments["seed"] is None:
        return ()
    has_bounds = arguments["bounds"] is not None
    if has_bounds:
        arguments |= {"documents": None, "bounds": None}
    q, k, v = (arguments[name] for name in "qkv")
    length = arguments.get("length", max(q.shape[2], k.shape[2]))
    terms = AttentionArguments.of(q, k, [arguments[name] for name in TERMS], length)
    found = []
    for piece in _pieces(arguments, terms, strategy_of(node)):
        block = terms.block(piece, torch.device("meta"))
        part = adapt.trim(block, piece.rows.size, piece.columns.size)
        if not part.is_empty:
            case = Case.of(q, v, part.block)
            varied = {"varied"} if has_bounds else set()
            found.append(replace(case, device=device, features=case.features | varied))
        if (
            not part.is_empty
            and has_bounds
            and terms.visible.is_joined
            and piece.rows.positions == piece.columns.positions
        ):
            found.append(replace(found[-1], features=found[-1].features | {"lengths"}))
    return tuple(dict.fromkeys(found))


def _pieces(arguments: Mapping[str, Any], terms: AttentionArguments, strategy: str) -> Iterable[Piece]:
    """Return one of the rectangles of each form."""
    if not strategy:
        rows, columns = (whole(arguments[name].shape[2]) for name in "qk")
        return windows_apart(pieces(rows, columns, terms.visible))
    workload = attention_workload(arguments)
    places = sampled(workload.world_size // workload.inner(strategy))
    found = [piece for place in places for piece in pieces_of(workload, strategy, place)]
    return {(p.rows.size, p.columns.size, p.low, p.high): p for p in windows_apart(tuple(found))}.values()


def chosen_kernels(node: fx.Node, kernel: str) -> tuple[Chosen, ...]:
    """Return the kernels of an attention; none where that is not known yet."""
    found = []
    for case in cases_of(node):
        if case.device != PLANNED:
            choice = kernels.choose(case, kernel)
            others = ELSEWHERE.get(case.device, ())
            reasons = tuple(reason for reason in choice.reasons if not any(text in reason for text in others))
            found.append(Chosen(choice.kernel.name, reasons))
    return tuple(dict.fromkeys(found))


def likely_kernel(node: fx.Node, kernel: str) -> str:
    """Return the kernel by whose rate the cost of an attention is estimated, before it is rewritten.

    Its operator will be told where documents begin, so that kernels compute squares of these and see no others.
    """
    cases = cases_of(node)
    if kernel != "auto" or not cases:
        return kernel
    case = cases[0]
    if "documents" in case.features:
        case = replace(case, features=case.features - {"documents"} | {"lengths", "varied"})
    if case.device == PLANNED:
        able = (k for k in kernels.ON_HOPPER if case.features - kernels.FORMS <= k.takes and not k.avoids(case))
        return next(able).name
    return kernels.choose(case).kernel.name


def refuse_unable_kernel(nodes: Iterable[fx.Node], kernel: str) -> None:
    """Refuse a kernel that was asked for and cannot compute some attention.

    Raises:
        ConfigError: with the user's line, the reason and the kernels that can, for every such attention.
    """
    offences: dict[str, list[str]] = {}
    for node in nodes:
        try:
            for case in cases_of(node):
                if case.device != PLANNED:
                    kernels.choose(case, kernel)
        except kernels.KernelError as error:
            offences.setdefault(str(error), []).append(where(node))
    if offences:
        texts = ["\n".join([f"{reason}.", *dict.fromkeys(lines)]) for reason, lines in offences.items()]
        raise ConfigError(f"kernel={kernel!r} was asked for:\n" + "\n".join(texts))
