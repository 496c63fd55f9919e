"""Operators that move, cut, join or repeat dims without touching what is along the tokens."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.ir.operator_call import Call
from cpcompile.rules.pointwise import aligned, is_one
from cpcompile.rules.registry import Indices, Names, rule

aten = torch.ops.aten


def own(call: Call, operand: str = "self") -> Names:
    """Return the names of the dims of `operand`."""
    return tuple(f"d{i}" for i in range(len(call.shape(operand))))


def closed(names: Names, dim: int) -> Names:
    """Return `names` with `dim` closed, because the operator cuts or joins along it."""
    return (*names[:dim], None, *names[dim + 1 :])


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(call: Call) -> Indices:
    """[... a ... b ...] -> [... b ... a ...]"""
    names = own(call)
    first, second = ("dim0", "dim1") if "dim0" in call else ("axis0", "axis1")
    a, b = call.dim(first, "self"), call.dim(second, "self")
    swapped = list(names)
    swapped[a], swapped[b] = names[b], names[a]
    return Indices({"self": names}, (tuple(swapped),))


@rule(aten.numpy_T.default)
def reverse(call: Call) -> Indices:
    """[a b c] -> [c b a]"""
    return Indices({"self": own(call)}, (own(call)[::-1],))


@rule(aten.t.default, aten.mT.default)
def t(call: Call) -> Indices:
    """[... a b] -> [... b a]"""
    names = own(call)
    return Indices({"self": names}, ((*names[:-2], *reversed(names[-2:])),))


@rule(aten.permute.default)
def permute(call: Call) -> Indices:
    """[a b c] -> [c a b]"""
    names = own(call)
    return Indices({"self": names}, (tuple(names[int(d) % len(names)] for d in call["dims"]),))


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(call: Call) -> Indices:
    """[a b c] -> [b c a]"""
    names = own(call)
    given, wanted = (
        call[name] if isinstance(call[name], list | tuple) else [call[name]] for name in ("source", "destination")
    )
    to = {int(d) % len(names): names[int(s) % len(names)] for s, d in zip(given, wanted, strict=True)}
    rest = iter(name for name in names if name not in to.values())
    return Indices({"self": names}, (tuple(to[d] if d in to else next(rest) for d in range(len(names))),))


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(call: Call) -> Indices:
    """[a 1] -> [n a b]"""
    shape = tuple(call.result.shape)
    result = tuple(f"d{i}" for i in range(len(shape)))
    return Indices({"self": aligned(call.shape("self"), shape)}, (result,), sizes="size")


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(call: Call) -> Indices:
    """[a 1], [b] -> [a b], [a b]"""
    shape = tuple(call.result[0].shape)
    result = tuple(f"d{i}" for i in range(len(shape)))
    operands = {name: aligned(call.shape(name), shape) for name, _ in call.operands()}
    return Indices(operands, (result,) * len(call.result))


@rule(aten.expand_as.default)
def expand_as(call: Call) -> Indices:
    """[a 1], [n a b] -> [n a b]"""
    names = own(call, "other")
    return Indices({"self": aligned(call.shape("self"), call.shape("other")), "other": names}, (names,))


@rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(call: Call) -> Indices:
    """[a], [b] -> [a b], [a b]"""
    operands: dict[str, Names] = {
        name: (f"d{i}",)[: len(call.shape(name))] for i, (name, _) in enumerate(call.operands())
    }
    names = [f"d{i}" for i in range(len(operands))]
    if call.arguments.get("indexing") == "xy":
        names[:2] = names[1::-1]
    return Indices(operands, (tuple(names),) * len(names))


@rule(aten.view_as_complex.default, aten.view_as_real.default)
def pairs(call: Call) -> Indices:
    """[a 2] -> [a], or back"""
    names = own(call)
    if call.target is aten.view_as_real.default:
        return Indices({"self": names}, ((*names, None),))
    return Indices({"self": closed(names, len(names) - 1)}, (names[:-1],))


@rule(aten.repeat.default, aten.tile.default)
def repeat(call: Call) -> Indices:
    """[a b] -> [a (n b)], closed where n > 1"""
    names, repeats = own(call), list(call["repeats"] if "repeats" in call else call["dims"])
    repeats = [1] * (len(names) - len(repeats)) + repeats
    new = (None,) * (len(repeats) - len(names))
    kept = tuple(n if is_one(r) else None for n, r in zip(names, repeats[len(new) :], strict=True))
    return Indices({"self": kept}, ((*new, *kept),))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call) -> Indices:
    """[a b] -> [a (b n)], closed along b; all dims when none is given, because the result is flat"""
    if call["dim"] is None:
        return Indices({"self": (None,) * len(own(call))}, ((None,),))
    names = closed(own(call), call.dim("dim", "self"))
    return Indices({"self": names}, (names,))


@rule(aten.narrow.default, aten.pad.default, aten.constant_pad_nd.default, aten.diff.default)
def cut(call: Call) -> Indices:
    """[a b] -> [a b'], closed along b"""
    names = own(call)
    if "pad" in call:
        amounts: list[Any] = list(call["pad"])
        for i in range(len(amounts) // 2):
            if not (amounts[2 * i] == 0 and amounts[2 * i + 1] == 0):
                names = closed(names, len(names) - 1 - i)
    else:
        names = closed(names, call.dim("dim", "self"))
    return Indices({name: names for name, _ in call.operands()}, (names,))


@rule(aten.gather.default)
def gather(call: Call) -> Indices:
    """[a v], [a c] -> [a c], where v is whole; closed along a where the index is smaller, because it reads the front only"""
    dim, names = call.dim("dim", "self"), own(call)
    same = [bool(a == b) for a, b in zip(call.shape("self"), call.shape("index"), strict=True)]
    names = tuple(name if equal else None for name, equal in zip(names, same, strict=True))
    read, found = ((*names[:dim], name, *names[dim + 1 :]) for name in ("v", "i"))
    return Indices({"self": read, "index": found}, (found,), gathers=("self",))


@rule(aten.select.int)
def select(call: Call) -> Indices:
    """[a b] -> [a], closed along b"""
    names, dim = own(call), call.dim("dim", "self")
    return Indices({"self": closed(names, dim)}, ((*names[:dim], *names[dim + 1 :]),))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections)
def split(call: Call) -> Indices:
    """[a (b c)] -> [a b], [a c], closed along the dim that is split"""
    names, dim = own(call), call.dim("dim", "self")
    result = (*names[:dim], *names[dim + 1 :]) if call.target is aten.unbind.int else closed(names, dim)
    return Indices({"self": closed(names, dim)}, (result,) * len(call.result))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(call: Call) -> Indices:
    """[a b], [a c] -> [a (b c)], closed along the dim that is joined"""
    rank = call.result.dim()
    names: Names = tuple(f"d{i}" for i in range(rank))
    # torch skips empty vectors whatever the other shapes are; the first step of a key-value cache joins one
    # with the keys.
    joined = [name for name, _ in call.operands() if rank == 1 or call.shape(name) != (0,)]
    if len(joined) > 1:
        names = closed(names, int(call["dim"]) % rank)
    return Indices(dict.fromkeys(joined, names), (names,))


@rule(aten.stack.default)
def stack(call: Call) -> Indices:
    """[a b], [a b] -> [a n b]"""
    names = own(call, "tensors.0")
    dim = int(call["dim"]) % (len(names) + 1)
    return Indices({name: names for name, _ in call.operands()}, ((*names[:dim], None, *names[dim:]),))


@rule(aten.one_hot.default)
def one_hot(call: Call) -> Indices:
    """[...] -> [... c], closed where the largest index of all tokens says how many classes there are"""
    names: Names = (None,) * len(own(call)) if call["num_classes"] == -1 else own(call)
    return Indices({"self": names}, ((*names, None),))


@rule(aten.index.Tensor)
def index(call: Call) -> Indices:
    """[v ... d], [...] -> [... d], where v is whole"""
    given = [(dim, node) for dim, node in enumerate(call["indices"]) if node is not None]
    names = own(call)
    dims = [dim for dim, _ in given]
    operands: dict[str, Names] = {"self": tuple(f"v{d}" if d in dims else n for d, n in enumerate(names))}
    if any(call.tensor(f"indices.{d}").dtype in (torch.bool, torch.uint8) for d in dims) or dims != list(
        range(dims[0], dims[0] + len(dims))
    ):
        blank = tuple(None for _ in call.result.shape)
        return Indices({n: (None,) * len(call.shape(n)) for n, _ in call.operands()}, (blank,))
    shapes = {d: call.shape(f"indices.{d}") for d in dims}
    rank = max(len(s) for s in shapes.values())
    broadcast = tuple(call.result.shape)[dims[0] : dims[0] + rank]
    for d in dims:
        operands[f"indices.{d}"] = tuple(n and f"i{n}" for n in aligned(shapes[d], broadcast))
    between = tuple(f"id{i}" for i in range(rank))
    return Indices(operands, ((*names[: dims[0]], *between, *names[dims[-1] + 1 :]),), gathers=("self",))


@rule(aten.index_select.default)
def index_select(call: Call) -> Indices:
    """[a v d], [i] -> [a i d], where v is whole"""
    dim, names = call.dim("dim", "self"), own(call)
    read, found = ((*names[:dim], name, *names[dim + 1 :]) for name in ("v", "i"))
    return Indices({"self": read, "index": ("i",)}, (found,), gathers=("self",))


@rule(
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def create(call: Call) -> Indices:
    """-> [...]"""
    return Indices({}, (tuple(f"d{i}" for i in range(call.result.dim())),), sizes="size")
