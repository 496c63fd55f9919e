"""Pictures: the attention matrix by ranks, the work of each, a step of the ring and memory by kind, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpcompile.inspect.areas import Matrix
from cpcompile.inspect.colors import color_of
from cpcompile.inspect.report.elements import Markup, element, svg
from cpcompile.inspect.ring_step import Interval, Lane
from cpcompile.inspect.text import duration, short, size
from cpcompile.memory.ledger import KINDS, Ledger

SIDE, MARGIN = 300, 22  # of a matrix
BAR, LABEL = 16, 60  # height of a bar, and room for what stands left of it
WIDE = 760  # of pictures along the time
MOST_NUMBERED = 16  # runs of tokens that are named by their rank


def text(x: float, y: float, content: object, *, anchor: str = "start", class_: str = "") -> Markup:
    """Return a line of text; y is that of its middle."""
    given = {"class_": class_} if class_ else {}
    return element("text", content, x=float(x), y=float(y), text_anchor=anchor, dominant_baseline="central", **given)


def box(x: float, y: float, width: float, height: float, title: str, **given: str) -> Markup:
    """Return a rectangle that says its title when it is pointed at, and can be seen however short it is."""
    inside = (element("title", title),) if title else ()
    return element("rect", *inside, x=float(x), y=float(y), width=float(max(width, 1)), height=float(height), **given)


def matrix_picture(matrix: Matrix, world_size: int) -> Markup:
    """Return who computes which part: queries down, keys across, a colour for each rank."""
    scale = SIDE / matrix.length
    parts = [
        text(MARGIN + SIDE / 2, MARGIN / 2, "keys", anchor="middle", class_="quiet"),
        box(MARGIN, MARGIN, SIDE, SIDE, "", class_="empty"),
    ]
    for area in matrix.areas:
        points = " ".join(f"{MARGIN + x * scale:.6g},{MARGIN + y * scale:.6g}" for x, y in area.corners)
        rows, columns = area.piece.rows, area.piece.columns
        title = (
            f"rank {area.rank}: queries {rows.position} to {rows.end - 1}, keys {columns.position} to {columns.end - 1}, "
            f"{area.pairs} pairs"
        )
        color = color_of(area.rank, world_size)  # the stroke hides seams between neighbours
        parts.append(element("polygon", element("title", title), points=points, fill=color, stroke=color))
    runs = [(rank, span) for rank, spans in matrix.rows.items() for span in spans]
    if len(runs) <= MOST_NUMBERED:
        middles = [(rank, MARGIN + (span.position + span.size / 2) * scale) for rank, span in runs]
        parts += [text(MARGIN - 5, y, rank, anchor="end") for rank, y in middles]
    else:
        parts.append(text(0, MARGIN / 2, "queries", class_="quiet"))
    parts.append(box(MARGIN, MARGIN, SIDE, SIDE, "", class_="edge"))
    return svg(SIDE + MARGIN + 4, SIDE + MARGIN + 4, *parts, label=f"attention matrix by ranks: {matrix.title}")


def work_picture(work: Mapping[int, int], world_size: int) -> Markup:
    """Return a bar for each rank: the pairs that it computes, and the mean as a line."""
    longest = max(*work.values(), 1)
    room = SIDE - LABEL - 50
    height = len(work) * (BAR + 4)
    mean = LABEL + room * sum(work.values()) / len(work) / longest
    bars, labels = [], []
    for line, (rank, count) in enumerate(sorted(work.items())):
        y, width = line * (BAR + 4), room * count / longest
        bars.append(box(LABEL, y, width, BAR, f"rank {rank}: {count} pairs", fill=color_of(rank, world_size)))
        labels.append(text(LABEL - 6, y + BAR / 2, f"rank {rank}", anchor="end"))
        labels.append(text(LABEL + 6 + width, y + BAR / 2, short(count), class_="quiet over"))
    line_of_mean = element("path", d=f"M{mean:.6g} 0V{height}", stroke="currentColor", stroke_dasharray="3 3")
    parts = [*bars, line_of_mean, *labels]
    return svg(SIDE + MARGIN, height, *parts, label="pairs that each rank computes; dashed: the mean")


def ring_picture(lanes: Sequence[Lane]) -> Markup:
    """Return the time of a ring: for each place what it computes with, and below what arrives meanwhile."""
    count = len(lanes)
    end = max(lane.end for lane in lanes) or 1.0
    scale, thin = (WIDE - LABEL - 10) / end, 8
    pitch = BAR + thin + 10
    parts = []
    for line, lane in enumerate(lanes):
        y = line * pitch
        ranks = f"{lane.ranks[0]}" if len(lane.ranks) == 1 else f"{lane.ranks[0]}-{lane.ranks[-1]}"
        parts.append(text(LABEL - 6, y + BAR / 2, f"rank {ranks}", anchor="end"))
        for interval in lane.computes:
            x, width = LABEL + interval.start * scale, (interval.end - interval.start) * scale
            title = f"{period(interval)}: {short(interval.pairs)} pairs with the keys of place {interval.source}"
            parts.append(box(x, y, width - 1, BAR, title, fill=color_of(interval.source, count), rx="2"))
            if width > 24:
                parts.append(text(x + width / 2, y + BAR / 2, f"k{interval.source}", anchor="middle", class_="inside"))
        for interval in filter(lambda found: found.nbytes, lane.arrives):
            x, width = LABEL + interval.start * scale, (interval.end - interval.start) * scale
            title = f"{period(interval)}: {size(interval.nbytes)} of the keys of place {interval.source} arrive"
            color = color_of(interval.source, count)
            parts.append(
                box(x, y + BAR + 2, width - 1, thin, title, fill=color, fill_opacity="0.35", stroke=color, rx="2")
            )
    bottom = count * pitch
    parts += [
        element("path", d=f"M{LABEL} {bottom}H{WIDE - 10}", stroke="currentColor", stroke_opacity="0.4"),
        text(LABEL, bottom + 10, "0", class_="quiet"),
        text(WIDE - 10, bottom + 10, duration(end), anchor="end", class_="quiet"),
    ]
    return svg(WIDE, bottom + 22, *parts, label="a step of the ring: what each rank computes with and what arrives")


def period(interval: Interval) -> str:
    """Return when something happens."""
    return f"{duration(interval.start)} to {duration(interval.end)}"


def memory_picture(ledger: Ledger) -> Markup:
    """Return a bar for each phase, made of the kinds that are held."""
    scale = (WIDE - LABEL - 90) / max(ledger.peak, 1)
    tall = 24
    parts = []
    for line, phase in enumerate(ledger.phases):
        x, y = float(LABEL), line * (tall + 8)
        parts.append(text(LABEL - 6, y + tall / 2, phase.name, anchor="end"))
        for kind in KINDS:
            count = phase.held.get(kind, 0)
            if count:
                parts.append(box(x, y, count * scale, tall, f"{kind}: {size(count)}", fill=kind_color(kind)))
            x += count * scale
        parts.append(text(x + 6, y + tall / 2, size(phase.total)))
    return svg(
        WIDE, len(ledger.phases) * (tall + 8), *parts, label="memory of a rank at the peak of each phase, by kind"
    )


def kind_color(kind: str) -> str:
    """Return the colour of a kind of memory."""
    return color_of(KINDS.index(kind), len(KINDS))
