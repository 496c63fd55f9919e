"""The picture of one value: which rank holds which of its tokens, as `jax.debug.visualize_array_sharding` draws an array.

add_3: f64[2, 24, 16] Sharded(1)                  x = x + self.attend(x)     model.py:41
dim 1: 24 tokens, zig_zag; all other dims are whole on each rank
  0                    23
  000011112222222211110000
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cpcompile.balance.layout import follows_documents, positions
from cpcompile.errors import ConfigError
from cpcompile.options.checking import did_you_mean

WIDTH = 64  # cells of a line
NUMBERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_STATEMENT = re.compile(
    r"^(?P<name>\w+): (?P<kind>\w+\[(?P<shape>[^\]]*)\])(?: (?P<placement>Sharded\(.*?\)|Partial\(sum\)))? = "
)
_OWN_SEQUENCE = re.compile(
    r"Sharded\((?P<dim>\d+)(?:, inner=(?P<inner>\d+))?(?:, tokens (?P<front>\d+):(?:-(?P<back>\d+))?)?\)"
)


def value_picture(name: str, code: str, tokens: int, world_size: int, layout: str) -> str:
    """Return the picture of the value `name` of a graph of all ranks.

    Raises:
        ConfigError: no value of the graph has this name.
    """
    source, known = "", list[str]()
    for line in code.splitlines():
        if line.startswith("# "):
            source = line[2:].strip()
        elif statement := _STATEMENT.match(line):
            if statement["name"] == name:
                placement = statement["placement"] or ""
                head = f"{name}: {statement['kind']} {placement}".rstrip()
                picture = _drawn(placement, statement["shape"].split(", "), tokens, world_size, layout)
                return "\n".join([head, *([f"  {source}"] if source else []), *picture])
            known.append(statement["name"])
    raise ConfigError(
        f"no value of the graph is called {name!r}: `explain --graph after` prints all.{did_you_mean(name, known)}"
    )


def _drawn(placement: str, shape: Sequence[str], tokens: int, world_size: int, layout: str) -> Sequence[str]:
    if not placement:
        return [f"whole on each of {world_size} ranks"]
    if placement == "Partial(sum)":
        return [f"an addend on each of {world_size} ranks; the value is their sum"]
    own = _OWN_SEQUENCE.fullmatch(placement)
    if own is None:
        return [
            "each rank has a part of its own: of another sequence, of more tokens than there are, or of the channels"
        ]
    front, back = int(own["front"] or 0), tokens - int(own["back"] or 0)
    held, inner, size = back - front, int(own["inner"] or 1), shape[int(own["dim"])]
    rows = int(size) // (held * inner) if size.isdigit() else 1
    where = f"dim {own['dim']}: {_counted(rows, held, inner)}, {layout}; all other dims are whole on each rank"
    if follows_documents(layout):
        return [where, "which tokens a rank holds follows from the documents of each batch"]
    owners = [0] * tokens
    for rank in range(world_size):
        for position in positions(tokens, rank, world_size, layout).tolist():
            if position < tokens:
                owners[position] = rank
    width = min(held, WIDTH)
    cells = [owners[front + i * held // width] for i in range(width)]
    strip = "".join(NUMBERS[rank % len(NUMBERS)] for rank in cells)
    last = str(back - 1)
    return [where, f"  {front}" + last.rjust(max(width - len(str(front)), len(last) + 1)), f"  {strip}"]


def _counted(rows: int, tokens: int, inner: int) -> str:
    many = f"{rows} x {tokens} tokens" if rows > 1 else f"{tokens} tokens"
    return f"{many} of {inner} in a row" if inner > 1 else many
