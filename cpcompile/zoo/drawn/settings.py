"""Settings: sizes, windows and rotary positions in place of the zoo's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from cpcompile.zoo.sizes import SHARED, sizes_by_name

# By transformers' name of the kind; the numbers are such that tiny models differ by them. Those that depend on the length,
# `dynamic` and `longrope`, branch on the positions' values: such a model is no graph.
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def draw_settings(source: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (settings, rope parameters), each empty where the zoo's are taken."""
    heads, head_dim = source.choice((2, 3, 4, 6, 8)), source.choice((8, 16))
    kv_heads = source.choice([n for n in range(1, heads + 1) if heads % n == 0])
    drawn = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "layers": source.choice((1, 2, 3)),
        "wide": source.choice((32, 80, 96)),
        "vocabulary": source.choice((117, 128, 160)),
        "experts": source.choice((2, 4, 5)),
        "window": source.choice((1, 2, 3, 5, 8, 16, 64)),
        "chunk": source.choice((4, 7, 16)),
        "is_tied": source.random() < 0.3,
        "theta": source.choice((100.0, 10000.0)),
    }
    kind = source.choice(list(ROPES))
    rope = {"rope_type": kind, "rope_theta": drawn.pop("theta"), **ROPES[kind]}
    return drawn if source.random() < 0.8 else {}, rope if source.random() < 0.5 else {}


def shared_settings(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a config takes those of which it has fields for, as `sizes.SHARED`."""
    if not drawn:
        return dict(SHARED)
    hidden = drawn["heads"] * drawn["head_dim"]
    own = sizes_by_name(
        hidden=hidden,
        layers=drawn["layers"],
        heads=drawn["heads"],
        kv_heads=drawn["kv_heads"],
        head_dim=drawn["head_dim"],
        wide=drawn["wide"],
        vocabulary=drawn["vocabulary"],
        experts=drawn["experts"],
        window=drawn["window"],
    )
    return {
        **SHARED,
        **own,
        "mamba_d_ssm": 2 * hidden,
        "mamba_n_heads": 2 * hidden // drawn["head_dim"],
        "attention_chunk_size": drawn["chunk"],
        "use_sliding_window": True,
        "tie_word_embeddings": drawn["is_tied"],
    }
