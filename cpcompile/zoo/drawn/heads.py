"""Heads: what a transformers model may end in, and the labels that each takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cpcompile.zoo.build import import_transformers
from cpcompile.zoo.catalogue import Entry

NUM_LABELS = 3
NUM_ENDS = 2  # the start and the end of an answer
CHOICES = 2

# The names of transformers' tables of classes.
HEADS: Mapping[str, str] = {
    "language model": "CAUSAL_LM",
    "masked language model": "MASKED_LM",
    "sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "multiple choice": "MULTIPLE_CHOICE",
    "no head": "",
}
_OWN = {"causal": "language model", "mlm": "masked language model", "s2s": "sequence to sequence"}


@functools.cache
def tables() -> Mapping[str, Mapping[str, Any]]:
    """Return transformers' class names by head and model type."""
    auto = import_transformers().models.auto.modeling_auto
    return {
        head: getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES")
        for head, name in HEADS.items()
    }


def heads_of(entry: Entry) -> list[str]:
    """Return the heads that transformers has for an entry, its own several times; "" for one whose class is given."""
    own = _OWN.get(entry.category, "")
    if entry.class_name or not own:
        return [""]
    offered = [head for head, names in tables().items() if isinstance(names.get(entry.model_type), str)]
    # A decoder as a masked language model, or an encoder as a decoder, is another model.
    others = [head for head in offered if head not in _OWN.values()]
    return [own] * max(1, len(others)) + others


def class_name(entry: Entry, head: str) -> str | None:
    """Return the class of an entry with a head, or None for the entry's own."""
    return None if head in ("", _OWN.get(entry.category)) else tables()[head][entry.model_type]


def num_labels(head: str) -> int:
    """Return the number of logits of a head that has labels of its own."""
    return NUM_ENDS if head == "question answering" else NUM_LABELS


def labels_of(head: str, tokens: Callable[[int], Tensor], batch: int, length: int) -> dict[str, Tensor]:
    """Return the labels of a head.

    Args:
        head: a name of `HEADS`.
        tokens: returns a random integer below a number for each token, `[B, length]`.
        batch: sequences.
        length: of each, which answers lie within.
    """
    row = torch.arange(batch)
    match head:
        case "token classification":
            return {"labels": tokens(NUM_LABELS)}
        case "sequence classification" | "multiple choice":
            return {"labels": row % (NUM_LABELS if head == "sequence classification" else CHOICES)}
        case "question answering":
            return {"start_positions": (row + 1) % length, "end_positions": (row + length // 2) % length}
    return {}
