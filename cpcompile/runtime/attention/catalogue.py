"""Catalogue: the strategies by name, and what the compiler must know of each beside its operator `{name}_attention`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Strategy:
    """How ranks share the work of an attention.

    Attributes:
        exchange: which ranks exchange heads, so that each computes some heads of the rows of all of these: `all` of the axis, the
            `inner` ones of a grid, or none ('').
        is_at_once: a rank computes its rows over all keys that they see at once; otherwise over those of one rank after another,
            and merges partial results.
        is_latent: keys and values are not sent, but computed from a narrower value that all ranks have.
    """

    exchange: str = ""
    is_at_once: bool = False
    is_latent: bool = False

    def inner_size(self, world_size: int, inner_size: int) -> int:
        """Return how many ranks exchange heads: ring is a grid of one inner rank, Ulysses of one outer rank."""
        return {"all": world_size, "inner": inner_size}.get(self.exchange, 1)

    @property
    def takes_whole_mask(self) -> bool:
        """Whether its operator takes a dense mask whole, rather than the rows of its own queries."""
        return bool(self.exchange) and not self.is_latent


# Of those that cost as much, the first is taken: the one that sends least, then those whose work does not depend on the mask.
STRATEGIES: dict[str, Strategy] = {
    "halo": Strategy(is_at_once=True),
    "ulysses": Strategy(exchange="all"),
    "usp": Strategy(exchange="inner"),
    "ring": Strategy(),
    "gather": Strategy(is_at_once=True),
    "latent_heads": Strategy(exchange="all", is_latent=True),
    "latent": Strategy(is_at_once=True, is_latent=True),
}
