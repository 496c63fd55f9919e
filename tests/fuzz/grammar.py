"""Grammar: random programs of elements, as hypothesis strategies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from string import Template
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.fuzz.elements import AROUND, FLAT, LOCAL, PLACED, SETUP, START, Element
from tests.fuzz.ends import ENDS
from tests.fuzz.mixing import ATTENTION, MIXING
from tests.fuzz.program import Program, has_gradients

GROUPS = {"local": LOCAL, "placed": PLACED, "attention": ATTENTION, "mixing": MIXING}
GROUP_WEIGHTS = {"local": 3, "placed": 2, "attention": 3, "mixing": 2}
WORLD_SIZES = (2, 3, 4, 1, 8)


@dataclass(frozen=True)
class Block:
    """An element with its choices made, around other blocks where its code says `BODY`."""

    element: Element
    chosen: Mapping[str, str]
    inside: tuple[Block, ...] = ()


def render(blocks: Sequence[Block], numbers: Any, setup: list[str]) -> list[str]:
    """Return the lines of `forward`, and add those of `__init__` to `setup`."""
    lines: list[str] = []
    for block in blocks:
        values = {**block.chosen, "i": str(next(numbers))}
        body = render(block.inside, numbers, setup)
        setup += substitute(block.element.setup, values).splitlines()
        for line in substitute(block.element.forward, values).splitlines():
            indent = line[: len(line) - len(line.lstrip())]
            lines += (
                textwrap.indent("\n".join(body or ["pass"]), indent).splitlines() if line.strip() == "BODY" else [line]
            )
    return lines


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Return `text` with the choices made; a choice may name another one."""
    return Template(Template(text).safe_substitute(values)).substitute(values)


def program_of(blocks: Sequence[Block], **sizes: Any) -> Program:
    """Return the program that runs `blocks` one after the other."""
    setup = list(SETUP)
    return Program(forward=tuple(render(blocks, count(), setup)), setup=tuple(dict.fromkeys(setup)), **sizes)


def made(element: Element) -> st.SearchStrategy[Mapping[str, str]]:
    """Return the ways to make the choices of an element."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in element.choices.items()})


def leaf(elements: Sequence[Element]) -> st.SearchStrategy[Block]:
    return st.sampled_from(elements).flatmap(lambda e: st.builds(Block, st.just(e), made(e)))


def around(elements: Mapping[str, Element], inside: st.SearchStrategy[Block]) -> st.SearchStrategy[Block]:
    within = st.lists(inside, min_size=1, max_size=2).map(tuple)
    return st.sampled_from(list(elements.values())).flatmap(lambda e: st.builds(Block, st.just(e), made(e), within))


def blocks() -> st.SearchStrategy[Block]:
    """Return blocks from hidden states to hidden states."""
    weighted = [list(GROUPS[name].values()) for name, weight in GROUP_WEIGHTS.items() for _ in range(weight)]
    leaves = st.sampled_from(weighted).flatmap(leaf)
    flat = around(FLAT, leaf(list(LOCAL.values())))
    once = st.one_of(leaves, leaves, flat, around(AROUND, st.one_of(leaves, flat)))
    return st.one_of(leaves, once, around(AROUND, once))


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "strategy": st.sampled_from(["auto", "ulysses", "ring", "gather"]),
            "balancer": st.sampled_from(["contiguous", "zig_zag", "auto"]),
            "dynamic": st.booleans(),
            "outputs": st.sampled_from(["local", "local", "full"]),
            "strict": st.booleans(),
        }
    )


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Return sizes and options: lengths that divide and that do not, sizes that happen to be equal."""
    return {
        "world_size": draw(st.sampled_from(WORLD_SIZES)),
        "length": draw(st.sampled_from([8, 7, 12, 5, 16, 3, 2, 13, 17, 24])),
        "batch": draw(st.sampled_from([2, 1, 3])),
        "memory": draw(st.sampled_from([5, 8, 3])),
        "seed": draw(st.integers(0, 3)),
        "options": draw(options()),
    }


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Return a model: an embedding, one to four blocks, and what it returns."""
    plain = st.just(Block(START, {"f": START.choices["f"][0]}))
    start, end = draw(st.one_of(plain, plain, leaf([START]))), draw(leaf(list(ENDS.values())))
    middle = draw(st.lists(blocks(), min_size=1, max_size=4))
    program = program_of([start, *middle, end], **draw(sizes()))
    assume(has_gradients(program))
    return program
