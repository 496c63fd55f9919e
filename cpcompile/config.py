"""Config: the options that `cpcompile.apply` and the `cpcompile` backend share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cpcompile.errors import ConfigError
from cpcompile.layout import LAYOUTS

STRATEGIES = ("ulysses", "ring", "gather")
INNER_COMPILERS = ("inductor", "aot_eager", "eager")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "strategy": ("auto", *STRATEGIES),
    "balancer": ("auto", *LAYOUTS),
    "inner": INNER_COMPILERS,
    "outputs": ("local", "full"),
    "grad_sync": ("sum", "mean", "none"),
    "check_inputs": ("always", "first", "never"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a model is made context parallel.

    Attributes:
        strategy: how attention is computed: `ulysses` (all-to-all to heads), `ring` (KV blocks travel),
            `gather` (KV gathered, local query rows) or `auto` (the cheapest by the printed cost model, one
            for each attention).
        balancer: which tokens each rank holds: `contiguous`, `zig_zag` (equal causal work) or `auto`.
        inner: what compiles the transformed graph: `inductor`, `aot_eager` or `eager`.
        outputs: sequence-shaped outputs come back as this rank's tokens (`local`) or whole, in the user's
            order (`full`).
        grad_sync: `sum`: parameter gradients are added over the axis, bucketed, at the end of backward.
            `mean`: a DDP or FSDP wrapper over a mesh that contains the axis averages them. `none`: the caller
            adds them.
        check_inputs: when the inputs of all ranks are compared: at every step, at the first, or never.
        token_dims: input name to the dim of its tokens, for models whose token inputs are not `input_ids` or
            `inputs_embeds`.
        exact_dropout: dropout draws what one device draws from the same seed, which costs the random numbers of the whole
            tensor on every rank at each site; ranks must be seeded alike. Otherwise each rank draws for its own tokens,
            and losses agree with those of one device in distribution.
        token_local: modules that compute each token from that token alone, whatever operators they use, by path
            (`model.layers.*.mlp`) or by class name. The experts of transformers are known; classes and functions may also
            be decorated with `cpcompile.token_local`. A false declaration gives wrong results, which `verify` finds.
        strict: refuse a model in which hidden states would have to be gathered (True), or gather them around every
            operator that has no better rule and compute it whole on every rank (False), which `explain` lists.
        dynamic: one compiled graph for all lengths (True), or one for each length (False).
    """

    strategy: str = "auto"
    balancer: str = "auto"
    inner: str = "inductor"
    outputs: str = "local"
    grad_sync: str = "sum"
    check_inputs: str = "always"
    token_dims: Mapping[str, int] = field(default_factory=dict)
    exact_dropout: bool = False
    token_local: Sequence[str] = ()
    strict: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not an option: choose one of {', '.join(map(repr, choices))}.")
        if isinstance(self.token_local, str):
            raise ConfigError(f"token_local={self.token_local!r} is one string: give a list of paths or class names.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Config:
        """Build a config from keyword options; an unknown one is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}: the options are {', '.join(known)}.")
        return cls(**options)
