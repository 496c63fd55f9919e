"""What scaling.py measures, in which order of importance, how long that takes, and what the cost model predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from attention_cases import Case, case_of, document_bounds, usp_layout
from attention_own import site_of

from cpcompile.choose import attention, choice, rates
from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.choice import choose
from cpcompile.choose.cost import device_seconds, host_seconds, seconds

Row = dict[str, Any]

# Cases, the most important first, and by how much their rows are less important than those of the first.
CASES = {
    "causal_8k_a_gpu": 0,
    "causal_128k": 0,
    "packed_64k_random_16": 0,
    "window_4k_of_64k": 0,
    "causal_64k": 1,
    "packed_8k_a_gpu": 1,
}
ESSENTIAL, USEFUL, EXTRA = 0, 1, 2
AHEAD = 5e-3  # seconds that the host is ahead when a measured step begins, see attention_timing.py
# Kernels that the limit is the fastest of. FlashAttention 2, on which peers run, is what those are compared with as well.
LIMITS = {
    "causal": {"cudnn": ESSENTIAL, "fa2": USEFUL},
    "packed": {
        "cudnn_varlen": ESSENTIAL,
        "cudnn per document": ESSENTIAL,
        "cudnn from 1/32": ESSENTIAL,
        "cudnn from 1/8": USEFUL,
        "fa2 varlen": USEFUL,
    },
    "window": {"cudnn_varlen": ESSENTIAL, "triton": USEFUL, "fa2": EXTRA},
}
OURS = {
    "causal": {"ring/zig_zag": ESSENTIAL, "ulysses/contiguous": ESSENTIAL, "gather/zig_zag": ESSENTIAL},
    "packed": {
        "ring/balanced": ESSENTIAL,
        "gather/balanced": ESSENTIAL,
        "ulysses/contiguous": ESSENTIAL,
        "ring/zig_zag": USEFUL,
        "gather/zig_zag": EXTRA,
    },
    "window": {
        "halo/contiguous": ESSENTIAL,
        "ring/contiguous": ESSENTIAL,
        "ulysses/contiguous": ESSENTIAL,
        "gather/zig_zag": USEFUL,
        "halo/zig_zag": EXTRA,
    },
}
PEERS = {  # and how many times as long as the limit they take, for the plan
    "causal": {
        "ring-flash-attn/zigzag_ring_flash_attn/zig_zag/fa2": (USEFUL, 2.0),
        "ring-flash-attn/llama3_flash_attn_varlen stride 4/contiguous/fa2": (USEFUL, 3.5),
        "ringmaster/ulysses none/contiguous/cudnn": (USEFUL, 1.5),
        "yunchang/ulysses/contiguous/fa2": (EXTRA, 2.0),
        "torch context_parallel/ring allgather/zig_zag/cudnn": (EXTRA, 2.0),
    },
    "packed": {
        "ring-flash-attn/llama3_flash_attn_varlen stride 4/contiguous/fa2": (USEFUL, 4.0),
        "ring-flash-attn/zigzag_ring_flash_attn_varlen/zig_zag_by_document/fa2": (USEFUL, 4.0),
        "ringmaster/ulysses none/contiguous/fa2": (EXTRA, 3.0),
    },
    "window": {
        "ring-flash-attn/llama3_flash_attn_varlen stride 4/contiguous/fa2": (USEFUL, 2.0),
        "ringmaster/ulysses none/contiguous/fa2": (EXTRA, 2.0),
    },
}
# Seconds, for the plan: of an attention run before its first row, of a row besides its steps, of a training run before its first
# step, of compiling it.
START, ROW, TRAIN_START, COMPILE = 35.0, 1.6, 25.0, 45.0
STEPS, STEPS_OF_LONG, LONG_MS = 9, 7, 600.0  # that a row runs, as attention_timing.py does
FLASH2_TIMES = 1.75  # as long as cuDNN takes

# Llama 3.2 1B: the weights that tokens are multiplied by, and its attentions.
WEIGHTS, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 1_235_746_816, 16, 32, 8, 64
# FLOP/s of all but the attentions: what remains of a step (no optimizer) of 32k tokens on two H100 in results/train_step.json.
REST = 380e12


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the attention benchmark: importance counts from 0, the most important; `seconds` is what it takes to measure."""

    case: str
    key: str
    importance: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Length:
    """A training step of so many tokens."""

    tokens: int
    importance: int


def kernel_seconds(case: Case) -> float:
    """Return what the cost model says of the whole case on one GPU."""
    return seconds_of(case, 1, "ring", "contiguous")


def seconds_of(case: Case, ranks: int, strategy: str, layout: str) -> float:
    """Return what the cost model says of a measured step, where the host has a start.

    The model takes documents for one: here its estimate of the device is multiplied by their part of the area.
    """
    name, _, shape = strategy.partition(" ")
    inner = int(shape.split("x")[1]) if shape else 0
    site = site_of(case.length, case.window, bool(case.documents), case.kernel, "cuda")
    on = site, name, layout, Ranks(ranks, inner)
    return max(device_seconds(*on) * area_of(case, ranks), host_seconds(*on) - AHEAD)


def area_of(case: Case, ranks: int) -> float:
    """Return the squares of the documents over that of all tokens."""
    if not case.documents:
        return 1.0
    bounds = document_bounds(case.documents, case.length, ranks)
    return sum((end - start) ** 2 for start, end in pairwise(bounds)) / case.length**2


def pick_of(case: Case, ranks: int) -> tuple[str, str]:
    """Return what `auto` takes on ranks that are no grid."""
    site = site_of(case.length, case.window, bool(case.documents), case.kernel, "cuda")
    choice = choose([site], "auto", "auto", Ranks(ranks))
    return choice.strategies[0], choice.layout


def grids(ranks: int) -> list[str]:
    """Return the shapes for usp, ring x heads: 2x2 of 4 ranks; 2x4 and 4x2 of 8."""
    return [f"{ranks // inner}x{inner}" for inner in (4, 2) if ranks % inner == 0 and ranks > inner]


def items_of(ranks: int, device: str, peers: bool) -> list[Item]:
    """Return the rows for so many ranks, the most important first; with one rank all strategies are one call of a kernel."""
    found = []
    for case, less in cases_of(ranks).items():
        name = case.name
        whole = 1e3 * kernel_seconds(case)
        limits = LIMITS[case.kind] if device == "cuda" else {"cpu": ESSENTIAL}
        for kernel, importance in limits.items():
            took = whole * (FLASH2_TIMES if kernel.startswith("fa2") and not case.window else 1)
            found.append(Item(name, f"one GPU/limit/whole/{kernel}", importance + less, row_seconds(took)))
        for plan, importance in plans_of(case, ranks).items():
            took = 1e3 * seconds_of(case, ranks, *plan.split("/"))
            found.append(Item(name, f"cpcompile/{plan}/auto", importance + less, row_seconds(took)))
        for key, (importance, times) in PEERS[case.kind].items() if peers and ranks > 1 else ():
            found.append(Item(name, key, importance + less, row_seconds(times * whole / ranks)))
    return sorted(found, key=lambda item: item.importance)


def cases_of(ranks: int) -> dict[Case, int]:
    """Return the cases, without those that are another one at so many ranks."""
    found: dict[tuple[Any, ...], tuple[Case, int]] = {}
    for name, less in CASES.items():
        case = case_of(name, ranks)
        found.setdefault((case.kind, case.length, case.documents, case.window), (case, less))
    return dict(found.values())


def plans_of(case: Case, ranks: int) -> dict[str, int]:
    """Return strategy/layout of this project's rows, and their importance; what `auto` takes is among them."""
    if ranks == 1:
        return {next(iter(OURS[case.kind])): ESSENTIAL}
    plans = dict(OURS[case.kind])
    if case.kind != "window":
        for shape in grids(ranks):
            plans[f"usp {shape}/{usp_layout(bool(case.documents), int(shape.partition('x')[2]))}"] = ESSENTIAL
    return plans | {"/".join(pick_of(case, ranks)): ESSENTIAL}


def row_seconds(step_ms: float) -> float:
    """Return how long a row takes."""
    return ROW + step_ms / 1e3 * (STEPS if step_ms < LONG_MS else STEPS_OF_LONG)


@dataclass
class Job:
    """One process to start on some GPUs: the attentions of so many ranks, or training steps."""

    kind: str
    ranks: int
    items: list[Item] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A name for the log."""
        return f"{self.kind} on {self.ranks}"

    @property
    def seconds(self) -> float:
        """How long it takes."""
        if self.kind == "attention":
            return START + sum(item.seconds for item in self.items) if self.items else 0.0
        steps = sum(7 * train_seconds(self.ranks, length.tokens) for length in self.lengths)
        return steps + len(self.lengths) * (TRAIN_START + COMPILE)

    @property
    def least(self) -> int:
        """The importance of the least important part, -1 where there is none."""
        return max([x.importance for x in self.items] + [x.importance for x in self.lengths], default=-1)

    def leave_out(self) -> str:
        """Remove the last of the least important parts; return what it was."""
        least = self.least
        length = next((x for x in reversed(self.lengths) if x.importance == least), None)
        if length is not None:
            self.lengths.remove(length)
            return f"{self.ranks} ranks: training step of {length.tokens} tokens"
        item = next(x for x in reversed(self.items) if x.importance == least)
        self.items.remove(item)
        return f"{self.ranks} ranks: {item.case} {item.key}"


@dataclass
class Lane:
    """Jobs that follow each other on the same GPUs."""

    ranks: int
    jobs: list[Job]

    @property
    def seconds(self) -> float:
        """How long they take."""
        return sum(job.seconds for job in self.jobs)


@dataclass
class Schedule:
    """Waves of lanes: lanes of a wave run side by side on GPUs of their own."""

    waves: list[list[Lane]]
    left_out: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long everything takes."""
        return sum(max(lane.seconds for lane in wave) for wave in self.waves)

    def fit(self, budget: float) -> None:
        """Leave out what matters least, where it costs time, until the estimate is within the budget."""
        while self.seconds > budget:
            slowest = [max(wave, key=lambda lane: lane.seconds) for wave in self.waves]
            job = max((job for lane in slowest for job in lane.jobs), key=lambda job: (job.least, -job.ranks))
            if job.least <= 0:
                break
            self.left_out.append(job.leave_out())


def schedule(jobs: dict[int, list[Job]], gpus: int) -> Schedule:
    """Put the jobs of each number of ranks on GPUs, most ranks first; fewer ranks share a wave, and take what is left of it."""
    waves: list[list[Lane]] = []
    for ranks in sorted(jobs, reverse=True):
        lane = Lane(ranks, jobs[ranks])
        wave = next((wave for wave in waves if sum(other.ranks for other in wave) + ranks <= gpus), None)
        if wave is None:
            waves.append([lane])
        else:
            wave.append(lane)
    for wave in waves:
        lane = wave[-1]  # of the fewest ranks
        if len(lane.jobs) > 1 and sum(other.ranks for other in wave) + lane.ranks <= gpus:
            wave.append(Lane(lane.ranks, [lane.jobs.pop()]))
    return Schedule(waves)


# The training step


def train_flops(tokens: int) -> float:
    """Return the model FLOPs of a training step of one sequence; what a kernel computes again is not counted."""
    return 6.0 * WEIGHTS * tokens + 6.0 * tokens**2 * HEADS * HEAD_DIM * LAYERS


def train_site(tokens: int) -> AttentionSite:
    """Return one attention of the model."""
    return AttentionSite(1, HEADS, KV_HEADS, tokens, HEAD_DIM, HEAD_DIM, 2, "cuda", True, 0, False)


def train_pick(ranks: int, tokens: int) -> tuple[str, str]:
    """Return what `auto` takes for the model."""
    choice = choose([train_site(tokens)], "auto", "auto", Ranks(ranks))
    return choice.strategies[0], choice.layout


def train_seconds(ranks: int, tokens: int) -> float:
    """Return the predicted seconds of a step: attentions by the cost model, the rest at the rate that was once measured."""
    strategy, layout = train_pick(ranks, tokens)
    attentions = LAYERS * seconds(train_site(tokens), strategy, layout, Ranks(ranks))
    return attentions + 6.0 * WEIGHTS * tokens / ranks / REST


# Predictions


def prediction(name: str, ranks: int, key: str) -> Row:
    """Return what the cost model says of one of this project's rows on H100, and what part of the limit that is."""
    _, strategy, layout, _ = key.split("/", 3)
    case = case_of(name, ranks)
    limit = kernel_seconds(case) / ranks
    found = seconds_of(case, ranks, strategy, layout)
    return {
        "predicted_ms": round(found * 1e3, 4),
        "predicted_limit_ms": round(limit * 1e3, 4),
        "predicted_percent": round(100 * limit / found, 2),
    }


def constants() -> Row:
    """Return what the predictions were made from."""
    known = {
        name: value
        for name, value in (vars(attention) | vars(rates) | vars(choice)).items()
        if name.isupper() and not name.startswith("_")
    }
    return {name: value for name, value in known.items() if isinstance(value, int | float | tuple | dict)} | {
        "REST": REST
    }
