"""Config: the options that `cpcompile.apply` and the `cpcompile` backend share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cpcompile import names
from cpcompile.errors import ConfigError
from cpcompile.options.checking import check_types, did_you_mean
from cpcompile.options.documents import Source

# torch is imported when a config is made, and not where its options are described, in the help of the command line.
MEMORY = re.compile(r"fit(?::(\d+(?:\.\d+)?))?")  # the GiB, if any
CHOICES: Mapping[str, tuple[str, ...]] = {
    "strategy": ("auto", *names.STRATEGIES),
    "balancer": ("auto", *names.BALANCERS),
    "kernel": ("auto", *names.KERNELS),
    "transport": names.TRANSPORTS,
    "inner": names.INNER_COMPILERS,
    "outputs": ("local", "full"),
    "loss_provider": ("auto", *names.LOSS_PROVIDERS),
    "logits": ("auto", "keep"),
    "offload": ("none", "inputs", "all"),
    "grad_sync": ("sum", "mean", "none"),
    "check_inputs": ("always", "first", "never"),
    "check_finite": names.CHECKS_OF_FINITE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a model is made context parallel.

    Attributes:
        strategy: how attention is computed: `ulysses` (all-to-all to heads), `ring` (KV blocks travel), `gather` (KV gathered,
            local query rows), `halo` (only the neighbours' tokens within a sliding window), `usp` (heads exchanged along one axis
            of a pair, ring along the other), `latent` (what keys and values are computed from is gathered where it is narrower,
            and every rank computes them for all tokens), `latent_heads` (the same, for its own heads; queries and outputs
            are exchanged as in `ulysses`) or `auto` (the cheapest by the printed cost model, one for each attention).
        balancer: which tokens each rank holds: `contiguous`, `zig_zag` (equal causal work for one document), `balanced` or
            `zig_zag_by_document` (equal work for packed documents: they follow the documents of each batch, see
            `cpcompile.balance`) or `auto`. `usp` deals documents to groups of the ranks that exchange heads, which is called
            `balanced:4` where they are four.
        kernel: what computes a block of attention: `auto` (the fastest that can), or one name, for every attention of the model;
            where that one cannot compute an attention, compilation ends with its line and the reason.
        heads_per_message: how many key heads a rank receives at once, with the query heads that read them where these are
            exchanged, so that some are computed while the next arrive, and less memory is held; 0: all. Where heads are exchanged
            (`ulysses`, `usp`, `latent_heads`) it keeps none of them for backward, which exchanges them once more.
        transport: how keys, values and heads travel between GPUs: `symmetric` (copied from memory that the GPUs of a host
            share, beside the computation), `p2p` (NCCL sends and receives) or `auto` (symmetric where it works). It holds for
            the process groups of the axis, and so for every model on them.
        inner: what compiles the transformed graph: `inductor`, `aot_eager` or `eager`.
        prefetch: how many modules that `fully_shard` wrapped are gathered before they are used, beside computation, and have
            the sums of their gradients under way at once. Each holds its whole parameters; 0 gathers them where they are used.
            Only with `inductor`.
        recompute_attention: attention inside activation checkpoints runs again in backward, as without cpcompile (True), or its
            results are kept, which take as much memory as the input of a layer (False). A selective checkpoint whose policy
            says MUST_RECOMPUTE of attention is followed.
        recompute_elementwise: results of elementwise operators that backward reads (of norms and activations) are computed
            again from those of products where that is one pass over memory, and not kept. Only with `inductor`.
        memory: `fit`: at the first call the memory of a step is predicted, and `memory_budget` (then `tile`) is lowered until
            it fits the GPU, or the step is refused with what it needs; `fit:40` for 40 GiB. '' leaves the plan as it is.
        optimizer_states: tensors of the size of a parameter that the optimizer keeps (AdamW: 2), for `memory`.
        memory_budget: how many of the model's blocks keep their intermediate results for backward, 1 (all) to 0 (none). The
            others keep what enters them and the results of attention, and compute the rest again. Without activation
            checkpoints in the model; with `inductor` and `aot_eager`.
        offload: what blocks that are computed again in backward keep in pinned host memory, copied beside computation: `none`,
            `inputs` (what enters them) or `all` (the results of attention too, and whatever else is kept of their inside).
            The last of them keeps its own on the device, since backward begins with it. Needs blocks that are computed again
            (`memory_budget`, or activation checkpoints in the model); with `inductor` and `aot_eager`.
        loss_chunk: how many tokens' logits are in memory at once where only a loss reads them: the head, the loss and the
            gradients are computed for so many tokens after the other. 0: all at once.
        loss_provider: what computes a cross entropy of logits that only it reads: `own`, `torch` (its `linear_cross_entropy`),
            `liger` or `cut_cross_entropy`, or `auto` (the fastest that can: `own`). Where a named one cannot compute such a loss
            exactly, compilation ends with its line and the reason.
        tile: how many tokens at once what is computed of each token alone, and is wider than hidden states, runs for: the inside
            of MLPs. It is computed again in backward, and only that of one tile is in memory. 0: all tokens at once.
        logits: what becomes of logits that a model returns beside such a loss, in training: `auto` makes them when they are read,
            `keep` always, and then the loss is not computed in chunks.
        mode: the mode of `torch.compile` for Inductor, `max-autotune-no-cudagraphs` for example; '' is its default.
        inner_options: options of Inductor (those of `torch.compile`), such as `{"shape_padding": True}`; they go before those of
            the mode.
        outline_layers: layers that are equal are compiled once (True), as calls of one function, so that a deep model compiles
            in little more than a shallow one, or each by itself (False). Only with `inductor` and without CUDA graphs.
        one_rank_compiles: of the ranks of the axis that share Inductor's cache on disk (those of a host), the first compiles and
            the others wait, and find there what it compiled (True), or all compile at the same time (False), which is faster
            where a host has many cores for each rank. Only with `inductor`.
        outputs: sequence-shaped outputs come back as this rank's tokens (`local`) or whole, in the user's
            order (`full`).
        grad_sync: `sum`: parameter gradients are added over the axis, each as soon as backward has it.
            `mean`: a DDP or FSDP wrapper over a mesh that contains the axis averages them. `none`: the caller
            adds them.
        check_inputs: when the ranks are compared, in inputs, weights, modes, options and the graph: at every call, at the first,
            or never.
        sync_weights: the first rank of the axis sends its parameters and buffers to all at the first call, and when they were
            replaced or loaded since; otherwise ranks whose weights differ are refused.
        token_dims: input name to the dim of its tokens (-1: the last), for models whose token inputs are not `input_ids` or
            `inputs_embeds`.
        constants: inputs whose values decide sizes, by name: the grids of images of a vision encoder (`image_grid_thw`,
            `image_sizes`). Each combination of their values is compiled by itself.
        exact_dropout: dropout draws what one device draws from the same seed, which costs the random numbers of the whole
            tensor on every rank at each site; ranks must be seeded alike. Otherwise each rank draws for its own tokens,
            and losses agree with those of one device in distribution.
        token_local: modules that compute each token from that token alone, whatever operators they use, by path
            (`model.layers.*.mlp`) or by class name. The experts of transformers are known; classes and functions may also
            be decorated with `cpcompile.token_local`. A false declaration gives wrong results, which `verify` finds.
        strict: refuse a model in which hidden states would have to be gathered (True), or gather them around every
            operator that has no better rule and compute it whole on every rank (False), which `explain` lists.
        documents: what tells the documents of a packed row apart, for a model that does not keep them apart itself: `eos:2` (the
            id of the token that ends one), `positions` (`position_ids` that restart), `cu_seqlens` (`cu_seq_lens_q`), or one of
            `positions`, `ids`, `cu_seqlens` with the name of an input, `ids:document_ids`. Each document is computed as if it
            were alone: attention sees it only, and its places count from 0. '' leaves the model as it is.
        mask_labels: losses ignore labels of another document than that of the token that predicts them; needs `documents`.
        dynamic: one compiled graph for all lengths (True), or one for each length (False).
        check_finite: end a step on all ranks of the axis with a `NotFiniteError` at its first value or gradient that is NaN or
            infinite: with its line, its operands and the ranks. `step` runs what is compiled, asks once, at the end of backward,
            whether outputs and gradients are finite, and runs a step that is not again, operator by operator: to leave on.
            `operators` runs all steps so, and the ranks talk behind each operator; only with `inner="eager"`. `never` asks
            nothing.
    """

    strategy: str = "auto"
    balancer: str = "auto"
    kernel: str = "auto"
    heads_per_message: int = 0
    transport: str = "auto"
    inner: str = "inductor"
    prefetch: int = 1
    recompute_attention: bool = False
    recompute_elementwise: bool = True
    memory: str = ""
    optimizer_states: int = 2
    memory_budget: float = 1.0
    offload: str = "none"
    loss_chunk: int = 4096
    loss_provider: str = "auto"
    tile: int = 0
    logits: str = "auto"
    mode: str = ""
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    outline_layers: bool = True
    one_rank_compiles: bool = False
    outputs: str = "local"
    grad_sync: str = "sum"
    check_inputs: str = "always"
    sync_weights: bool = False
    token_dims: Mapping[str, int] = field(default_factory=dict)
    constants: Sequence[str] = ()
    exact_dropout: bool = False
    token_local: Sequence[str] = ()
    strict: bool = True
    dynamic: bool = True
    documents: str = ""
    mask_labels: bool = False
    check_finite: str = "never"

    def __post_init__(self) -> None:
        from cpcompile.balance.layout import is_of_groups

        check_types(self)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "balancer" and is_of_groups(str(value))):
                raise ConfigError(
                    f"{name}={value!r} is not an option: choose one of {', '.join(map(repr, choices))}."
                    + did_you_mean(value, choices)
                )
        if self.heads_per_message < 0:
            raise ConfigError(
                f"heads_per_message={self.heads_per_message} is not a number of heads: 0 sends all at once."
            )
        given = MEMORY.fullmatch(self.memory)
        if self.memory and (given is None or (given[1] and not float(given[1]))):
            raise ConfigError(
                f"memory={self.memory!r} is not an option: 'fit' takes what the GPU has, 'fit:40' at most 40 GiB, and '' leaves "
                "the plan as it is."
            )
        if self.memory and self.inner == "eager":
            raise ConfigError(
                f"memory={self.memory!r} lets backward compute results again, which inner='eager' does not: use 'inductor' or "
                "'aot_eager'."
            )
        if self.offload != "none" and self.inner == "eager":
            raise ConfigError(
                f"offload={self.offload!r} moves what a compiled program keeps from forward to backward, and inner='eager' "
                "compiles none: use 'inductor' or 'aot_eager'."
            )
        if self.optimizer_states < 0:
            raise ConfigError(f"optimizer_states={self.optimizer_states} is not a number of tensors.")
        if not 0 <= self.memory_budget <= 1:
            raise ConfigError(
                f"memory_budget={self.memory_budget} is not between 0 (all blocks are computed again in backward) and 1 (none)."
            )
        if self.tile < 0:
            raise ConfigError(f"tile={self.tile} is not a number of tokens: 0 computes all at once.")
        if self.loss_chunk < 0:
            raise ConfigError(
                f"loss_chunk={self.loss_chunk} is not a number of tokens: 0 computes the loss of all at once."
            )
        if not self.loss_chunk and self.loss_provider not in ("auto", names.LOSS_PROVIDERS[0]):
            raise ConfigError(
                f"loss_provider={self.loss_provider!r} computes a loss without having all logits, and loss_chunk=0 asks for all "
                "at once: leave loss_chunk out."
            )
        if self.prefetch < 0:
            raise ConfigError(
                f"prefetch={self.prefetch} is not a number of modules: 0 gathers them where they are used."
            )
        if self.check_finite == "operators" and self.inner != "eager":
            raise ConfigError(
                f"check_finite='operators' runs operator by operator what inner={self.inner!r} would compile: use inner='eager' "
                "with it, or check_finite='step', which so runs only a step that is not finite."
            )
        self._check_inductor()
        if self.documents:
            Source.of(self.documents)
        elif self.mask_labels:
            raise ConfigError(
                "mask_labels=True needs to know the documents: say what tells them apart, documents='eos:2'."
            )

    def _check_inductor(self) -> None:
        from cpcompile import _torch

        if (self.mode or self.inner_options) and self.inner != "inductor":
            raise ConfigError(
                f"mode and inner_options are Inductor's, and the graph is compiled by inner={self.inner!r}: use inner='inductor'."
            )
        if self.one_rank_compiles and self.inner != "inductor":
            raise ConfigError(
                f"one_rank_compiles=True shares what Inductor compiles, and inner={self.inner!r} leaves nothing behind: use "
                "inner='inductor'."
            )
        if self.one_rank_compiles and not _torch.cache_folder():
            raise ConfigError(
                "one_rank_compiles=True needs Inductor's cache on disk, which is switched off in this process (fx_graph_cache or "
                "force_disable_caches of torch._inductor.config, TORCHINDUCTOR_FORCE_DISABLE_CACHES)."
            )
        if self.mode:
            try:
                _torch.options_of_mode(self.mode)
            except KeyError as error:
                (modes,) = error.args
                raise ConfigError(
                    f"mode={self.mode!r} is no mode of torch.compile: choose one of {', '.join(map(repr, modes))}."
                    + did_you_mean(self.mode, modes)
                ) from None
        known = _torch.known_options() if self.inner_options else []
        for name, value in self.inner_options.items():
            if name not in known:
                raise ConfigError(
                    f"inner_options has {name!r}, which Inductor does not know.{did_you_mean(name, known)}"
                )
            if not _torch.option_fits(name, value):
                raise ConfigError(f"inner_options[{name!r}]={value!r} is of another type than Inductor's option.")

    @property
    def inductor_options(self) -> dict[str, Any]:
        """Inductor's options: those of the mode, and those that were given."""
        from cpcompile import _torch

        return {**(_torch.options_of_mode(self.mode) if self.mode else {}), **self.inner_options}

    @property
    def outlines(self) -> bool:
        """Whether equal layers are compiled once: by Inductor, where no CUDA graph holds what a call would hide from it."""
        options = self.inductor_options
        return self.outline_layers and self.inner == "inductor" and not options.get("triton.cudagraphs")

    @property
    def told_by(self) -> str:
        """The input that tells documents apart, or ''."""
        return Source.of(self.documents).name if self.documents else ""

    def check_axis(self, inner_size: int) -> None:
        """Check that the axis is a pair where strategy and balancer need one; `inner_size` is 0 for a single axis.

        Raises:
            ConfigError: it is not.
        """
        from cpcompile.balance.layout import group_size, without_groups

        if self.strategy == "usp" and not inner_size:
            raise ConfigError(
                "strategy='usp' exchanges heads along one axis and computes ring attention along another: pass a mesh with both, "
                "and axis=('ring axis', 'ulysses axis') (inner_size=... for explain and verify)."
            )
        if group_size(self.balancer) not in (1, inner_size):
            raise ConfigError(
                f"balancer={self.balancer!r} is for {group_size(self.balancer)} ranks that exchange heads, and here are "
                f"{inner_size or 'none'}: use balancer={without_groups(self.balancer)!r}, which follows the mesh."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Config:
        """Build a config from keyword options; an unknown one is an error that lists the known ones and says which was meant."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            meant = "".join(did_you_mean(name, [*known, "axis", "mesh"]) for name in unknown)
            raise ConfigError(
                f"unknown option {', '.join(map(repr, unknown))}: the options are {', '.join(known)}.{meant}"
            )
        return cls(**options)
