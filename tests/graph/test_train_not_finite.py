"""A step that is no number: at which step, which rank sees what, and what is likely."""

from math import inf, nan

import pytest

from cpcompile.train.events import Gradients
from cpcompile.train.not_finite import Sight, is_finite, reasons, seen

FINE = Sight(2.0, 1.0, None, None)
BROKEN = Sight(nan, nan, None, "lm_head.weight")


def gradients(loss: float, norm: float) -> Gradients:
    return Gradients(loss, norm, {})


@pytest.mark.parametrize(("loss", "norm"), [(nan, 1.0), (1.0, inf), (-inf, nan)])
def test_no_step_can_be_taken(loss: float, norm: float) -> None:
    assert not is_finite(gradients(loss, norm))
    assert is_finite(gradients(1.0, 0.0))


def test_ranks_that_see_the_same() -> None:
    assert seen([BROKEN, BROKEN]) == "the loss is nan and the gradient norm nan on all 2 ranks"
    assert seen([BROKEN]) == "the loss is nan and the gradient norm nan"


def test_ranks_that_see_different_things() -> None:
    assert seen([FINE, BROKEN]) == (
        "on rank 0 the loss is 2 and the gradient norm 1; on rank 1 the loss is nan and the gradient norm nan"
    )
    assert "Ranks that disagree point to a device" in reasons([FINE, BROKEN], None, 5, "float32")[0]


def test_a_model_that_is_broken_from_the_start() -> None:
    sight = Sight(nan, nan, "model.norm.weight", "lm_head.weight")
    assert reasons([sight], None, 1, "float32") == [
        "The model has values that are not finite before any step, in model.norm.weight: its file is damaged"
    ]
    assert reasons([sight], None, 2, "float32") == [
        "The steps before have made values of model.norm.weight not finite: try a smaller --learning-rate"
    ]


def test_one_device_decides() -> None:
    assert reasons([BROKEN], gradients(2.0, 1.0), 1, "float32") == [
        "One device gives the loss 2: `cpcompile verify` finds the first node that differs"
    ]
    assert reasons([BROKEN], gradients(nan, nan), 1, "float16") == [
        "The untouched model on one device gives no finite step either",
        "float16 ends at 65504: try --dtype bfloat16 or float32",
    ]


def test_a_gradient_alone() -> None:
    assert reasons([Sight(2.0, inf, None, "lm_head.weight")], None, 3, "float32") == [
        "The loss is finite, the gradient of lm_head.weight is not"
    ]
    assert reasons([Sight(nan, nan, None, None)], None, 3, "float32") == [
        "Try a smaller --learning-rate, or look at the text of this step"
    ]
