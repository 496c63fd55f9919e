"""Not finite: a loss or a gradient that is no number, which rank sees what, and what has likely made it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpcompile.errors import InputError
from cpcompile.train.events import Gradients


@dataclass(frozen=True, slots=True)
class Sight:
    """What one rank sees of a step: the loss, the gradient norm, and the first weight and gradient that are not finite."""

    loss: float
    grad_norm: float
    weight: str | None
    grad: str | None


def is_finite(found: Gradients) -> bool:
    """Whether a step can be taken."""
    return math.isfinite(found.loss) and math.isfinite(found.grad_norm)


def explain_not_finite(
    model: torch.nn.Module, found: Gradients, single: Gradients | None, step: int, dtype: str
) -> InputError:
    """Return the error for step `step`, counted from 1, that at least one rank cannot take. All ranks call this."""
    weights = (name for name, parameter in model.named_parameters() if not parameter.detach().isfinite().all())
    grads = (name for name, norm in found.grad_norms.items() if not math.isfinite(norm))
    own = Sight(found.loss, found.grad_norm, next(weights, None), next(grads, None))
    sights: list[Sight] = [own] * dist.get_world_size()
    dist.all_gather_object(sights, own)
    return InputError(f"step {step}: {seen(sights)}. {'; '.join(reasons(sights, single, step, dtype))}.")


def seen(sights: list[Sight]) -> str:
    """Return what the ranks see: once when it is the same."""
    texts = [f"the loss is {sight.loss:g} and the gradient norm {sight.grad_norm:g}" for sight in sights]
    if len(set(texts)) == 1:
        return texts[0] + (f" on all {len(texts)} ranks" if len(texts) > 1 else "")
    return "; ".join(f"on rank {rank} {text}" for rank, text in enumerate(texts))


def reasons(sights: list[Sight], single: Gradients | None, step: int, dtype: str) -> list[str]:
    """Return likely reasons and what to do, the surest first."""
    weight = next((sight.weight for sight in sights if sight.weight is not None), None)
    grad = next((sight.grad for sight in sights if sight.grad is not None), None)
    found: list[str] = []
    if weight is not None and step == 1:
        return [f"The model has values that are not finite before any step, in {weight}: its file is damaged"]
    if weight is not None:
        found.append(f"The steps before have made values of {weight} not finite: try a smaller --learning-rate")
    elif grad is not None and all(math.isfinite(sight.loss) for sight in sights):
        found.append(f"The loss is finite, the gradient of {grad} is not")
    if single is not None and is_finite(single):
        found.append(f"One device gives the loss {single.loss:g}: `cpcompile verify` finds the first node that differs")
    elif single is not None:
        found.append("The untouched model on one device gives no finite step either")
    elif len({(math.isfinite(sight.loss), math.isfinite(sight.grad_norm)) for sight in sights}) > 1:
        found.append(
            "Ranks that disagree point to a device that computes wrongly; `cpcompile verify` tries the program"
        )
    if dtype == "float16":
        found.append("float16 ends at 65504: try --dtype bfloat16 or float32")
    return found or ["Try a smaller --learning-rate, or look at the text of this step"]
