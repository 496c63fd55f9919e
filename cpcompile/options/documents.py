"""Documents: what tells the documents of a packed row apart, as an option says it."""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.errors import ConfigError

# What an option may name, and the input that is meant where it names none.
KINDS = {"eos": "", "positions": "position_ids", "ids": "", "cu_seqlens": "cu_seq_lens_q"}


@dataclass(frozen=True, slots=True)
class Source:
    """What tells documents apart.

    Attributes:
        kind: `eos`, `positions`, `ids` or `cu_seqlens`.
        name: the input of the model that says it; '' for `eos`, which is said by the tokens.
        tokens: for `eos`, the ids of the tokens that end a document.
    """

    kind: str
    name: str = ""
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: str) -> Source:
        """Read an option: `eos:2`, `eos:2,7`, `positions`, `positions:pos`, `ids:document_ids`, `cu_seqlens:cu`.

        Raises:
            ConfigError: it reads otherwise.
        """
        kind, _, rest = text.partition(":")
        if kind == "eos" and rest and all(part.strip().isdecimal() for part in rest.split(",")):
            return cls(kind, tokens=tuple(int(part) for part in rest.split(",")))
        name = rest or KINDS.get(kind, "")
        if kind == "eos" or kind not in KINDS or not name.isidentifier():
            raise ConfigError(
                f"documents={text!r} does not say what tells documents apart: 'eos:2' (the id of the token that ends one; "
                "several with commas), 'positions' or 'positions:NAME' (an input whose positions restart), 'ids:NAME' (an input "
                "with an id for each token), 'cu_seqlens' or 'cu_seqlens:NAME' (an input with their cumulative lengths)."
            )
        return cls(kind, name)
