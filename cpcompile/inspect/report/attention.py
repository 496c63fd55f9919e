"""Attention: who computes which part of each mask, before and after balancing, and the steps of rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cpcompile.balance.layout import follows_documents
from cpcompile.choose.machine import Machine
from cpcompile.inspect.areas import Matrix, by_own_rows, matrices_of
from cpcompile.inspect.colors import color_of
from cpcompile.inspect.report.elements import Markup, element, figure, join, legend
from cpcompile.inspect.report.pictures import matrix_picture, ring_picture, work_picture
from cpcompile.inspect.ring_step import MOST_PLACES, is_ring, ring_step
from cpcompile.inspect.text import duration
from cpcompile.ir.folding import fold, grouped
from cpcompile.runtime.attention.workload import Workload

if TYPE_CHECKING:
    from cpcompile.inspect.explanation import Site

MOST_RANKS = 64  # that are drawn
MOST_SHARES = 8  # of the heads


def site_groups(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """Return attentions that differ by their layer only, with one path for all."""
    return fold(sites, lambda site: site.module, lambda site: replace(site, module=""))


def kind_of(site: Site) -> tuple[object, ...]:
    """Return what the pictures of an attention depend on."""
    return site.workload, site.strategy, site.mask


def names_of(sites: Sequence[Site]) -> str:
    """Return the modules of attentions, equal layers as one."""
    paths = dict.fromkeys(site.module for site in sites)
    return ", ".join(path or "the model itself" for path, _ in fold(paths, str, lambda _: None))


def pictures(sites: Sequence[Site], machine: Machine | None) -> Markup:
    """Return the pictures of all attentions, equal ones once."""
    found = [pictures_of(group, machine) for group in grouped(sites, key=kind_of)]
    return join(found) if found else element("p", "The model has no attention.")


def pictures_of(sites: Sequence[Site], machine: Machine | None) -> Markup:
    """Return the pictures of equal attentions."""
    site = sites[0]
    head = element("h3", f"{names_of(sites)}: {site.mask}, {site.strategy}, {site.layout}")
    workload = site.workload
    if workload is None:
        return join([head, element("p", f"Nothing is exchanged: {site.strategy}.")])
    if workload.world_size > MOST_RANKS:
        note = f"Of more than {MOST_RANKS} ranks no picture is drawn; the table has their work."
        return join([head, element("p", note)])
    before, after = by_own_rows(workload, "contiguous"), matrices_of(workload, site.strategy)
    ranks = workload.world_size
    figures = [
        drawn(before, before.work, ranks, "before: every rank computes the queries that it holds, contiguous"),
        *(drawn(matrix, matrix.work, ranks, after_caption(matrix, site)) for matrix in after[:MOST_SHARES]),
    ]
    notes = [element("p", note) for note in notes_of(site, len(after))]
    colors = legend((color_of(rank, ranks), f"rank {rank}") for rank in range(ranks))
    return join([head, *notes, colors, element("div", *figures, class_="figures"), ring_of(site, workload, machine)])


def drawn(matrix: Matrix, work: dict[int, int], ranks: int, caption: str) -> Markup:
    """Return a matrix above the work of its ranks."""
    return figure(join([matrix_picture(matrix, ranks), work_picture(work, ranks)]), caption, class_="small")


def after_caption(matrix: Matrix, site: Site) -> str:
    """Return what the picture of the plan shows."""
    is_share = len(matrix.rows) < len(site.pairs)
    shown = f"{matrix.title}, by ranks {', '.join(map(str, matrix.rows))}" if is_share else site.layout
    return f"in this plan: {site.strategy}, {shown}; work of the busiest rank over the mean: {site.imbalance:.2f}"


def notes_of(site: Site, num_shares: int) -> list[str]:
    """Return what a picture leaves out."""
    notes = []
    if follows_documents(site.layout) or "documents" in site.mask:
        notes.append("Where documents begin is known when a batch is there: the picture is that of one document.")
    if any(word in site.mask for word in ("dense", "padding", "prefix")):
        notes.append("What a dense mask, padding or a prefix hide or show is not drawn.")
    if num_shares > MOST_SHARES:
        notes.append(f"Of {num_shares} shares of the heads, the first {MOST_SHARES} are drawn.")
    return notes


def ring_of(site: Site, workload: Workload, machine: Machine | None) -> Markup:
    """Return the time of a ring, if it is one."""
    if not is_ring(workload, site.strategy):
        return Markup("")
    kernel = site.kernels[0] if site.kernels else "cudnn"
    lanes = ring_step(workload, site.strategy, kernel, machine)
    places = workload.world_size // workload.inner(site.strategy)
    more = f" The first {MOST_PLACES} of {places} places are drawn." if places > MOST_PLACES else ""
    slowest = max(lane.end for lane in lanes)
    caption = (
        f"A step of the ring, forward: what each rank computes with (k2: the keys of rank 2), and below it which keys "
        f"arrive meanwhile. Estimated by the cost model's rates of kernels and links: {duration(slowest)}.{more}"
    )
    picture = element("div", ring_picture(lanes), class_="wide", tabindex=0)
    return element("div", figure(picture, caption), style="margin-top:16px")
