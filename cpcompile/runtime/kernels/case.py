"""Case: what decides which kernels can compute a block; Kernel: a provider, and what it can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpcompile.runtime.kernels.block import Block

Tensor = torch.Tensor
Forward = Callable[[Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor, Tensor]]

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)

# What hides keys, and so can be put into one bool mask of all rows and columns.
HIDING = frozenset(("causal", "window", "band", "mask", "documents", "key_padding", "prefix"))
FORMS = frozenset(("lengths", "rectangles", "varied"))  # what `adapt` brings to any kernel
FEATURES = HIDING | FORMS | frozenset(("bias", "alibi", "softcap", "dropout", "deterministic"))

_WORDS = {
    "causal": "causal mask",
    "window": "causal window",
    "band": "window or shifted causal mask",
    "mask": "mask",
    "documents": "documents",
    "key_padding": "key padding",
    "prefix": "prefix",
    "bias": "float mask",
    "alibi": "ALiBi",
    "softcap": "softcap",
    "dropout": "dropout",
    "deterministic": "deterministic mode",
}


class KernelError(ValueError):
    """A kernel was asked for that does not exist or cannot compute an attention."""


@dataclass(frozen=True, slots=True)
class Case:
    """A block as far as the choice of its kernel goes. Made of fake tensors as well as of real ones.

    `features` name what the block has beyond plain attention of all rows to all columns; they are among `FEATURES`.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    features: frozenset[str] = frozenset()

    @classmethod
    def of(cls, q: Tensor, v: Tensor, block: Block) -> Case:
        """Describe a block: q `[B, H, Sq, D]`, v `[B, K, Skv, Dv]`."""
        return cls(q.device.type, q.dtype, int(q.shape[-1]), int(v.shape[-1]), features(block))


def features(block: Block) -> frozenset[str]:
    """Return what a block has beyond plain attention of all rows to all columns."""
    has = {
        "causal": block.is_causal_square,
        "window": block.is_causal_window,
        "band": block.has_band and not (block.is_causal_square or block.is_causal_window),
        "lengths": len(block.lengths) > 1,
        "rectangles": bool(block.rectangles),
        "varied": block.is_varied,
        "mask": block.mask is not None and block.mask.dtype == torch.bool,
        "bias": block.mask is not None and block.mask.dtype != torch.bool,
        "documents": block.documents is not None,
        "key_padding": block.key_padding is not None,
        # It says what `high` does not hide.
        "prefix": block.prefix is not None and block.high is not None,
        "alibi": block.slopes is not None,
        "softcap": block.softcap > 0,
        "dropout": block.dropout is not None,
        "deterministic": block.is_deterministic or torch.are_deterministic_algorithms_enabled(),
    }
    return frozenset(name for name, is_there in has.items() if is_there)


def _nothing(case: Case) -> str:
    return ""


def _dims_as_they_are(case: Case) -> tuple[int, int]:
    return case.head_dim, case.value_dim


@dataclass(frozen=True, slots=True)
class Kernel:
    """A provider.

    Attributes:
        forward, backward: as `cpcompile.runtime.kernels` describes them, for what the others allow.
        limits: why it cannot take a case, features in `takes` aside; '' when it can.
        takes: the features that it computes itself. With "mask", everything in `HIDING` reaches it as a bool mask;
            without "lengths" it is called for each document, without "rectangles" for each of these. "varied" says nothing of
            what is computed.
        dims: the head dims of q and v that it is to get instead of those of the case; the rest is filled with zeros.
        avoids: why `auto` leaves a case to others although this kernel can compute it; '' when it does not.
        is_cut_by_reach: blocks of more rows than columns reach it as `adapt.by_reach` cuts them.
    """

    name: str
    forward: Forward
    backward: Backward
    limits: Callable[[Case], str]
    takes: frozenset[str]
    dims: Callable[[Case], tuple[int, int]] = _dims_as_they_are
    avoids: Callable[[Case], str] = _nothing
    is_cut_by_reach: bool = False

    def refuses(self, case: Case) -> str:
        """Return why this kernel cannot compute a case, or ''."""
        reason = self.limits(case)
        missing = case.features - self.takes - FORMS
        if "mask" in self.takes:
            missing -= HIDING
        return reason or (
            "takes no " + ", no ".join(_WORDS[name] for name in _WORDS if name in missing) if missing else ""
        )

    def needs_dense_mask(self, case: Case) -> bool:
        """Whether what hides keys must be made one bool mask."""
        hiding = case.features & HIDING
        # A kernel that knows little but masks tells rows that see no key by the mask alone.
        is_beside = "mask" in hiding and len(hiding) > 1 and not self.takes >= HIDING
        return bool(hiding - self.takes) or is_beside


def runs_on(case: Case, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Return why a kernel of one device and some dtypes cannot take the case."""
    if case.device != device:
        return f"runs on {device}"
    return "" if case.dtype in dtypes else f"has no {str(case.dtype).removeprefix('torch.')}"


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is not below `size`."""
    return -(-size // multiple) * multiple
