"""Calls of every operator that has a rule, on concrete tensors with S tokens.

Hand-written rules have cases by hand, entered by `@cases(operator, ...)`; the pointwise family gets arguments from its schemas.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cpcompile.rules.fourier import TRANSFORMS
from cpcompile.rules.pooling import POOLS, RESIZES
from cpcompile.rules.registry import RULES
from tests.graph.rule_checker import Case

aten = torch.ops.aten
B, H, D = 2, 4, 3

Make = Callable[[Any, int], Iterator[Case]]
CASES: dict[torch._ops.OpOverload, Make] = {}


def cases(*targets: torch._ops.OpOverload) -> Callable[[Make], Make]:
    """Register a generator of cases, called with the operator and S."""

    def register(make: Make) -> Make:
        for target in targets:
            assert target not in CASES, target
            CASES[target] = make
        return make

    return register


def x(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def integers(*shape: int, high: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def cases_of(target: torch._ops.OpOverload, s: int) -> list[Case]:
    """Return the cases of an operator, its own or else pointwise ones from its schema."""
    return list(CASES[target](target, s)) if target in CASES else list(pointwise_cases(target, s))


# Pointwise operators with cases by hand: conversions (dtype and device), what draws (exact where it does not: p=0 or not
# training), what has no values, and one whose mask is boolean.


@cases(aten.dropout.default, aten.feature_dropout.default)
def dropout(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), 0.0, True))
    yield Case(target, (x(B, s, D), 0.5, False))
    yield Case(target, (x(s, s, D), 0.5, False))


@cases(torch.ops.cpcompile.show.default)
def show(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), "x"))
    yield Case(target, (integers(B, s, high=3), "x", True))


@cases(aten.native_dropout.default)
def native_dropout(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), 0.0, True))
    yield Case(target, (x(B, s, D), 0.5, False))


@cases(aten.native_dropout_backward.default)
def native_dropout_backward(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(B, s, D) > 0.5, 2.0))


@cases(
    aten.rand_like.default,
    aten.randn_like.default,
    aten.uniform.default,
    aten.normal_functional.default,
    aten.bernoulli.p,
)
def noise(target: Any, s: int) -> Iterator[Case]:
    settings = (0.5,) if target is aten.bernoulli.p else ()
    yield Case(target, (x(B, s, D), *settings), has_values=False)


@cases(aten.empty_like.default)
def empty_like(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D),), has_values=False)


@cases(aten.fill.Tensor)
def fill(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x()))


@cases(aten.masked_fill.Tensor)
def masked_fill(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(B, s, D) > 0.5, x()))
    yield Case(target, (x(s, s, D), x(s, 1) > 0.5, x()))


@cases(aten._to_copy.default)
def to_copy(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D),), {"dtype": torch.float32})


@cases(aten.to.dtype, aten.to.dtype_layout, aten.to.device)
def conversion(target: Any, s: int) -> Iterator[Case]:
    if target is aten.to.dtype:
        yield Case(target, (x(B, s, D), torch.float32))
        yield Case(target, (x(s, s, D), torch.int64))
    elif target is aten.to.device:
        yield Case(target, (x(B, s, D), torch.device("cpu"), torch.float32))
    else:
        yield Case(target, (x(B, s, D),), {"dtype": torch.float32, "device": torch.device("cpu")})


@cases(aten.type_as.default)
def type_as(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), integers(4, high=3)))


def pointwise_cases(target: torch._ops.OpOverload, s: int) -> Iterator[Case]:
    """Yield calls with equal and with broadcast operands, of the first kind of numbers that the operator takes."""
    for kind in ("float", "integer", "boolean"):
        found = []
        for shapes in (((B, s, D), (B, s, D)), ((s, s, 1), (s, 1)), ((B, 2 * s, D), (1, D))):
            case = pointwise_case(target, kind, shapes)
            try:
                case.target(*(a.clone() if isinstance(a, torch.Tensor) else a for a in case.args), **case.kwargs)
            except (RuntimeError, IndexError, NotImplementedError):
                continue
            found.append(case)
        if found:
            yield from found
            return


def pointwise_case(target: torch._ops.OpOverload, kind: str, shapes: tuple[tuple[int, ...], ...]) -> Case:
    """Return a call whose first tensor has the first shape and whose others have the second."""
    make: dict[str, Callable[..., torch.Tensor]] = {
        "float": x,
        "integer": lambda *shape: integers(*shape, high=3) + 1,
        "boolean": lambda *shape: integers(*shape, high=2).bool(),
    }
    args: list[Any] = []
    count = 0
    for argument in target._schema.arguments:
        type_ = str(argument.type).removeprefix("Optional[").removesuffix("]")
        if type_ == "Tensor":
            wants_mask = argument.name in ("mask", "condition")
            shape = shapes[min(count, 1)]
            args.append(make["boolean" if wants_mask else kind](*shape))
            count += 1
        elif argument.kwarg_only:
            continue
        elif argument.has_default_value() and type_ not in ("number", "Scalar"):
            args.append(argument.default_value)
        else:
            args.append(
                {"number": 1 if kind == "integer" else 0.7, "int": 1, "float": 0.7, "bool": True, "str": "none"}[type_]
            )
    options = {"rounding_mode": "floor", "decimals": 1}
    needed = {a.name for a in target._schema.arguments if a.kwarg_only}
    return Case(target, tuple(args), {name: value for name, value in options.items() if name in needed})


def groupings(factors: list[int], rng: random.Random) -> tuple[int, ...]:
    """Return a shape that multiplies neighbouring factors at random, with ones strewn in."""
    shape = [factors[0]]
    for factor in factors[1:]:
        if rng.random() < 0.5:
            shape[-1] *= factor
        else:
            shape.append(factor)
    if rng.random() < 0.3:
        shape.insert(rng.randrange(len(shape) + 1), 1)
    return tuple(shape)


@cases(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def views(target: Any, s: int) -> Iterator[Case]:
    rng = random.Random(s)
    for _ in range(8):
        factors = [rng.choice([1, 2, s]), s, rng.choice([1, 2, 4]), 3]
        yield Case(target, (x(*groupings(factors, rng)), list(groupings(factors, rng))))
    yield Case(target, (x(B, s, 6), [B, s, 2, -1]))
    yield Case(target, (x(B, s, 6), [-1, 6]))
    yield Case(target, (x(s, B, D), [B, s, D]))  # moves tokens, except where a factor still holds them whole
    yield Case(target, (x(s, s), [s * s]))
    yield Case(target, (x(2 * s, D), [s, 2 * D]))


@cases(aten.unflatten.int)
def unflatten(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B * s, D), 0, [B, s]))
    yield Case(target, (x(B * s, D), 0, [B, -1]))
    yield Case(target, (x(B, s, 6), -1, [2, 3]))
    yield Case(target, (x(B, s * 4), 1, [s, 4]))
    yield Case(target, (x(B, s * 4), 1, [2, s, 2]))


@cases(aten.flatten.using_ints)
def flatten(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 2, D), 0, 1))
    yield Case(target, (x(B, s, 2, D), 1, 2))
    yield Case(target, (x(s, s, D),))


@cases(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def squeeze(target: Any, s: int) -> Iterator[Case]:
    extra: tuple[tuple[Any, ...], ...] = ((),)
    if target is aten.squeeze.dims:
        extra = (([0, 2],), ([-1, 0],))
    elif target is not aten.squeeze.default:
        extra = ((0,), (-1,), (2,))
    for arguments in extra:
        yield Case(target, (x(1, s, 1, D), *arguments))
        yield Case(target, (x(1, B * s, 1), *arguments))


@cases(aten.transpose.int, aten.swapaxes.default)
def transpose(target: Any, s: int) -> Iterator[Case]:
    for dims in ((1, 2), (-1, -2), (0, 1), (0, 3)):
        yield Case(target, (x(B, s, H, D), *dims))
    yield Case(target, (x(s, s, 2, D), 0, 2))


@cases(aten.t.default, aten.numpy_T.default)
def t(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(2 * s, D),))
    yield Case(target, (x(s, s),))
    yield Case(target, (x(s),))
    if target is aten.numpy_T.default:
        yield Case(target, (x(s, B, D),))


@cases(aten.mT.default)
def matrix_transpose(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D),))
    yield Case(target, (x(s, s),))


@cases(aten.movedim.int, aten.movedim.intlist)
def movedim(target: Any, s: int) -> Iterator[Case]:
    if target is aten.movedim.int:
        yield Case(target, (x(B, s, H, D), 1, 0))
        yield Case(target, (x(B, s, H, D), -1, 1))
    else:
        yield Case(target, (x(B, s, H, D), [0, 1], [-1, 0]))


@cases(aten.permute.default)
def permute(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, H, D), [0, 2, 1, 3]))
    yield Case(target, (x(B, s, D), [2, 0, 1]))
    yield Case(target, (x(s, B * s, D), [-1, 0, -2]))


@cases(aten.expand.default, aten.broadcast_to.default)
def expand(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(1, s, D), [B, s, D]))
    yield Case(target, (x(1, s, D), [B, -1, -1]))
    yield Case(target, (x(D), [B, s, D]))
    yield Case(target, (x(1, 1, s), [B, s, s]))
    yield Case(target, (x(1, 2 * s), [3, 2 * s]))


@cases(aten.repeat.default)
def repeat(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(1, s, D), [B, 1, 1]))
    yield Case(target, (x(s, D), [B, 1, 2]))
    yield Case(target, (x(s, s), [1, 2]))


@cases(aten.repeat_interleave.self_int)
def repeat_interleave(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, H, D), 2, 2))
    yield Case(target, (x(B, s, D), 2, 1))
    yield Case(target, (x(B, s, D), 2))


@cases(aten.slice.Tensor)
def slice_(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 6), 2, 0, 3))
    yield Case(target, (x(B, s, 6), -1, -3))
    yield Case(target, (x(B, s, 6), 1))
    yield Case(target, (x(B, s, 6), 1, 0, s))
    yield Case(target, (x(B, s, 6), 1, 0, s - 1))
    yield Case(target, (x(B, s, 6), 1, 0, s + 5))
    yield Case(target, (x(B, 2 * s), 1, 0, s))
    yield Case(target, (x(B, 2 * s), 1, 2, 2 * s))
    yield Case(target, (x(B, s), 1, -s))
    yield Case(target, (x(B, s), 1, 0, s, 2))
    yield Case(target, (x(B, s), 1, 0, -1))


@cases(aten.narrow.default)
def narrow(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 6), 2, 1, 3))
    yield Case(target, (x(B, s, 6), 1, 0, s - 1))
    yield Case(target, (x(B, 2 * s, 6), 1, s, s))
    yield Case(target, (x(B, 3 * s, 6), 1, s, 2 * s))


@cases(aten.pad.default, aten.constant_pad_nd.default)
def pad(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), [1, 2]))
    yield Case(target, (x(B, s, D), [0, 0, 0, 0, 1, 0]))
    yield Case(target, (x(B, s, D), [0, 0, 1, -1]))
    yield Case(target, (x(B, s, D), [0, 0, 0, s]))
    if target is aten.pad.default:
        yield Case(target, (x(B, s, D), [1, 1], "replicate"))


@cases(aten.one_hot.default)
def one_hot(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (integers(B, s, high=5), 5))
    yield Case(target, (integers(s, high=s), s))
    yield Case(target, (integers(B, s, high=5),))


@cases(aten.diff.default)
def diff(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), 1, -1))
    yield Case(target, (x(B, s, D), 1, 1, x(B, 1, D)))
    yield Case(target, (x(B, s, D), 1, 2, x(B, s, 1)))


@cases(aten.gather.default)
def gather(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 5), 2, integers(B, s, 2, high=5)))
    yield Case(target, (x(B, s, 5), 1, integers(B, s, 5, high=s)))
    yield Case(target, (x(B, 2 * s, 5), 2, integers(B, s, 2, high=5)))  # the index may be smaller elsewhere too
    yield Case(target, (x(B, s, 5), 2, integers(B, 1, 2, high=5)))
    yield Case(target, (x(s, s, 5), 2, integers(1, s, 2, high=5)))


@cases(aten.select.int)
def select(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(3, B, s), 0, 1))
    yield Case(target, (x(B, s, D), -1, 2))
    yield Case(target, (x(B, s, D), 1, -1))


@cases(
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections
)
def split(target: Any, s: int) -> Iterator[Case]:
    sections: tuple[Any, ...] = {aten.split_with_sizes.default: ([2, 4],), aten.unbind.int: ()}.get(target, (3,))
    yield Case(target, (x(B, s, 6), *sections, 2))
    yield Case(target, (x(6, s, D), *sections, 0))
    if target is not aten.unbind.int:  # rows of merged batch and tokens
        rows: tuple[Any, ...] = {aten.split_with_sizes.default: ([2 * s, s],), aten.split.Tensor: (s,)}.get(
            target, (3,)
        )
        yield Case(target, (x(3 * s, D), *rows, 0))
    if target is not aten.split_with_sizes.default:
        yield Case(target, (x(B, s, 6), *sections, 1))


@cases(aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default)
def cat(target: Any, s: int) -> Iterator[Case]:
    for dim in (0, 1, -1):
        yield Case(target, ([x(B, s, D), x(B, s, D)], dim))
    yield Case(target, ([x(s, s), x(s, s), x(s, s)], 1))
    if target is not aten.stack.default:
        yield Case(target, ([x(B, s, D), x(B, s, 2 * D)], -1))
        yield Case(target, ([x(0), x(B, s, D)], 2))  # an empty vector is skipped, whatever the others are


@cases(aten.median.dim, aten.nanmedian.dim, aten.mode.default, aten.kthvalue.default)
def order(target: Any, s: int) -> Iterator[Case]:
    for dim in (1, 2):
        yield Case(target, (x(B, s, 4), *((2,) if target is aten.kthvalue.default else ()), dim))


@cases(aten.argsort.stable, aten.sort.stable)
def stable_order(target: Any, s: int) -> Iterator[Case]:
    for dim in (1, 2):
        yield Case(target, (x(B, s, 4),), {"stable": True, "dim": dim})


@cases(aten.expand_as.default)
def expand_as(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(s, 1), x(B, s, D)))
    yield Case(target, (x(1, s), x(s, s)))


@cases(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(target: Any, s: int) -> Iterator[Case]:
    for indexing in ("ij", "xy"):
        yield Case(target, ([x(s), x(3), x(s)],), {"indexing": indexing} if target is aten.meshgrid.indexing else {})


@cases(aten.view_as_complex.default)
def view_as_complex(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 3, 2),))
    yield Case(target, (x(s, 2),))


@cases(aten.view_as_real.default, aten.real.default, aten.imag.default)
def view_as_real(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (torch.complex(x(B, s, 3), x(B, s, 3)),))


@cases(aten.tile.default)
def tile(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), [2]))
    yield Case(target, (x(B, s, D), [2, 1, 1, 3]))
    yield Case(target, (x(s), [2, 1]))


@cases(aten.view_as.default, aten.reshape_as.default)
def view_as(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 6), x(B * s, 2, 3)))
    yield Case(target, (x(B * s, D), x(B, s, D)))
    yield Case(target, (x(s, B), x(B, s)))


@cases(aten.baddbmm.default)
def baddbmm(target: Any, s: int) -> Iterator[Case]:
    for added in ((B, s, 5), (1, 5), (B, 1, 1)):
        yield Case(target, (x(*added), x(B, s, D), x(B, D, 5)), {"beta": 0.5, "alpha": 2.0})
    yield Case(target, (x(B, s, s), x(B, s, D), x(B, D, s)))
    yield Case(target, (x(B, 3, 5), x(B, 3, s), x(B, s, 5)))


@cases(aten.mv.default, aten.dot.default, aten.vdot.default, aten.inner.default, aten.outer.default, aten.ger.default)
def product_of_vectors(target: Any, s: int) -> Iterator[Case]:
    if target in (aten.mv.default, aten.inner.default):
        yield Case(target, (x(2 * s, D), x(D)))
        yield Case(target, (x(D, s), x(s)))
    if target is aten.inner.default:
        yield Case(target, (x(B, s, D), x(s, D)))
    if target is not aten.mv.default:
        yield Case(target, (x(s), x(s)))


@cases(aten.tensordot.default)
def tensordot(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(D, 4), [2], [0]))
    yield Case(target, (x(B, s, D), x(s, 4, B), [1, 0], [0, 2]))
    yield Case(target, (x(s, D), x(D, s), [-1], [0]))


@cases(aten.einsum.default)
def einsum(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, ("b s d, d e -> b s e", [x(B, s, D), x(D, 4)]))
    yield Case(target, ("bsd,btd->bst", [x(B, s, D), x(B, s, D)]))
    yield Case(target, ("bsd,bse,bs->bde", [x(B, s, D), x(B, s, 4), x(B, s)]))
    yield Case(target, ("bsd,bsd", [x(B, s, D), x(1, s, D)]))
    yield Case(target, ("ss,sd->sd", [x(s, s), x(s, D)]))
    yield Case(target, ("bsd->db", [x(B, s, D)]))
    yield Case(target, ("...d,de->...e", [x(B, s, D), x(D, 4)]))


@cases(aten.tril.default, aten.triu.default)
def triangle(target: Any, s: int) -> Iterator[Case]:
    for diagonal in (0, 1, -2):
        yield Case(target, (x(B, s, 5), diagonal))
        yield Case(target, (x(s, s), diagonal))
        yield Case(target, (x(B, 3, 2 * s), diagonal))


@cases(aten.cosine_similarity.default)
def cosine_similarity(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(B, s, D), -1))
    yield Case(target, (x(B, s, 1, D), x(B, s, 4, D), -1))
    yield Case(target, (x(B, D, s), x(D, s), 1))
    yield Case(target, (x(s, D), x(B, s, D)))


@cases(aten.prelu.default)
def prelu(target: Any, s: int) -> Iterator[Case]:
    for shape in ((s, 4, 5), (B, s, D), (B, 4, s), (B, s)):
        yield Case(target, (x(*shape) - 0.5, x(1)))
        yield Case(target, (x(*shape) - 0.5, x(shape[1])))


@cases(aten.group_norm.default, aten.instance_norm.default, aten.batch_norm.default)
def norm_of_channels(target: Any, s: int) -> Iterator[Case]:
    for shape in ((s, 4, 5), (B, 4, s), (B, 4, 2, 2 * s)):
        weights = (x(4), x(4))
        if target is aten.group_norm.default:
            yield Case(target, (x(*shape), 2, *weights))
        elif target is aten.instance_norm.default:
            yield Case(target, (x(*shape), *weights, None, None, True, 0.1, 1e-5, False))
        else:
            for training in (False, True):
                yield Case(target, (x(*shape), *weights, x(4), x(4), training, 0.1, 1e-5, False), buffers=(3, 4))
            yield Case(target, (x(*shape), *weights, None, None, True, 0.1, 1e-5, False))


@cases(*(target for target in POOLS if "pool" in str(target)))
def pool(target: Any, s: int) -> Iterator[Case]:
    rank = POOLS[target]
    yield Case(target, (x(s, 4, *(4,) * rank), [2] * rank))
    if s > 1:
        yield Case(target, (x(B, 4, s, *(4,) * (rank - 1)), [2] * rank))
    if "adaptive_avg" in str(target):
        yield Case(target, (x(B, 4, s, *(4,) * (rank - 1)), [1] * rank))
        yield Case(target, (x(4, *(4,) * (rank - 1), 2 * s), [1] * rank))


@cases(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def shuffle(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(s, 4, 4, 4), 2))


@cases(aten.im2col.default)
def im2col(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(s, 2, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]))


@cases(aten.col2im.default)
def col2im(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(s, 8, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]))
    yield Case(target, (x(B, 18, 3 * s), [2 * s, 6], [3, 3], [1, 1], [1, 1], [2, 2]))  # rows of 3, which overlap
    yield Case(target, (x(B, 8, s), [s + 1, 2], [2, 2], [1, 1], [0, 0], [1, 1]))
    yield Case(target, (x(B, 8, s), [1, 2 * s], [1, 4], [1, 1], [0, 1], [1, 2]))


@cases(*RESIZES)
def resize(target: Any, s: int) -> Iterator[Case]:
    rank, corners = RESIZES[target], [False] if "align_corners" in str(target._schema) else []
    yield Case(target, (x(s, 4, *(4,) * rank), [3] * rank, *corners, None))
    yield Case(target, (x(B, s, *(4,) * rank), None, *corners, [2.0] * rank))
    if s > 1:
        yield Case(target, (x(B, 4, s, *(4,) * (rank - 1)), [2 * s] * rank, *corners, None))


@cases(aten.unfold.default)
def unfold(target: Any, s: int) -> Iterator[Case]:
    for dim in (1, 2):
        yield Case(target, (x(B, s, 4), dim, 2, 1))


@cases(aten.broadcast_tensors.default)
def broadcast_tensors(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, ([x(B, s, D), x(s, 1)],))
    yield Case(target, ([x(1, s), x(s, 1), x(s, s)],))


@cases(aten.index.Tensor)
def index(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(7, D), [integers(B, s, high=7)]))
    yield Case(target, (x(B, s, D), [None, None, integers(4, high=D)]))
    yield Case(target, (x(B, s, D), [None, integers(s, high=s)]))
    yield Case(target, (x(B, s, D), [torch.arange(B)[:, None], integers(B, s, high=s)]))
    yield Case(target, (x(s, s, D), [integers(s, 1, high=s), integers(s, high=s)]))
    yield Case(target, (x(B, s, D), [integers(s, high=B), None, integers(s, high=D)]))
    yield Case(target, (x(B, s, D), [None, x(s) > 0.4]))
    yield Case(target, (x(s, D), [integers(1, high=s)]))
    yield Case(target, (x(B, s, D) > 0.4, [None, integers(s + 1, high=s)]))
    yield Case(target, (x(s, D) > 0.4, [integers(1, high=s)]))


@cases(aten.index_select.default)
def index_select(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(7, D), 0, integers(s, high=7)))
    yield Case(target, (x(B, s, 5), -1, integers(3, high=5)))
    yield Case(target, (x(B, s, 5), 1, integers(s, high=s)))
    yield Case(target, (x(B, s, 5) > 0.4, 1, integers(1, high=s)))
    yield Case(target, (x(B, s, 5), 1, integers(s + 1, high=s)))


@cases(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def create(target: Any, s: int) -> Iterator[Case]:
    value = (1.5,) if target is aten.full.default else ()
    has_values = target is not aten.empty.memory_format
    yield Case(target, ([B, s, D], *value), has_values=has_values)
    yield Case(target, ([s, 2 * s], *value), has_values=has_values)


@cases(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new(target: Any, s: int) -> Iterator[Case]:
    value = (1.5,) if target is aten.new_full.default else ()
    has_values = target is not aten.new_empty.default
    yield Case(target, (x(B, s, D), [s, 2 * s], *value), has_values=has_values)


@cases(aten.linear.default)
def linear(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(5, D), x(5)))
    yield Case(target, (x(B, s, D), x(5, D)))
    yield Case(target, (x(s, D), x(s, D), x(s)))
    yield Case(target, (x(B, D, s), x(5, s)))  # mixes tokens
    yield Case(target, (x(B, D, s), x(5, s), x(5)))
    yield Case(target, (x(B, s, D), x(D)))
    yield Case(target, (x(s), x(2 * s, s)))


@cases(aten.matmul.default)
def matmul(target: Any, s: int) -> Iterator[Case]:
    for left, right in (
        ((B, s, D), (D, 5)),
        ((B, s, D), (B, D, s)),
        ((B, D, s), (B, s, D)),
        ((1, s, D), (s, D, 2)),
        ((s, D), (B, D, s)),
        ((s,), (s,)),
        ((s,), (B, s, D)),
        ((B, s, D), (D,)),
        ((B, 1, s, D), (H, D, s)),
        ((s, 2, D), (s, D, 2)),
    ):
        yield Case(target, (x(*left), x(*right)))


@cases(aten.mm.default)
def mm(target: Any, s: int) -> Iterator[Case]:
    for left, right in (((2 * s, D), (D, 5)), ((D, s), (s, 5)), ((s, s), (s, s)), ((D, 2), (2, s))):
        yield Case(target, (x(*left), x(*right)))


@cases(aten.bmm.default)
def bmm(target: Any, s: int) -> Iterator[Case]:
    for left, right in (((B, s, D), (B, D, s)), ((B, D, s), (B, s, D)), ((s, 2, D), (s, D, 2))):
        yield Case(target, (x(*left), x(*right)))


@cases(aten.addmm.default)
def addmm(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(5), x(s, D), x(D, 5)), {"beta": 0.5, "alpha": 2.0})
    yield Case(target, (x(s, 5), x(s, D), x(D, 5)))
    yield Case(target, (x(1, 5), x(s, D), x(D, 5)))
    yield Case(target, (x(s), x(s, D), x(D, s)))
    yield Case(target, (x(5), x(D, s), x(s, 5)))


@cases(aten.conv1d.default, aten.conv1d.padding)
def convolution(target: Any, s: int) -> Iterator[Case]:
    paddings = ([0], [1], [3]) if target is aten.conv1d.default else ("same", "valid")
    for k, dilation in ((1, 1), (2, 1), (3, 2)):
        for padding in paddings:
            given = (
                {"same": dilation * (k - 1), "valid": 0}.get(padding) if isinstance(padding, str) else 2 * padding[0]
            )
            if s + given <= dilation * (k - 1):
                continue
            yield Case(target, (x(B, 4, s), x(6, 2, k), x(6), [1], padding, [dilation], 2))
            yield Case(target, (x(3, s), x(2, 3, k), None, [1], padding, [dilation]))
    yield Case(target, (x(s, 3, 5), x(2, 3, 2), x(2), [2]))  # the tokens are the batch
    yield Case(target, (x(B, 3, 2 * s), x(2, 3, 2), x(2), [2]))


@cases(aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding, aten.convolution.default)
def convolution_in_space(target: Any, s: int) -> Iterator[Case]:
    rank = 3 if "conv3d" in str(target) else 2
    ones, space = [1] * rank, (3,) * (rank - 2)
    paddings = (ones, [0, 2, 1][:rank]) if target._overloadname == "default" else ("same", "valid")
    for padding in paddings:
        rest: tuple[Any, ...] = (ones,) if target is not aten.convolution.default else (ones, False, [0] * rank, 1)
        yield Case(
            target, (x(B, 3, s, 3, *space), x(4, 3, 2 if padding is ones else 1, 3, *space), x(4), ones, padding, *rest)
        )
        yield Case(target, (x(s, 3, 3, 3, *space), x(4, 3, 3, 3, *space), x(4), ones, padding, *rest))


@cases(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(target: Any, s: int) -> Iterator[Case]:
    rank = int(str(target)[len("aten.conv_transpose")])
    yield Case(target, (x(s, 3, *(2,) * rank), x(3, 2, *(2,) * rank), x(2)))
    yield Case(target, (x(B, 3, s, *(2,) * (rank - 1)), x(3, 2, *(2,) * rank), x(2)))
    yield Case(target, (x(B, 4, s, *(2,) * (rank - 1)), x(4, 2, *(2,) * rank), x(4), [2], [0], [0], 2))  # each to 2
    yield Case(target, (x(B, 3, s, *(2,) * (rank - 1)), x(3, 2, *(2,) * rank), None, [3], [0], [1]))
    yield Case(target, (x(B, 4, s, *(2,) * (rank - 1)), x(4, 2, *(4,) * rank), x(4), [2], [1], [0], 2))  # they overlap
    yield Case(target, (x(B, 3, s, *(2,) * (rank - 1)), x(3, 2, *(3,) * rank), None, [1], [1], [0], 1, [2]))
    yield Case(
        target, (x(B, 3, s, *(2,) * (rank - 1)), x(3, 2, *(6,) * rank), None, [2], [0])
    )  # more than two for each


@cases(aten.embedding.default)
def embedding(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(7, D), integers(B, s, high=7)))
    yield Case(target, (x(7, D), integers(s, high=7), 2))
    yield Case(target, (x(s, D), integers(s, s, high=s)))
    yield Case(target, (x(7, D), integers(B, s, high=7), -1, True))  # gradients over counts that no rank knows


@cases(
    aten.softmax.int,
    aten.log_softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.glu.default,
    aten.argsort.default,
    aten.sort.default,
    aten.flip.default,
    aten.roll.default,
    aten.topk.default,
)
def along_dim(target: Any, s: int) -> Iterator[Case]:
    def arguments(dim: int) -> tuple[Any, ...]:
        if target in (aten._softmax.default, aten._log_softmax.default):
            return (dim, False)
        if target is aten.roll.default:
            return ([1], [dim])
        return {aten.flip.default: ([dim],), aten.topk.default: (2, dim)}.get(target, (dim,))

    yield Case(target, (x(B, s, 4), *arguments(-1)))
    yield Case(target, (x(s, s, 4), *arguments(2)))
    yield Case(target, (x(4, 2 * s), *arguments(0)))
    yield Case(target, (x(4, 2 * s), *arguments(1)))
    if target is aten.roll.default:
        yield Case(target, (x(B, s, 4), [1]))  # rolls the flattened tensor


@cases(torch.ops.cpcompile.recurrence.default)
def recurrence(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(B, s, D), 1, False))
    yield Case(target, (x(B, s, 1, 1), x(B, s, D, 2), 1, False))
    yield Case(target, (x(1, 2, s), x(B, 2, s), 2, False))
    yield Case(target, (x(B, 3, s), x(B, 3, s), 1, False))
    yield Case(target, (x(B, s, D, D), x(B, s, D, 2), 1, True))
    yield Case(target, (x(1, 3, D, D), x(s, 3, D, s), 1, True))


REDUCTIONS_OF_ONE_DIM = (
    aten.argmax.default, aten.argmin.default, aten.all.dim, aten.any.dim, aten.max.dim, aten.min.dim, aten.prod.dim_int,
)  # fmt: skip
ARE_TRUE = (aten._is_all_true.default, aten._is_any_true.default)
OF_TRUTH = (aten.all.default, aten.all.dim, aten.all.dims, aten.any.default, aten.any.dim, aten.any.dims)


def reduced_values(target: Any, *shape: int) -> list[torch.Tensor]:
    """Return what a reduction is tried on: numbers with ties and with zeros, and what else it takes."""
    ties = torch.randint(-1, 2, shape).double()
    if target in ARE_TRUE:
        return [ties > 0, torch.ones(shape).bool()]
    if target in OF_TRUTH:
        return [ties, ties > 0, torch.ones(shape, dtype=torch.uint8), torch.zeros(shape)]
    if target in (aten.var.correction, aten.linalg_vector_norm.default, aten.logsumexp.default):
        return [x(*shape), torch.zeros(shape, dtype=torch.float64)]
    return [x(*shape), ties]


@cases(
    *REDUCTIONS_OF_ONE_DIM,
    aten.all.dims,
    aten.any.dims,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
)
def reduction(target: Any, s: int) -> Iterator[Case]:
    is_single = target in REDUCTIONS_OF_ONE_DIM
    for shape, dim in (((B, s, 4), -1), ((B, s, 4), 1), ((s, s, 2), 0), ((4, 2 * s), 0), ((3, 4 * s), 1)):
        for given in reduced_values(target, *shape):
            yield Case(target, (given, dim if is_single else [dim], True))
            yield Case(target, (given, dim if is_single else [dim]))
    if not is_single:
        yield Case(target, (x(B, s, 4), [0, 2]))
        yield Case(target, (x(B, s, 4), [0, 1], True))
        yield Case(target, (x(B, 2 * s, 4), [2, 1]))
    if target in (
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.any.dims,
        aten.all.dims,
    ):
        yield Case(target, (x(B, s, 4), []))
    if target in (aten.sum.dim_IntList, aten.mean.dim):
        yield Case(target, (integers(B, s, 4, high=9), [1]), {"dtype": torch.float64})
    if target in (aten.argmax.default, aten.argmin.default):
        yield Case(target, (x(B, s, 4),))
        yield Case(target, (torch.randint(0, 2, (B, 2 * s, 2)), None, True))
    if target in (aten.max.dim, aten.amin.default, aten.amax.default, aten.argmin.default):
        if target is not aten.argmin.default:
            yield Case(target, (torch.randint(0, 2, (B, s)).bool(), 1))
        yield Case(target, (torch.full((B, s), torch.iinfo(torch.int64).max - 1), 1))
        yield Case(target, (torch.full((B, s), -float("inf")), 1))


@cases(
    aten.sum.default,
    aten.mean.default,
    aten.max.default,
    aten.min.default,
    aten.all.default,
    aten.any.default,
    aten._is_all_true.default,
    aten._is_any_true.default,
    aten.prod.default,
)
def total(target: Any, s: int) -> Iterator[Case]:
    for shape in ((B, s, 4), (2 * s, s), (s,)):
        for given in reduced_values(target, *shape):
            yield Case(target, (given,))
    if target in (aten.sum.default, aten.mean.default, aten.prod.default):
        yield Case(target, (integers(B, s, high=9),), {"dtype": torch.float64})


@cases(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_nonzero(target: Any, s: int) -> Iterator[Case]:
    for dim in (1, 2) if target is aten.count_nonzero.default else ([1], [0, 1], [2]):
        yield Case(target, (integers(B, s, 4, high=2), dim))
    if target is aten.count_nonzero.default:
        yield Case(target, (integers(B, 2 * s, high=2).bool(),))


@cases(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
def variance(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 4), [-1]), {"correction": 0, "keepdim": True})
    yield Case(target, (x(s, s, 4), [2]))
    yield Case(target, (x(B, s, 4), [1]))
    yield Case(target, (x(B, 2 * s, 4), [0, 1]), {"correction": 0.5, "keepdim": True})
    yield Case(target, (x(B, s, 4),))
    yield Case(target, (torch.ones(B, s, 4, dtype=torch.float64), [1]))


@cases(
    aten.var.default,
    aten.var.dim,
    aten.std.default,
    aten.std.dim,
    aten.var_mean.default,
    aten.var_mean.dim,
    aten.std_mean.default,
    aten.std_mean.dim,
)
def variance_of_old(target: Any, s: int) -> Iterator[Case]:
    for arguments in ((False,), (True,)) if target._overloadname == "default" else (([1], False, True), ([1, 2],)):
        yield Case(target, (x(B, s, 4), *arguments))


@cases(aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default, aten.norm.Scalar)
def norm_of_dims(target: Any, s: int) -> Iterator[Case]:
    for order in (2, 1, float("inf"), -float("inf"), 0, 3):
        if target is aten.norm.Scalar:
            yield Case(target, (x(B, s, 4) - 0.5, order))
            yield Case(target, (x(4 * s) - 0.5, order))
            continue
        for shape, dim in (((B, s, 4), -1), ((s, s, 4), 2), ((B, s, 4), 1), ((B, 2 * s, 4), 1)):
            yield Case(target, (x(*shape) - 0.5, order, [dim], True))
    if target is aten.linalg_vector_norm.default:
        yield Case(target, (x(B, s, 4),))
        yield Case(target, (torch.zeros(B, s, 4, dtype=torch.float64), 2, [1]))


@cases(aten.layer_norm.default, aten.rms_norm.default)
def norm(target: Any, s: int) -> Iterator[Case]:
    biases = (x(4),) if target is aten.layer_norm.default else ()
    yield Case(target, (x(B, s, 4), [4], x(4), *biases))
    yield Case(target, (x(s, s, 4), [4]))
    yield Case(target, (x(B, s, 4), [s, 4]))
    yield Case(target, (x(4, s), [s], x(s)))


@cases(aten.cross_entropy_loss.default, aten.nll_loss_nd.default)
def loss(target: Any, s: int) -> Iterator[Case]:
    classes = 5

    def labels(*shape: int) -> torch.Tensor:
        drawn = integers(*shape, high=classes)
        drawn.view(-1)[::3] = -100
        return drawn

    for reduction in (0, 1, 2):
        yield Case(target, (x(B * s, classes), labels(B * s), None, reduction))
        yield Case(target, (x(B, classes, s), labels(B, s), None, reduction))
        yield Case(target, (x(s, classes), labels(s), x(classes), reduction), buffers=(2,))
        yield Case(target, (x(B, s, 2), integers(B, 2, high=s), None, reduction))  # the classes are no tokens
        yield Case(target, (x(B, s), integers(B, high=s), None, reduction))  # they are
        yield Case(target, (x(s), torch.tensor(1), x(s), reduction), buffers=(2,))
    yield Case(target, (x(s, classes), torch.full((s,), 4), None, 1, 3))
    yield Case(target, (x(classes), torch.tensor(2)))
    if target is aten.cross_entropy_loss.default:
        for reduction in (0, 1, 2):
            yield Case(target, (x(B * s, classes), labels(B * s), None, reduction, -100, 0.1))
            yield Case(target, (x(s, classes), labels(s), x(classes), reduction, -100, 0.1), buffers=(2,))
            yield Case(target, (x(s, classes), x(s, classes).softmax(1), None, reduction))
            yield Case(
                target, (x(B, classes, s), x(B, classes, s).softmax(1), x(classes), reduction, -100, 0.1), buffers=(2,)
            )


@cases(aten.nll_loss.default, aten.nll_loss2d.default)
def loss_of_labels(target: Any, s: int) -> Iterator[Case]:
    for reduction in (0, 1, 2):
        if target is aten.nll_loss.default:
            yield Case(target, (x(s, 5), integers(s, high=5), None, reduction, 1))
        else:
            yield Case(target, (x(B, 5, s, 2), integers(B, s, 2, high=5), x(5), reduction), buffers=(2,))


PAIRS = (
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.hinge_embedding_loss.default,
    aten.huber_loss.default,
    aten.kl_div.default,
    aten.l1_loss.default,
    aten.margin_ranking_loss.default,
    aten.mse_loss.default,
    aten.poisson_nll_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
)


@cases(*PAIRS)
def loss_of_pairs(target: Any, s: int) -> Iterator[Case]:
    for shape in ((B, s, 3), (s, s), (B * s, 3)):
        for reduction in (0, 1, 2):
            given = [x(*shape), x(*shape)]
            if target is aten.margin_ranking_loss.default:
                given.append(x(*shape).round() * 2 - 1)
            if target is aten.poisson_nll_loss.default:
                yield Case(target, (*given, True, True, 1e-8, reduction))
            else:
                is_label = target is aten.soft_margin_loss.default
                yield Case(target, tuple(given), {"reduction": reduction}, buffers=(1,) if is_label else ())
    if target is aten.binary_cross_entropy_with_logits.default:
        yield Case(target, (x(B, s, 3), x(B, s, 3), None, x(3)), buffers=(2,))
    if target is aten.mse_loss.default:
        yield Case(target, (x(B, s, 3), x(s, 1)), {"reduction": 0})


@cases(torch.ops.cpcompile.whole_tokens.default)
def whole_tokens(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D),))


@cases(torch.ops.cpcompile.attention.default)
def attention(target: Any, s: int) -> Iterator[Case]:
    def call(strategy: str, **changes: Any) -> Case:
        given: dict[str, Any] = {
            "q": x(B, H, s, 8),
            "k": x(B, 2, s, 8),
            "v": x(B, 2, s, 8),
            "mask": None,
            "documents": None,
            "key_padding": None,
            "scale": 0.5,
            "is_causal": True,
            "window": 0,
            "softcap": 0.0,
            "dropout": 0.0,
        }
        return Case(target, tuple((given | changes).values()), strategy=strategy)

    for strategy in ("ring", "gather", "ulysses"):
        yield call(strategy)
        yield call(strategy, window=3, softcap=2.0, documents=torch.arange(s).expand(B, s) // 3)
        yield call(strategy, mask=x(1, H, s, s) > 0.5, is_causal=False)
        yield call(strategy, mask=x(B, 1, 1, s) > 0.5, key_padding=torch.arange(s).expand(B, s) > 1)
    heads, rows = ({name: x(*shape, 5, 8) for name in "qkv"} for shape in ((B, s), (s, 2)))
    yield call("ring", **heads, mask=x(s, 5, 5) > 0.3, is_causal=False)
    yield call("ulysses", **heads, mask=x(B, 1, 5, 5) > 0.3, documents=torch.arange(5).expand(B, 5) // 3)
    yield call("gather", **rows, mask=x(s, 1, 1, 5) > 0.5, key_padding=torch.arange(5).expand(s, 5) > 1)


@cases(aten.slice_scatter.default)
def slice_scatter(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, 5), x(B, s, 2), 2, 1, 3))
    yield Case(target, (x(B, s, 5), x(B, s, 2), -1, -4, 9223372036854775807, 2))
    yield Case(target, (x(B, s, D), x(1, s, D), 0, 1, 2))


@cases(aten.select_scatter.default)
def select_scatter(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), x(B, s), 2, 1))
    yield Case(target, (x(B, s, D), x(s, D), 0, -1))
    yield Case(target, (x(B, s, D), x(B, D), 1, 0))


@cases(aten.diagonal_scatter.default)
def diagonal_scatter(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(s, D, D), x(s, D), 0, 1, 2))
    yield Case(target, (x(B, s, D), x(s, B), 0, 0, 2))
    yield Case(target, (x(s, s, D), x(D, s)))


@cases(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(target: Any, s: int) -> Iterator[Case]:
    last = ("sum",) if target is aten.scatter_reduce.two else ()
    is_value = target is aten.scatter.value
    for base, shape, dim in (
        ((B, s, 5), (B, s, 2), 2),
        ((B, s, 5), (B, s, 5), 1),
        ((B, 2 * s, 5), (B, s, 2), 2),
        ((s, s, 5), (1, s, 2), 2),
    ):
        index = torch.rand(base).argsort(dim)[tuple(slice(0, size) for size in shape)].contiguous()
        yield Case(target, (x(*base), dim, index, 0.5 if is_value else x(*shape), *last))
    if target is aten.scatter_add.default:
        yield Case(target, (x(4), 0, integers(s, high=4), x(s)))
        yield Case(target, (x(4, 3), 0, integers(2 * s, 3, high=4), x(2 * s, 3)))
        yield Case(target, (x(B, 4, 3), 1, integers(B, s, 3, high=4), x(B, s, 3)))


@cases(aten.index_add.default, aten.index_copy.default, aten.index_reduce.default)
def index_add(target: Any, s: int) -> Iterator[Case]:
    last = ("amax",) if target is aten.index_reduce.default else ()
    yield Case(target, (x(B, s, 5), 2, torch.tensor([3, 0]), x(B, s, 2), *last))
    yield Case(target, (x(3, s, 5), -3, torch.tensor([2, 0]), x(2, s, 5), *last))
    yield Case(target, (x(B, s, 5), 1, torch.arange(s).flip(0), x(B, s, 5), *last))
    if target is aten.index_add.default:
        yield Case(target, (x(B, 4, 3), 1, integers(s, high=4), x(B, s, 3)), {"alpha": 0.5})
        yield Case(target, (x(4), 0, integers(2 * s, high=4), x(2 * s)))


@cases(*TRANSFORMS)
def transform(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), None, 1))
    yield Case(target, (x(B, s, D), 2 * s, -2, "ortho"))
    yield Case(target, (x(s, 4), s, 1))
    yield Case(target, (x(D, s, s),))


@cases(aten.conj.default, aten._conj.default, aten.resolve_conj.default)
def conjugate(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (torch.complex(x(B, s, D), x(B, s, D)),))


@cases(aten.fft_fftshift.default, aten.fft_ifftshift.default)
def shift_of_frequencies(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (x(B, s, D), [1]))
    yield Case(target, (x(s, 4), [-1]))


@cases(aten.linalg_solve_triangular.default)
def triangular(target: Any, s: int) -> Iterator[Case]:
    system = x(s, 3, 3).tril() + 3 * torch.eye(3, dtype=torch.float64)
    yield Case(target, (system, x(s, 3, 2)), {"upper": False})
    yield Case(target, (system[:1], x(s, 3, s)), {"upper": False, "unitriangular": True})
    yield Case(target, (system.mT.contiguous(), x(s, 2, 3)), {"upper": True, "left": False})


@cases(aten.cdist.default, aten._cdist_forward.default)
def distances(target: Any, s: int) -> Iterator[Case]:
    last = (2.0, None) if target is aten._cdist_forward.default else ()
    yield Case(target, (x(B, s, D), x(B, 4, D), *last))
    yield Case(target, (x(s, D), x(s, D), *last))
    yield Case(target, (x(s, 1, 4, D), x(B, 3, D), *last))


@cases(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(target: Any, s: int) -> Iterator[Case]:
    value = x() if target is aten.index_fill.int_Tensor else 0.25
    yield Case(target, (x(B, s, 5), 2, torch.tensor([3, 0]), value))
    yield Case(target, (x(B, s, 5), 1, torch.tensor([0]), value))


@cases(aten.index_put.default)
def index_put(target: Any, s: int) -> Iterator[Case]:
    index = torch.tensor([3, 0, 3])
    yield Case(target, (x(5, s, D), [index], x(3, s, D), True))
    yield Case(target, (x(5, s, D), [index], x(D), True))
    yield Case(target, (x(B, s, 5), [None, None, index], x(B, s, 3), True))
    yield Case(target, (x(5, 4, s), [index, index], x(3, s), True))
    yield Case(target, (x(5, s, 4), [index, None, index], x(3, s), True))
    yield Case(target, (x(B, s, 5), [None, torch.arange(s)], x(B, s, 5)))
    yield Case(target, (x(5, s, D), [torch.tensor([[1], [2]]), None, torch.tensor([0, 2])], x(2, 2, s), True))
    mask = x(B, s) > 0.5
    yield Case(target, (x(B, s, D), [mask], x()))
    yield Case(target, (x(B, s, D), [mask], x(D), True))
    yield Case(target, (x(B, s, D), [mask], x(1, D)))
    yield Case(target, (x(B, s, s), [mask], x(s)))
    yield Case(target, (x(B, s, D), [None, mask[0]], x(D)))


def all_targets() -> list[torch._ops.OpOverload]:
    return sorted(RULES, key=str)


def settings(seed: int, count: int) -> list[tuple[int, int, str]]:
    """Return (length, ranks, layout) drawn at random, without repetition."""
    lengths, ranks, layouts = (2, 3, 5, 6, 8, 12), (1, 2, 3, 4, 8), ("contiguous", "zig_zag")
    return random.Random(seed).sample(list(itertools.product(lengths, ranks, layouts)), count)


@cases(aten.histc.default)
def histc(target: Any, s: int) -> Iterator[Case]:
    for shape in ((B, s), (s,), (2 * s, 3)):
        yield Case(target, (integers(*shape, high=9).double(), 5, 0, 4))
        yield Case(target, (x(*shape), 4, -1.0, 0.5))


@cases(aten.bincount.default)
def bincount(target: Any, s: int) -> Iterator[Case]:
    yield Case(target, (integers(s, high=5), None, 5))
    yield Case(target, (integers(2 * s, high=4).int(), None, 7))


@cases(aten.masked_scatter.default)
def masked_scatter(target: Any, s: int) -> Iterator[Case]:
    for mask in (x(B, s, D) > 0.5, x(B, s, 1) > 0.5, x(s, 1) > 0.5, x(1, s, D) > 0.5, x(B, 1, 1) > 0.5):
        yield Case(target, (x(B, s, D), mask, x(B * s + 1, D)))
    yield Case(target, (x(B, s, 2, D), x(B, s, 1, 1) > 0.5, x(B * s, 2, D)))
    yield Case(target, (x(s), x(s) > 0.5, x(s)))
    yield Case(target, (x(B * s, D), x(B * s, 1) > 0.5, x(B * s, D)))
    yield Case(target, (x(B, s, D), x(B, s, 1) > 0.5, x(B * s * D + 1)))
    yield Case(target, (integers(B, s, high=9), x(B, s) > 0.5, integers(B * s, high=9)))
    yield Case(target, (x(B, s, D), x(B, s, 1) > 2, x(0, D)))
