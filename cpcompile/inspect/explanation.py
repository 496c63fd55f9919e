"""Explanation: the plan for a model as data, and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console

from cpcompile.balance.layout import follows_documents
from cpcompile.choose.machine import Machine
from cpcompile.choose.rates import BYTES, CPU
from cpcompile.compile.outputs import Output
from cpcompile.inspect.areas import matrices_of
from cpcompile.inspect.report import page
from cpcompile.inspect.step_time import StepTime
from cpcompile.inspect.text import size, sizes, table
from cpcompile.inspect.value_picture import value_picture
from cpcompile.inspect.visualize import Picture
from cpcompile.ir.folding import fold
from cpcompile.memory.ledger import KINDS, Ledger
from cpcompile.runtime.attention.workload import Workload


@dataclass(frozen=True, slots=True)
class Site:
    """One attention: where it is, what it is, and how it will be computed.

    Attributes:
        kernels: what computes its blocks; none where that is not known, for a model without memory.
        reasons: why none of the faster kernels, one line each.
        forward_bytes, backward_bytes: what the busiest rank sends in a step.
        pairs: for each rank, how many pairs of a query and a key it computes, over all its heads.
        kept_bytes: what a rank keeps from forward to backward; received_bytes: others' keys, or heads that it does not keep,
            that it holds at once.
        rounds_again: in how many rounds backward exchanges q, k, v and the output once more; 0: they are kept by heads, or never
            exchanged.
        workload: its sizes, and what is known of its mask; None where nothing is exchanged.
    """

    module: str
    line: str
    heads: int
    kv_heads: int
    head_dim: int
    mask: str
    strategy: str
    layout: str
    kernels: tuple[str, ...]
    reasons: tuple[str, ...]
    forward_bytes: int
    backward_bytes: int
    pairs: tuple[int, ...]
    kept_bytes: int
    received_bytes: int
    rounds_again: int = 0
    workload: Workload | None = None

    @property
    def imbalance(self) -> float:
        """The work of the busiest rank over the mean."""
        return max(self.pairs) * len(self.pairs) / sum(self.pairs) if any(self.pairs) else 1.0


@dataclass(frozen=True, slots=True)
class TokenLocal:
    """One call of a token-local module or function: where it is, and how many operators are placed as one."""

    module: str
    line: str
    operators: int


@dataclass(frozen=True, slots=True)
class WholeModule:
    """A part of the model that sees no tokens (an image encoder), which every rank runs whole.

    Attributes:
        inputs: what it is computed from, with shapes: the images.
        attentions: how many it has.
        flops: of its products, convolutions and attentions in a forward, on every rank.
    """

    module: str
    line: str
    inputs: Mapping[str, tuple[int, ...]]
    attentions: int
    flops: int


@dataclass(frozen=True, slots=True)
class ShardedInput:
    """Where whole values become this rank's tokens: the value, its shape, the dim, and the user's line."""

    value: str
    shape: tuple[int, ...]
    dim: int
    line: str


@dataclass(frozen=True, slots=True)
class GatheredValue:
    """A value that is made whole on every rank: its whole shape and bytes, what needs it, and the user's line."""

    value: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    line: str


@dataclass(frozen=True, slots=True)
class Collective:
    """All calls of one collective operator in a module, or in equal layers: how many, and the bytes that a rank sends in a step.

    Attributes:
        operator: as in the graph: `cp.ring_attention`.
        module: `model.layers.{0..31}.self_attn`; '' outside of modules.
        calls: how many there are.
        forward_bytes, backward_bytes: of all calls together.
    """

    operator: str
    module: str
    calls: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True, slots=True)
class PassRun:
    """A pass, or what runs behind them: how many places it changed, and how long it took."""

    name: str
    changes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """What ranks compute in a step.

    Attributes:
        products: for each rank, the floating-point operations of products and convolutions in a forward.
        attentions: those of attentions.
        seconds: what a training step takes at least at the rates of the machine: attention as it is estimated, and products in
            forward and backward. Norms, losses, the optimizer and sums of gradients are not in it.
        mfu: the share of the GPUs' peak that such a step reaches, where computing again counts as nothing; 0 where the peak is
            not known.
    """

    products: tuple[int, ...]
    attentions: tuple[int, ...]
    seconds: float
    mfu: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of a model on `world_size` ranks. `print` it, or read its fields; `to_dict` for JSON.

    Attributes:
        before, analysed, after: the graph as code: as it was captured, with its attentions found, and of every rank.
        graphs: the graph behind each pass that changed something, if it was asked for.
        program: the program of every rank as Python that torchrun starts, with random weights, if it was asked for.
        backward: the graph of backward as code, with the shapes that a rank has, if it was asked for; '' where there is none.
        estimates: seconds of all attentions of a step by layout and strategy, `zig_zag/ring`; what cannot be computed by the
            strategy has its cheapest one, `zig_zag/ring + halo`.
        taken: the one of these that the plan is.
        work: what ranks compute in a step.
        step: what a training step is estimated to take, by kind; None unless it was asked for with `memory`.
        rated_kernels: the kernels at whose rates the estimates are; on GPUs that are not here those of torch, and
            nvidia-cudnn-frontend for documents and windows.
    """

    world_size: int
    inner_size: int
    tokens: int
    local_tokens: int
    layout: str
    token_inputs: Mapping[str, int]
    sites: tuple[Site, ...]
    regions: tuple[TokenLocal, ...]
    whole: tuple[WholeModule, ...]
    inputs: tuple[ShardedInput, ...]
    outputs: tuple[Output, ...]
    gathered: tuple[GatheredValue, ...]
    collectives: tuple[Collective, ...]
    gradient_bytes: int
    estimates: Mapping[str, float]
    taken: str
    before: str
    after: str
    passes: tuple[PassRun, ...] = ()
    memory: Ledger | None = None
    analysed: str = ""
    machine: Machine | None = None
    rated_kernels: tuple[str, ...] = ()
    work: Work | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)
    backward: str = ""
    program: str = ""
    step: StepTime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return asdict(self) | ({} if self.step is None else {"step": self.step.to_dict()})

    def value(self, name: str) -> str:
        """Return which rank holds which tokens of a value, as a picture; `name` is that of the value in `after`.

        Raises:
            ConfigError: no value of the graph has this name.
        """
        return value_picture(name, self.after, self.tokens, self.world_size, self.layout)

    def in_brief(self) -> str:
        """Return the plan in a few words: `8 ranks, zig_zag, 32 x ring on cudnn`."""
        kinds = Counter(
            (site.strategy, f" on {', '.join(site.kernels)}" if site.kernels else "") for site in self.sites
        )
        attentions = [f"{count} x {strategy}{kernels}" for (strategy, kernels), count in kinds.items()]
        return ", ".join([f"{self.world_size} ranks", self.layout, *(attentions or ["no attention"])])

    def to_html(self, title: str = "") -> str:
        """Return a report as one HTML document: tables, pictures of masks, memory and rings, the graphs."""
        return page(self, title)

    def visualize(self, console: Console | None = None) -> None:
        """Print who computes which part of each attention, equal ones once."""
        console = console or Console()
        for (workload, strategy), site in {(s.workload, s.strategy): s for s in self.sites}.items():
            for matrix in () if workload is None else matrices_of(workload, strategy):
                console.print(f"{site.module}: {site.mask}, {strategy}", markup=False, highlight=False)
                console.print(Picture(matrix, self.world_size))

    def __str__(self) -> str:
        parts = [
            *self._head_lines(),
            "",
            *self._site_lines(),
            "",
            *self._region_lines(),
            *self._whole_lines(),
            "sharded where",
            *table(("value", "shape", "dim", "line"), [(i.value, sizes(i.shape), i.dim, i.line) for i in self.inputs]),
            "",
            "returned",
            *table(
                ("output", "whole shape", "a rank has", "line"),
                [(o.value, sizes(o.shape) or "a number", o.held, o.line) for o in self.outputs],
            ),
            "",
            *self._gathered_lines(),
            *self._collective_lines(),
            *self._estimate_lines(),
            *self._work_lines(),
            *([] if self.step is None else ["", str(self.step)]),
            *self._pass_lines(),
            *([] if self.memory is None else ["", *memory_lines(self.memory)]),
        ]
        return "\n".join(parts)

    def _head_lines(self) -> list[str]:
        named = ", ".join(f"{name} (dim {dim})" for name, dim in self.token_inputs.items())
        grid = f" ({self.world_size // self.inner_size} x {self.inner_size})" if self.inner_size else ""
        lines = [
            f"{self.tokens} tokens on {self.world_size} ranks{grid}, {self.local_tokens} slots each, layout {self.layout}; "
            f"tokens of {named or 'the attentions, which no input holds'}"
        ]
        if follows_documents(self.layout):
            lines.append(
                "the layout follows the documents of each batch; what is said of work here is that of one document"
            )
        return lines

    def _site_lines(self) -> list[str]:
        head = ("module", "line", "heads", "kv", "dim", "mask", "strategy", "kernel", "work", "forward", "backward")
        rows = [
            (
                *(path, s.line, s.heads, s.kv_heads, s.head_dim, s.mask, s.strategy, ", ".join(s.kernels) or "-"),
                *(f"{s.imbalance:.2f}", size(s.forward_bytes), size(s.backward_bytes)),
            )
            for path, (s, *_) in fold(self.sites, lambda site: site.module, lambda site: replace(site, module=""))
        ]
        if not rows:
            return ["no attention"]
        title = (
            f"{len(self.sites)} attention(s): the work of the busiest rank over the mean, bytes that it sends in a step"
        )
        kept, received = sum(s.kept_bytes for s in self.sites), max(s.received_bytes for s in self.sites)
        return [
            title,
            *table(head, rows),
            *self._kernel_lines(),
            f"a rank keeps {size(kept)} of all attentions for backward, and holds at most {size(received)} of other ranks' keys "
            "and heads at once",
            *self._again_lines(),
        ]

    def _again_lines(self) -> list[str]:
        """Return which attentions keep nothing by heads."""
        again = [s.rounds_again for s in self.sites if s.rounds_again]
        if not again:
            return []
        rounds = " or ".join(map(str, sorted(set(again))))
        return [
            f"{len(again)} attention(s) keep nothing by heads: backward exchanges q, k, v and the output once more, in {rounds} "
            "round(s)"
        ]

    def _kernel_lines(self) -> list[str]:
        """Return which faster kernels cannot be used, and why."""
        found: dict[str, None] = dict.fromkeys(
            f"{', '.join(s.kernels)}: {'; '.join(s.reasons)}" for s in self.sites if s.reasons
        )
        return ["why no faster kernel", *(f"  {text}" for text in found)] if found else []

    def _region_lines(self) -> list[str]:
        if not self.regions:
            return []
        rows = [
            (path, r.line, r.operators)
            for path, (r, *_) in fold(
                self.regions, lambda region: region.module, lambda region: (region.line, region.operators)
            )
        ]
        return [f"{len(self.regions)} token-local region(s)", *table(("module", "line", "operators"), rows), ""]

    def _whole_lines(self) -> list[str]:
        if not self.whole:
            return []
        rows = [
            (
                m.module,
                m.line,
                ", ".join(f"{name} {list(shape)}" for name, shape in m.inputs.items()),
                m.attentions,
                f"{m.flops:.2g}",
            )
            for m in self.whole
        ]
        title = f"{len(rows)} module(s) that see no tokens run whole on every rank"
        return [title, *table(("module", "line", "computed from", "attentions", "flops"), rows), ""]

    def _gathered_lines(self) -> list[str]:
        if not self.gathered:
            return []
        rows = [(g.value, sizes(g.shape), size(g.nbytes), g.reason, g.line) for g in self.gathered]
        return ["gathered on every rank", *table(("value", "shape", "bytes", "because", "line"), rows), ""]

    def _collective_lines(self) -> list[str]:
        rows = [
            (c.operator, c.module or "-", c.calls, size(c.forward_bytes), size(c.backward_bytes))
            for c in self.collectives
        ]
        of_parameters = ("gradient sum of parameters", "-", "", "", size(self.gradient_bytes))
        head = ("operator", "module", "calls", "forward", "backward")
        return ["collectives of a step, bytes that one rank sends", *table(head, [*rows, of_parameters])]

    def _estimate_lines(self) -> list[str]:
        if not self.estimates:
            return []
        least = self.estimates[self.taken]
        rows = [
            (*key.split("/"), f"{seconds * 1e3:.3g}", "taken" if key == self.taken else margin(seconds, least))
            for key, seconds in sorted(self.estimates.items(), key=lambda item: item[1])
        ]
        title = "estimated attention time of a step, slowest rank"
        return ["", title, *table(("layout", "strategy", "ms", ""), rows), *rates(self.machine, self.rated_kernels)]

    def _work_lines(self) -> list[str]:
        if self.work is None:
            return []
        products, attentions = self.work.products, self.work.attentions
        share = f", {self.work.mfu:.0%} of the peak (MFU) at most" if self.work.mfu else ""
        return [
            "",
            f"work of the busiest rank in a forward: {max(products):.3g} FLOPs of products, {max(attentions):.3g} of attention",
            f"work of all ranks: {sum(products):.3g} and {sum(attentions):.3g}",
            f"a training step takes at least {self.work.seconds * 1e3:.3g} ms{share}",
            "(attention as estimated, and products in forward and backward, without norms, losses, optimizer and gradient sums)",
        ]

    def _pass_lines(self) -> list[str]:
        """Return the passes that changed something."""
        rows = [(each.name, each.changes, f"{each.seconds * 1e3:.3g}") for each in self.passes if each.changes]
        return ["", "passes that changed the graph", *table(("pass", "places", "ms"), rows)] if rows else []


def memory_lines(ledger: Ledger) -> list[str]:
    """Return what a step holds on a rank, a column for each phase."""
    kinds = [kind for kind in KINDS if any(kind in phase.held for phase in ledger.phases)]
    rows = [
        (kind, *(size(phase.held[kind]) if kind in phase.held else "" for phase in ledger.phases)) for kind in kinds
    ]
    total = ("at the peak", *(size(phase.total) for phase in ledger.phases))
    lines = ("line", *(phase.place for phase in ledger.phases))
    head = ("kind", *(phase.name for phase in ledger.phases))
    text = [f"predicted memory of a rank: {size(ledger.peak)} at most", *table(head, [*rows, total, lines])]
    return [*text, f"  and in host memory, from forward to backward: {size(ledger.host)}"] if ledger.host else text


def margin(seconds: float, least: float) -> str:
    """Return in words how much more time something takes than what takes `least`."""
    if not least:
        return ""
    more = seconds / least - 1
    return f"{more:.0%} more" if more >= 0.005 else "as much" if more > -0.005 else f"{-more:.0%} less"


def rates(machine: Machine | None, kernels: Sequence[str]) -> list[str]:
    """Return what the estimates assume, the rates of the kernels included."""
    if machine is None:
        return [f"(on CPUs, at {CPU[0] / 1e9:.0f} GFLOP/s and {BYTES['cpu'] / 1e9:.0f} GB/s between them)"]
    of_kernels = [
        f"{forward / 1e12:.0f} TFLOP/s forward and {backward / 1e12:.0f} backward with {name}"
        for name in kernels
        for forward, backward in [machine.rates(name)]
    ]
    return [
        f"(on {machine.name}, {machine.ranks_of_host} of a host: {', '.join(of_kernels)},",
        f" {machine.symmetric / 1e9:.0f} GB/s between GPUs of a host, {machine.network / 1e9:.0f} beyond; {machine.source})",
    ]
