"""Operators along the tokens that stay refused: what each needs, and what to do in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives

from cpcompile.errors import NoRule
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.rules import counts, reduction  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import Along, along_tokens
from cpcompile.rules.registry import REASONS, REFUSED_PAGE, RULES, Decision, no_rule

aten = torch.ops.aten

ORDER = (
    "it needs the order of all tokens by value, which no rank knows from its own; do it for each token (another dim), "
    "or on the gathered values (strict=False)"
)
COUNT = (
    "the size of its result depends on the values of all tokens, so that no rank knows its part; keep all tokens and "
    "multiply by a mask (torch.where), do it before the model, or, in a module that computes each token from that token alone "
    "(experts), declare it: token_local=['model.layers.*.mlp']"
)
MIXED = "each of its results depends on all tokens; do it before the model, or on the gathered values (strict=False)"
RANDOM = (
    "it draws numbers for each token, and no rank knows which ones one device would draw; draw them before the model "
    "and pass them as an input"
)
ONE_NUMBER = "it needs one number on the host, and every rank holds tokens of its own; reduce over the tokens first"
WEIGHT = "it normalises a weight, and a weight holds no tokens"
BAGS = "its bags cut the tokens at places that are known at run time only; use torch.nn.Embedding and sum each bag"
COLLECTIVE = (
    "it is a collective of the model's own, and nobody knows what it does to a sharded sequence; a module that computes each "
    "token from that token alone (experts on other ranks) may hold it if it is declared: token_local=['model.layers.*.mlp']"
)
LABELS = "its second result counts the labels of one rank only; call torch.nn.functional.nll_loss"

DECLARE = (
    "If a module or function around it computes each token from that token alone, as experts do, declare it:\n\n"
    "    @cpcompile.token_local\n    class MyExperts(nn.Module): ...\n\n"
    "or name it in the options, token_local=['model.layers.*.mlp']."
)

REFUSED: dict[str, tuple[str, ...]] = {
    ORDER: (
        "sort.default", "sort.stable", "argsort.default", "argsort.stable", "topk.default", "median.default", "median.dim",
        "nanmedian.default", "nanmedian.dim", "mode.default", "kthvalue.default", "quantile.default", "quantile.scalar",
        "nanquantile.default", "nanquantile.scalar", "searchsorted.Tensor", "msort.default",
    ),
    COUNT: (
        "unique_dim.default", "_unique2.default", "unique_consecutive.default", "unique_dim_consecutive.default",
        "nonzero.default", "argwhere.default", "masked_select.default", "bincount.default",
    ),
    MIXED: (
        "stft.default", "aminmax.default", "renorm.default",
        "ctc_loss.Tensor", "ctc_loss.IntList", "cosine_embedding_loss.default", "triplet_margin_loss.default",
        "multi_margin_loss.default", "multilabel_margin_loss.default", "rot90.default",
    ),
    RANDOM: (
        "randint_like.default", "bernoulli.default", "multinomial.default", "exponential.default", "rrelu.default",
    ),
    ONE_NUMBER: ("item.default", "_local_scalar_dense.default", "equal.default", "is_nonzero.default"),
    WEIGHT: ("_weight_norm.default", "_weight_norm_interface.default"),
    BAGS: ("embedding_bag.default", "embedding_bag.padding_idx", "_embedding_bag.default"),
    LABELS: ("nll_loss_forward.default", "nll_loss2d_forward.default"),
}  # fmt: skip
COLLECTIVES = (
    "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all_single", "broadcast", "reduce_scatter_single",
    "reduce_scatter_tensor",
)  # fmt: skip


def refusal(reason: str) -> Along:
    """Return what happens along the tokens: a refusal."""

    def refused(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
        """not possible"""
        raise no_rule(call, operands, reason, page=REFUSED_PAGE)

    return refused


def why(reason: str) -> Callable[[Call], str]:
    """Return the reason for an operator that has no rule at all."""
    return lambda call: reason


def _enter() -> None:
    """Enter the reasons: for operators that have rules, they say why these do not go along the tokens."""
    for reason, names in REFUSED.items():
        for name in names:
            packet, _, overload = name.partition(".")
            target = getattr(getattr(aten, packet, None), overload, None)
            if target in RULES:
                along_tokens(target)(refusal(reason))
            elif target is not None:  # versions of torch differ
                REASONS.setdefault(target, why(reason))


def _enter_collectives() -> None:
    """Enter the reason for torch's functional collectives."""
    for namespace in (torch.ops._c10d_functional, torch.ops._c10d_functional_autograd):
        for name in COLLECTIVES:
            if hasattr(namespace, name):
                REASONS.setdefault(getattr(namespace, name).default, why(COLLECTIVE))


_enter()
_enter_collectives()


MOST_NAMED = 8  # refusals beside the first


def first_of(refused: Sequence[NoRule]) -> NoRule:
    """Return the first refusal, with a note of the others; those of equal layers are one."""
    first, others = refused[0], Counter(map(_in_a_line, refused[1:]))
    if others:
        named = [f"  {text}" + (f", {n} times" if n > 1 else "") for text, n in others.most_common(MOST_NAMED)]
        more = [f"  and {len(others) - MOST_NAMED} more"] if len(others) > MOST_NAMED else []
        first.add_note("\n".join(["Refused as well, if the line above stays as it is:", *named, *more]))
    return first


def _in_a_line(error: NoRule) -> str:
    """Return the reason of a refusal and its line, without the module, which differs between layers."""
    reason, _, rest = str(error).partition("\n\n")
    *source, place = rest.partition("\n")[0].split()
    return f"{reason} {' '.join(source)} {place}"
