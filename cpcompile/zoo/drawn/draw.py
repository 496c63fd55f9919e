"""Draw: one configuration from a seed and an index, before any model is built."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpcompile.options.config import CHOICES
from cpcompile.zoo.catalogue import CATEGORIES, ENTRIES, Entry
from cpcompile.zoo.drawn.heads import heads_of
from cpcompile.zoo.drawn.settings import draw_settings
from cpcompile.zoo.result import Variant

# How often a category is drawn: most for those whose inputs are drawn too.
WEIGHTS = {"causal": 55, "mlm": 22, "s2s": 13, "textenc": 2, "vlm": 4, "vision": 2, "audio": 2}
TEXT = ("causal", "mlm", "s2s", "textenc")
WORLD_SIZES = {1: 1, 2: 3, 3: 3, 4: 2, 8: 1}
# Which implementation is tried first. With padding never flex attention, which branches on the mask's values: that is no graph.
FIRST_ATTENTION = {"sdpa": 45, "eager": 40, "flex_attention": 15}
LAYOUTS = ("auto", "contiguous", "zig_zag", "balanced", "zig_zag_by_document")
PADDINGS = ("none", "none", "left", "right", "ones")
LONGEST = 40
SHORTEST = 8  # of as many tokens as the most ranks


@dataclass(frozen=True, slots=True)
class Draw:
    """One configuration.

    Attributes:
        seed, index: what it was drawn from.
        entry: the architecture.
        head: what the model ends in, a name of `heads.HEADS`; "" for that of the entry.
        attention: implementations of attention, the first that the model offers is taken.
        settings: sizes and other settings in place of the zoo's, as far as the config has them.
        rope: rotary positions, for configs that have any.
        batch: sequences.
        length, decoder_length: tokens.
        padding: `none`, `left`, `right`, or `ones` for a mask that hides nothing.
        is_packed: positions restart with each document.
        takes_embeddings: `inputs_embeds` in place of ids.
        has_types: two types of tokens, where the model knows them.
        hides_padding: labels of padding are ignored.
        world_size: ranks.
        options: of `cpcompile.verify`, beside the ranks.
    """

    seed: int
    index: int
    entry: Entry
    head: str
    attention: tuple[str, ...]
    settings: Mapping[str, Any]
    rope: Mapping[str, Any]
    batch: int
    length: int
    decoder_length: int
    padding: str
    is_packed: bool
    takes_embeddings: bool
    has_types: bool
    hides_padding: bool
    world_size: int
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The name of this draw among the results."""
        return f"{self.seed}:{self.index}"

    @property
    def command(self) -> str:
        """What runs this configuration alone."""
        return f"python -m cpcompile.zoo --random 1 --seed {self.seed} --first {self.index}"

    @property
    def variant(self) -> Variant:
        """The columns that the results of the zoo have."""
        return Variant(self.attention[0], self.is_packed, self.world_size, self.options["strict"])

    @property
    def text(self) -> str:
        """The configuration in words."""
        inputs = f"{self.batch} x {self.length}"
        inputs += f" and {self.decoder_length}" if self.entry.category == "s2s" else ""
        said = {
            f"padding {self.padding}": self.padding != "none",
            "padding has labels": self.padding in ("left", "right") and not self.hides_padding,
            "packed": self.is_packed,
            "inputs_embeds": self.takes_embeddings,
            "token types": self.has_types,
        }
        words = [self.entry.key, self.head, self.attention[0], f"P={self.world_size}"]
        words += [f"{name}={value}" for name, value in self.options.items()]
        if self.entry.category in TEXT:
            words += [inputs, *(word for word, holds in said.items() if holds)]
            words += [f"{name}={value}" for name, value in self.settings.items()]
            words += [f"rope {self.rope['rope_type']}"] if self.rope else []
        return ", ".join(word for word in words if word)


def draw(seed: int, index: int) -> Draw:
    """Return configuration `index` of `seed`: the same in every process, whatever others are drawn."""
    source = random.Random(f"{seed}:{index}")
    category = source.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    entry = ENTRIES[f"{category}:{source.choice(list(CATEGORIES[category]))}"]
    world_size = source.choices(list(WORLD_SIZES), list(WORLD_SIZES.values()))[0]
    attention = source.choices(list(FIRST_ATTENTION), list(FIRST_ATTENTION.values()))[0]
    padding = source.choice(PADDINGS) if attention != "flex_attention" else "none"
    options = draw_options(source, world_size)
    settings, rope = draw_settings(source)
    return Draw(
        seed=seed,
        index=index,
        entry=entry,
        head=source.choice(heads_of(entry)),
        attention=(attention, *(name for name in FIRST_ATTENTION if name != attention)),
        settings=settings,
        rope=rope,
        batch=source.randint(1, 3),
        length=source.randint(SHORTEST, LONGEST),
        decoder_length=source.randint(SHORTEST, LONGEST),
        padding=padding,
        is_packed=source.random() < 0.2,
        takes_embeddings=source.random() < 0.25,
        has_types=source.random() < 0.2,
        hides_padding=source.random() < 0.7,
        world_size=world_size,
        options=options,
    )


def draw_options(source: random.Random, world_size: int) -> dict[str, Any]:
    """Return options of `cpcompile.verify`; `usp` has a grid of ranks."""
    divisors = [n for n in range(2, world_size + 1) if world_size % n == 0] or [1]
    strategy = source.choice(CHOICES["strategy"])
    inner = source.choice(divisors)
    options: dict[str, Any] = {"strategy": strategy, "balancer": source.choice(LAYOUTS)}
    options |= {"inner_size": inner} if strategy == "usp" else {}
    return options | {"strict": source.random() < 0.5, "dynamic": source.random() < 0.5}
