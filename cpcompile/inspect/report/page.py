"""Page: the parts of the report in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpcompile.inspect.report.attention import pictures, site_groups
from cpcompile.inspect.report.elements import Markup, element, figure, join, legend, table
from cpcompile.inspect.report.graphs import graphs
from cpcompile.inspect.report.pictures import kind_color, memory_picture
from cpcompile.inspect.report.style import SCRIPT, STYLE
from cpcompile.inspect.text import duration, size, sizes
from cpcompile.memory.ledger import KINDS, Ledger

if TYPE_CHECKING:
    from cpcompile.inspect.explanation import Explanation, Site
    from cpcompile.inspect.step_time import StepTime

BYTES = ("sent forward", "backward", "kept", "received")  # of an attention


def page(plan: Explanation, title: str = "") -> str:
    """Return the report of a plan as an HTML document; `title` is what it is called, of the model."""
    name = title or "a model"
    parts = {
        "attention": ("Attention", attention_table(plan)),
        "masks": ("Who computes what", pictures(plan.sites, plan.machine)),
        "memory": ("Memory", memory(plan.memory)),
        "time": ("Time", time_of(plan.step)),
        "messages": ("Messages", messages(plan)),
        "tokens": ("Tokens", tokens(plan)),
        "passes": ("Passes", passes(plan)),
        "graphs": ("Graph", graphs(stages(plan))),
    }
    links = [element("a", head, href=f"#{key}") for key, (head, _) in parts.items()]
    body = [element("section", element("h2", head), part, id=key) for key, (head, part) in parts.items()]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Plan of {name}"),
        element("style", STYLE),
    )
    top = element("header", element("h1", f"Plan of {name}"), summary(plan), element("nav", *links))
    content = element("body", top, element("main", *body, element("footer", "Made by cpcompile.")))
    return f"<!DOCTYPE html>\n{element('html', head, content, element('script', SCRIPT), lang='en')}\n"


def summary(plan: Explanation) -> Markup:
    """Return the plan in a few numbers."""
    grid = f" in {plan.world_size // plan.inner_size} x {plan.inner_size}" if plan.inner_size else ""
    named = ", ".join(f"{name} (dim {dim})" for name, dim in plan.token_inputs.items())
    sent = plan.gradient_bytes + sum(each.forward_bytes + each.backward_bytes for each in plan.collectives)
    strategies = ", ".join(dict.fromkeys(site.strategy for site in plan.sites)) or "none"
    imbalance = max((site.imbalance for site in plan.sites), default=1.0)
    cards = [
        ("tokens", str(plan.tokens), f"of {named}" if named else "that the model makes"),
        ("ranks", f"{plan.world_size}{grid}", f"{plan.local_tokens} slots each"),
        ("layout", plan.layout, "which tokens a rank holds"),
        (f"{len(plan.sites)} attention(s)", strategies, f"busiest rank over the mean: {imbalance:.2f}"),
        ("a rank sends in a step", size(sent), "gradients included"),
    ]
    if plan.step is not None:
        share = f", {plan.step.mfu:.0%} of the peak (MFU)" if plan.step.mfu else ""
        speed = f"estimated; {plan.step.tokens_per_second:.4g} tokens/s of each GPU{share}"
        cards.append(("a step takes", duration(plan.step.total), speed))
    elif plan.work is not None:
        share = f"{plan.work.mfu:.0%} of the peak (MFU) at most" if plan.work.mfu else "attention and products"
        cards.append(("a step takes at least", duration(plan.work.seconds), share))
    if plan.memory is not None:
        cards.append(("peak memory of a rank", size(plan.memory.peak), "predicted"))
    return element(
        "dl",
        *(
            element("div", element("dt", head), element("dd", value, element("small", note)))
            for head, value, note in cards
        ),
        class_="cards",
    )


def attention_table(plan: Explanation) -> Markup:
    """Return a line for each attention, equal layers as one."""
    head = ("module", "layers", "heads", "key heads", "dim", "mask", "strategy", "kernel", "work", *BYTES)
    rows = [site_row(path, group) for path, group in site_groups(plan.sites)]
    reasons = dict.fromkeys(f"{', '.join(s.kernels)}: {'; '.join(s.reasons)}" for s in plan.sites if s.reasons)
    again = sum(1 for site in plan.sites if site.rounds_again)
    notes = [f"No faster kernel: {reason}." for reason in reasons]
    if again:
        notes.append(
            f"{again} attention(s) keep nothing by heads: backward exchanges q, k, v and the output once more."
        )
    told = (
        "Work is that of the busiest rank over the mean; sent is what that rank sends in a step for one attention, kept what it "
        "keeps for backward, received what it holds of others at once."
    )
    return join([element("p", told), table(head, rows), *(element("p", note) for note in notes)])


def site_row(path: str, group: list[Site]) -> tuple[object, ...]:
    """Return equal attentions as cells."""
    site = group[0]
    numbers = (site.heads, site.kv_heads, site.head_dim)
    moved = (site.forward_bytes, site.backward_bytes, site.kept_bytes, site.received_bytes)
    kernels = ", ".join(site.kernels) or "-"
    told = (site.mask, site.strategy, kernels, f"{site.imbalance:.2f}")
    name = join([path or "the model itself", element("small", site.line)])
    return (name, len(group), *numbers, *told, *map(size, moved))


def memory(ledger: Ledger | None) -> Markup:
    """Return what a rank holds, by phase and kind."""
    if ledger is None:
        return element("p", "Not predicted: explain with memory=True.")
    kinds = [kind for kind in KINDS if any(kind in phase.held for phase in ledger.phases)]
    rows = [(kind, *(size(phase.held.get(kind, 0)) for phase in ledger.phases)) for kind in kinds]
    total = ("at the peak", *(size(phase.total) for phase in ledger.phases))
    peaks = "; ".join(f"that of {phase.name} is at {phase.place}" for phase in ledger.phases if phase.place)
    caption = f"What a rank holds at the peak of each phase of a training step, predicted; {peaks}."
    picture = element("div", memory_picture(ledger), class_="wide", tabindex=0)
    host = [element("p", f"In host memory, from forward to backward: {size(ledger.host)}.")] if ledger.host else []
    colors = legend((kind_color(kind), kind) for kind in kinds)
    numbers = table(("kind", *(phase.name for phase in ledger.phases)), [*rows, total])
    return join([colors, figure(picture, caption), numbers, *host])


def time_of(step: StepTime | None) -> Markup:
    """Return what a training step takes, by kind."""
    if step is None:
        return element("p", "Not estimated: explain with memory=True, of a model that is trained.")
    told = (
        f"Estimated, of the slowest rank: {duration(step.total)} in all. Computation hides {duration(step.hidden)} of messages "
        "of parameters and gradients."
    )
    return join([element("p", told), table(("kind", "time", "share", "of"), step.rows)])


def messages(plan: Explanation) -> Markup:
    """Return what travels, and what attention was estimated to take by layout and strategy."""
    rows = [
        (c.operator, c.module or "-", c.calls, size(c.forward_bytes), size(c.backward_bytes)) for c in plan.collectives
    ]
    rows.append(("gradient sum of parameters", "-", 1, size(0), size(plan.gradient_bytes)))
    told = element("p", "Bytes that one rank sends in a step, all calls together.")
    parts = [told, table(("operator", "module", "calls", "forward", "backward"), rows)]
    if plan.estimates:
        costs = sorted(plan.estimates.items(), key=lambda item: item[1])
        parts += [
            element("h3", "Estimated attention time of a step, slowest rank, fastest first"),
            table(
                ("layout", "strategy", "time", ""),
                [(*key.split("/"), duration(cost), "taken" if key == plan.taken else "") for key, cost in costs],
            ),
        ]
    return join(parts)


def tokens(plan: Explanation) -> Markup:
    """Return where values are sharded, returned, made whole, or whole all the time."""
    parts = listed(
        "Sharded where",
        ("value", "shape", "dim", "line"),
        [(i.value, sizes(i.shape), i.dim, i.line) for i in plan.inputs],
    )
    parts += listed(
        "Returned",
        ("output", "whole shape", "a rank has", "line"),
        [(o.value, sizes(o.shape) or "a number", o.held, o.line) for o in plan.outputs],
    )
    parts += listed(
        "Gathered on every rank",
        ("value", "shape", "bytes", "because", "line"),
        [(g.value, sizes(g.shape), size(g.nbytes), g.reason, g.line) for g in plan.gathered],
    )
    if not plan.gathered:
        parts.append(element("p", "No value is gathered on every rank."))
    parts += listed(
        "Token-local regions",
        ("module", "line", "operators"),
        [(r.module, r.line, r.operators) for r in plan.regions],
    )
    parts += listed(
        "Modules that see no tokens, whole on every rank",
        ("module", "line", "computed from", "attentions", "flops"),
        [
            (m.module, m.line, ", ".join(f"{k} {list(v)}" for k, v in m.inputs.items()), m.attentions, f"{m.flops:.2g}")
            for m in plan.whole
        ],
    )
    return join(parts)


def listed(title: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[Markup]:
    """Return a table under its title, equal lines of several layers as they are; nothing without lines."""
    return [element("h3", title), table(head, rows)] if rows else []


def passes(plan: Explanation) -> Markup:
    """Return what each pass changed."""
    rows = [(run.name, run.changes, duration(run.seconds)) for run in plan.passes if run.changes]
    others = [run.name for run in plan.passes if not run.changes]
    note = [element("p", f"These found nothing to change: {', '.join(others)}.")] if others else []
    return join([table(("pass", "places", "time"), rows), *note])


def stages(plan: Explanation) -> dict[str, str]:
    """Return the graph before and after the passes, and between: behind each pass, or where the attentions were found.

    A pass that only notes what it decided leaves the code as it is, and is left out.
    """
    places = {run.name: run.changes for run in plan.passes}
    codes = [plan.before, *plan.graphs.values()]
    behind = {
        f"{name}: {places[name]} place(s)": code
        for (name, code), old in zip(plan.graphs.items(), codes, strict=False)
        if code != old
    }
    return {
        "before: the model on one device": plan.before,
        **(behind or {"attention found: still on one device": plan.analysed}),
        "after: the program of every rank": plan.after,
    }
