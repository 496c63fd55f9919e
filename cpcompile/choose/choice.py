"""Choice: the layout of a model and the strategy of each attention that cost the slowest rank least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS, of_groups
from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.cost import seconds

# Of strategies within this factor of the cheapest, the first of these is taken: the one that sends least, then those whose work
# does not depend on the mask.
CLOSE = 1.03


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, the strategy of each attention, the estimates that led to them, and the kernels at whose rates these are.

    An estimate is of all attentions: those that the strategy cannot compute use their cheapest one, and have it in the name.
    """

    layout: str
    strategies: tuple[str, ...]
    estimates: dict[tuple[str, str], float]
    kernels: tuple[str, ...] = ()

    @property
    def taken(self) -> tuple[str, str]:
        """The estimate of what was chosen."""
        return self.layout, together(self.strategies)


def choose(sites: list[AttentionSite], strategy: str, balancer: str, axis: Ranks, *, follow: bool = True) -> Choice:
    """Choose what costs least among what was asked for; `auto` leaves all open. One layout serves all attentions.

    Layouts that follow documents are for those who have some, and only `auto` with `follow` takes one by itself.
    """
    layouts = _layouts(strategy, balancer, axis, follow=follow and any(site.has_documents for site in sites))
    best: tuple[float, Choice] | None = None
    estimates: dict[tuple[str, str], float] = {}
    for layout in layouts:
        all_costs: list[dict[str, float]] = []
        chosen: list[str] = []
        for site in sites:
            allowed = [s for s in site.strategies(axis) if strategy == s or (strategy == "auto" and site.fits(s, axis))]
            allowed = allowed or ["gather"]
            costs = {name: seconds(site, name, layout, axis) for name in allowed}
            least = min(costs.values())
            name = next(name for name in allowed if costs[name] <= CLOSE * least)
            all_costs.append(costs)
            chosen.append(name)
        for name in dict.fromkeys(name for costs in all_costs for name in costs):
            mixed = [name if name in costs else other for costs, other in zip(all_costs, chosen, strict=True)]
            estimates[layout, together(mixed)] = total_of(mixed, all_costs)
        total = total_of(chosen, all_costs)
        if sites:
            estimates[layout, together(chosen)] = total  # behind the others, one of which may have its name
        if best is None or total < best[0]:
            best = total, Choice(layout, tuple(chosen), estimates)
    assert best is not None
    return replace(best[1], kernels=tuple(dict.fromkeys(site.kernel for site in sites)))


def together(strategies: Sequence[str]) -> str:
    """Return the name of several strategies."""
    return " + ".join(dict.fromkeys(strategies))


def total_of(strategies: Sequence[str], all_costs: Sequence[Mapping[str, float]]) -> float:
    """Return what all attentions cost, each with its strategy."""
    return sum(costs[name] for costs, name in zip(all_costs, strategies, strict=True))


def _layouts(strategy: str, balancer: str, axis: Ranks, *, follow: bool) -> tuple[str, ...]:
    """Return the layouts to choose among. Where heads are exchanged in groups, documents are dealt to these."""
    names = (balancer,) if balancer != "auto" else (*LAYOUTS, "balanced") if follow else LAYOUTS
    followers = [name for name in names if name in DOCUMENT_LAYOUTS and axis.inner_size > 1]
    dealt = {name: of_groups(name, axis.inner_size) for name in followers}
    if strategy == "usp":
        return tuple(dealt.get(name, name) for name in names)
    if strategy == balancer == "auto":  # of equals the first is taken
        return (*(name for name in names if name not in dealt), *dealt.values(), *dealt)
    return names
