"""What passes states on becomes a recurrence: products with all sums of decays, and loops that are affine in what they carry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from cpcompile.passes import find_recurrences, functionalise_writes, open_products, stack_writes

aten, cp = torch.ops.aten, torch.ops.cpcompile
TURNS = 5


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """Return the graph as the pass gets it."""
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    for before in (functionalise_writes, stack_writes, open_products):
        before(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def check_found(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    gm = traced(function, *inputs)
    assert find_recurrences(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=cp.recurrence.default)) == 1
    text = str(gm.graph)
    assert (find_recurrences(gm), str(gm.graph)) == (0, text)
    outs = gm(*inputs), function(*inputs)
    torch.testing.assert_close(*outs)
    weights = torch.rand_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in outs))


def check_left_alone(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    gm = traced(function, *inputs)
    text = str(gm.graph)
    assert (find_recurrences(gm), str(gm.graph)) == (0, text)


def numbers(*shape: int) -> Tensor:
    return (torch.rand(shape, dtype=torch.float64) - 0.5).requires_grad_()


def triangle(x: Tensor, diagonal: int) -> Tensor:
    return torch.ones(x.size(-1), x.size(-1), dtype=torch.bool).tril(diagonal)


def sums_by_column(a: Tensor, *, kept: int = -1, shown: int = 0, fill: float = -torch.inf) -> Tensor:
    """Return the sums between any two places, as Mamba-2 has them: a cumulative sum of each column."""
    columns = a[..., None].expand(*a.size(), a.size(-1)).masked_fill(~triangle(a, kept), 0)
    return columns.cumsum(-2).masked_fill(~triangle(a, shown), fill)


def sums_by_difference(a: Tensor) -> Tensor:
    total = a.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(~triangle(a, 0), -torch.inf)


def of_mamba(a: Tensor, x: Tensor) -> Tensor:
    """Pass on the states of chunks as transformers does: `a` [B, H, C], `x` [B, C, H, N]."""
    x = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
    decay = sums_by_column(F.pad(a, (1, 0))).exp().transpose(1, 3)
    return torch.einsum("bzch,bzhn->bchn", decay, x)[:, :-1]


PRODUCTS = {
    "by column": lambda a, x: sums_by_column(a).exp() @ x.transpose(1, 2),
    "by difference": lambda a, x: sums_by_difference(a).exp() @ x.transpose(1, 2),
    "padded, with zeros first": of_mamba,
    "padded, with a state first": lambda a, x: torch.einsum(
        "bhzc,bchn->bhzn", sums_by_column(F.pad(a, (1, 0))).exp(), torch.cat([x[:, :1], x], dim=1)
    ),
}
NO_PRODUCTS = {
    "sums of other places": lambda a, x: sums_by_column(a, kept=0).exp() @ x.transpose(1, 2),
    "a place more is seen": lambda a, x: sums_by_column(a, shown=1).exp() @ x.transpose(1, 2),
    "what is behind counts": lambda a, x: sums_by_column(a, fill=0.0).exp() @ x.transpose(1, 2),
    "rows are summed": lambda a, x: sums_by_column(a).exp().mT @ x.transpose(1, 2),
    "no exponentials": lambda a, x: sums_by_column(a, fill=0.0) @ x.transpose(1, 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_all_sums_of_decays(name: str) -> None:
    torch.manual_seed(0)
    check_found(PRODUCTS[name], numbers(2, 3, 6), numbers(2, 6, 3, 4))


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_other_products_are_left_alone(name: str) -> None:
    check_left_alone(NO_PRODUCTS[name], numbers(2, 3, 6), numbers(2, 6, 3, 4))


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Write what each chunk reads of the state, as transformers does: `[B, H, C, S, D]`, `g` [B, H, C]."""
    state, out = q.new_zeros(2, 2, 3, 3), torch.zeros_like(v)
    for i in range(TURNS):
        value = v[:, :, i] - k[:, :, i] @ state
        out[:, :, i] = q[:, :, i] @ state + q[:, :, i] @ k[:, :, i].transpose(-1, -2) @ value
        state = state * g[:, :, i, None, None].exp() + k[:, :, i].transpose(-1, -2) @ value
    return out


def of_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Read the state that a turn leaves, as Mamba does, and join what is read along a dim."""
    state, out = torch.zeros_like(v[:, :, 0]), []
    for q_i, k_i, v_i in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = (q_i.sigmoid() * state - k_i * v_i).to(q.dtype)  # traced, although it is the same tensor
        out.append((state * q_i).sum(-1))
    return torch.cat(out, dim=1)


def without_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, 3, 3, dtype=q.dtype), []
    for i in range(TURNS):
        state = state + k[:, :, i].mT @ v[:, :, i]
        out.append(q[:, :, i] @ state)
    return torch.stack(out, dim=2)


def constant_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, 3, 3, dtype=q.dtype), []
    for i in range(TURNS):
        out.append(q[:, :, i] @ state)
        state = k[0, 0, 0, :3] @ (0.9 * state) + v[:, :, i, :1].mT * v[:, :, i, 1:2]
    return torch.stack(out)


def rows_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Decay each row by itself, as Kimi's delta rule does."""
    state, out = torch.zeros(2, 2, 3, 3, dtype=q.dtype), []
    for i in range(TURNS):
        out.append(q[:, :, i] @ state)
        state = state * q[:, :, i, 0, :, None]
        state = state + k[:, :, i].mT @ (v[:, :, i] - k[:, :, i] @ state)
    return torch.stack(out, dim=1)


def two_states(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Divide by a state of its own."""
    state, total, out = torch.zeros(2, 2, 3, 3, dtype=q.dtype), torch.zeros(2, 2, 3, 1, dtype=q.dtype), []
    for i in range(TURNS):
        state = state + k[:, :, i].mT @ v[:, :, i]
        total = total + k[:, :, i].mT.sum(-1, keepdim=True)
        out.append(q[:, :, i] @ state / (1 + (q[:, :, i] @ total).square()))
    return torch.stack(out, dim=2)


def delta_by_hand(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Multiply and sum, as transformers writes the rule token by token; more keys than values."""
    state, out = torch.zeros(2, 2, 4, 3, dtype=q.dtype), torch.zeros_like(v[..., 0, :])
    q, k, v = q[..., 0], k[..., 0], v[..., 0, :]
    for i in range(TURNS):
        state = state * g[:, :, i].exp()[..., None, None]
        read = (state * k[:, :, i].unsqueeze(-1)).sum(dim=-2)
        delta = (v[:, :, i] - read) * g[:, :, i, None].sigmoid()
        state = state + k[:, :, i].unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, i] = (state * q[:, :, i].unsqueeze(-1)).sum(dim=-2)
    return out


def values_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Carry `[values, keys]`, as RWKV-7 does: what is summed comes last."""
    state, out = torch.zeros(2, 2, 4, 3, dtype=q.dtype), []
    for i in range(TURNS):
        r, w, a, u = q[:, :, i, 0], k[:, :, i, 0], k[:, :, i, 1], v[:, :, i, :, 0]
        state = (
            state * w.sigmoid()[..., None, :]
            + (state @ a[..., None]) @ (w * a).unsqueeze(-2)
            + u[..., None] * r[..., None, :]
        )
        out.append((state @ r[..., None]).squeeze(-1))
    return torch.stack(out, dim=1)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, 4, 3, dtype=q.dtype), []
    q, k, v = q[..., 0], k[..., 0], v[..., 0, :]
    for i in range(TURNS):
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, :, i])
        state = g[:, :, i, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, :, i], v[:, :, i] - read)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, i], state))
    return torch.stack(out, dim=2)


def from_the_right(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Multiply rows by a matrix that all turns share; a dim without a column in between."""
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = (state @ k[0, 0, 0, :3].mT) / (2 + g[:, :, i, None, None]) + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def decays_of_both(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Decay each element by itself, so that no two columns have the same matrix."""
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state
        state = state - k[:, :, i] * state.mean(-2, keepdim=True) + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def momentum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Carry a state that follows another one."""
    state, change, out = torch.zeros_like(v[:, :, 0]), torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        change = q[:, :, i] * change - v[:, :, i]
        state = k[:, :, i] * state + change
        out.append(state)
    return torch.stack(out, dim=2)


def moving_average(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Begin with what the first turn has."""
    state = v[:, :, 0]
    out = [state * q[:, :, 0]]
    for i in range(1, TURNS):
        a = g[:, :, i, None, None].sigmoid()
        state = a * state + (1 - a) * v[:, :, i]
        out.append(state * q[:, :, i])
    return torch.stack(out, dim=2)


def begun_by_matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Begin with what is learned."""
    state, out = v[:, :, 0, :3] + 1, torch.zeros_like(v)
    for i in range(TURNS):
        out[:, :, i] = q[:, :, i] @ state
        state = state * g[:, :, i, None, None] + k[:, :, i].mT @ (v[:, :, i] - k[:, :, i] @ state)
    return out


def nonlinear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = torch.tanh(q[:, :, i] * state + v[:, :, i])
        out.append(state)
    return torch.stack(out, dim=2)


def backwards(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state + v[:, :, -1 - i]
        out.append(state)
    return torch.stack(out, dim=2)


def coupled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, other, out = torch.zeros_like(v[:, :, 0]), torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state, other = q[:, :, i] * other + v[:, :, i], k[:, :, i] * state - v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def complex_parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Turn a number by an angle, in its real and its imaginary part; the one that comes second is read first."""
    real, imaginary, out = v[:, :, 0] + 1, torch.zeros_like(v[:, :, 0]), []
    cos, sin = 0.9 * q.cos(), 0.9 * q.sin()
    for i in range(TURNS):
        a, b = cos[:, :, i], sin[:, :, i]
        real, imaginary = a * real - b * imaginary + v[:, :, i], b * real + a * imaginary
        out.append(imaginary * k[:, :, i] + real)
    return torch.stack(out, dim=2)


def two_dims(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mix along both dims of a state."""
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state.sum(-1, keepdim=True) + k[:, :, i] * state.sum(-2, keepdim=True) + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def turned_over(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Swap rows and columns, of which there are as many."""
    state, out = torch.zeros_like(v[:, :, 0, :3]), []
    for i in range(TURNS):
        state = q[:, :, i, :3] * state.mT + v[:, :, i, :3]
        out.append(state)
    return torch.stack(out, dim=2)


def sums_turned_over(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0, :3]), []
    for i in range(TURNS):
        state = state + q[:, :, i, :3] * state.sum(-2).unsqueeze(-1) + v[:, :, i, :3]
        out.append(state)
    return torch.stack(out, dim=2)


def begun(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.ones_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def last_turn_differs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state + (v if i < TURNS - 1 else k)[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def over_zero(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Divide a sum by zero: infinite where it is not 0, as no sum of quotients is."""
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = (q[:, :, i] * state + v[:, :, i]) / 0.0
        out.append(state)
    return torch.stack(out, dim=2)


def times_infinity(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = (q[:, :, i] * state + v[:, :, i]) * torch.inf
        out.append(state)
    return torch.stack(out, dim=2)


def detached(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = q[:, :, i] * state.detach() + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    return [*(numbers(2, 2, TURNS, 4, 3) for _ in range(3)), numbers(2, 2, TURNS)]


LOOPS = [
    *(gated_delta, of_channels, without_decay, constant_decay, rows_decay, begun, begun_by_matrix, moving_average),
    *(coupled, complex_parts, delta_by_hand, values_first, by_einsum, from_the_right, decays_of_both),
]


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_that_are_affine_in_their_state(loop: Callable[..., Tensor]) -> None:
    check_found(loop, *operands())


@pytest.mark.parametrize("loop", [two_states, momentum])
def test_a_loop_may_carry_two_states(loop: Callable[..., Tensor]) -> None:
    gm, inputs = traced(loop, *operands()), operands()
    assert find_recurrences(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=cp.recurrence.default)) == 2
    torch.testing.assert_close(gm(*inputs), loop(*inputs))


def test_a_loop_may_read_what_another_one_left() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return moving_average(q, k, begun(q, k, v, g), g)

    gm, inputs = traced(twice, *operands()), operands()
    assert find_recurrences(gm) == 2
    gm.graph.eliminate_dead_code()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), twice(*inputs))


@pytest.mark.parametrize(("shown", "num_reads"), [((-1,), 1), ((-1, 0), 0)], ids=["the last", "the first as well"])
def test_what_the_last_turn_leaves_is_read_from_all_states(shown: tuple[int, ...], num_reads: int) -> None:
    """In the dtype that the loop carries; where an earlier turn is read as well, the loop stays for both."""

    def loop(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        states, out = [torch.zeros_like(v[:, 0])], torch.zeros_like(v, dtype=torch.float32)
        for i in range(TURNS):
            states.append(q[:, i] * states[-1] + k[:, i] * v[:, i])
            out[:, i] = states[-1].float()
        return out, *(states[1:][i] for i in shown)

    torch.manual_seed(0)
    inputs = [numbers(2, TURNS, 3) for _ in range(3)]
    gm = traced(loop, *inputs)
    assert find_recurrences(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    (made,) = gm.graph.find_nodes(op="call_function", target=cp.recurrence.default)
    reads = [
        node for node in gm.graph.find_nodes(op="call_function", target=aten.select.int) if made in node.all_input_nodes
    ]
    assert len(reads) == num_reads
    found, expected = gm(*inputs), loop(*inputs)
    torch.testing.assert_close(found, expected)
    for outs in zip(found, expected, strict=True):
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in outs))


def filtered(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Carry a row `[B, D]`, of which each turn shows the sum with a column."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state, out = torch.zeros_like(v[:, 0]), []
        for i in range(TURNS):
            state = step(state, q[:, i], k[:, i], v[:, i], g[:, i, None], q[0, 0, :, None] * k[0, 0])
            out.append(state + k[:, i, :1])
        return torch.stack(out, dim=1)

    return loop


# Steps `(state, q, k, v, g, matrix)` in calls that are several sums and products at once.
STEPS: dict[str, Callable[..., Tensor]] = {
    "lerp": lambda s, q, k, v, g, m: torch.lerp(s, v, 0.3),
    "lerp by a tensor": lambda s, q, k, v, g, m: torch.lerp(s, v, g.sigmoid()),
    "lerp to the state": lambda s, q, k, v, g, m: torch.lerp(v, s, g.sigmoid()),
    "lerp in place": lambda s, q, k, v, g, m: s.lerp_(v, 0.3),
    "addcmul": lambda s, q, k, v, g, m: torch.addcmul(v, s, q, value=0.7),
    "addcmul to the state": lambda s, q, k, v, g, m: torch.addcmul(s * q, v, k),
    "addcdiv": lambda s, q, k, v, g, m: torch.addcdiv(v, s, 2 + q.square(), value=0.5),
    "addcdiv to the state": lambda s, q, k, v, g, m: torch.addcdiv(0.9 * s, v, 2 + q.square()),
    "a quotient by integers": lambda s, q, k, v, g, m: s / torch.full((4,), 3) + v,
    "add": lambda s, q, k, v, g, m: torch.add(v, s, alpha=0.5),
    "add in place": lambda s, q, k, v, g, m: s.mul_(0.5).add_(v, alpha=2),
    "sub": lambda s, q, k, v, g, m: torch.sub(v, s, alpha=0.5),
    "from a number": lambda s, q, k, v, g, m: 1 - torch.rsub(s, v, alpha=0.5),
    "linear": lambda s, q, k, v, g, m: F.linear(s, m, v[0]) + F.linear(v, m),
    "addmm": lambda s, q, k, v, g, m: torch.addmm(v, s, m, alpha=0.5),
    "addmm to the state": lambda s, q, k, v, g, m: torch.addmm(s, v, m, beta=0.5),
    "mm": lambda s, q, k, v, g, m: torch.mm(s, m) + v,
    "baddbmm": lambda s, q, k, v, g, m: torch.baddbmm(v[:, None], s[:, None], q[..., None] * k[:, None]).squeeze(1),
    "a vector": lambda s, q, k, v, g, m: 0.2 * s + (s @ m[0])[:, None] * k + v,
    "where": lambda s, q, k, v, g, m: torch.where(g > 0, 0.9 * s + v, s),
    "where, of a matrix": lambda s, q, k, v, g, m: torch.where(q > 0, F.linear(s, m) + v, s),
    "where, of a number": lambda s, q, k, v, g, m: torch.where(q > 0, 0.5, s) + v,
    "masked_fill": lambda s, q, k, v, g, m: (0.9 * s + v).masked_fill(q > 0, 0.5),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_calls_of_several_operators(name: str) -> None:
    torch.manual_seed(0)
    check_found(filtered(STEPS[name]), *(numbers(2, TURNS, 4) for _ in range(3)), numbers(2, TURNS))


def test_steps_of_vectors() -> None:
    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = v.new_zeros(4, 4), []
        for i in range(TURNS):
            out.append(torch.mv(state, q[i]))
            state = torch.addr(state, k[i], v[i], beta=0.5, alpha=2)
        return torch.stack(out)

    def by_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = v.new_zeros(4), []
        for i in range(TURNS):
            state = torch.addmv(v[i], q[0, :, None] * k[i], state, beta=0.5)
            out.append(state)
        return torch.stack(out)

    torch.manual_seed(0)
    for loop in (outer, by_matrix):
        check_found(loop, *(numbers(TURNS, 4) for _ in range(3)))


def by_its_own_mask(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = torch.where(state > 0.1, q[:, :, i] * state, state) + v[:, :, i]
        out.append(state)
    return torch.stack(out, dim=2)


def by_its_own_weight(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(v[:, :, 0]), []
    for i in range(TURNS):
        state = torch.lerp(v[:, :, i], state, state)
        out.append(state)
    return torch.stack(out, dim=2)


OTHERS = [
    by_its_own_mask,
    by_its_own_weight,
    nonlinear,
    backwards,
    last_turn_differs,
    over_zero,
    times_infinity,
    detached,
    two_dims,
    turned_over,
    sums_turned_over,
]


@pytest.mark.parametrize("loop", OTHERS)
def test_other_loops_are_left_alone(loop: Callable[..., Tensor]) -> None:
    check_left_alone(loop, *operands())


@pytest.mark.parametrize("by_matrix", [False, True])
def test_the_operator_and_its_gradients(by_matrix: bool) -> None:
    torch.manual_seed(0)
    factor, x = numbers(2, 4, 3, 3 if by_matrix else 1), numbers(2, 4, 3, 2)

    def by_definition(factor: Tensor, x: Tensor) -> Tensor:
        states = [x[:, 0]]
        for t in range(1, 4):
            before = factor[:, t] @ states[-1] if by_matrix else factor[:, t] * states[-1]
            states.append(before + x[:, t])
        return torch.stack(states, dim=1)

    torch.testing.assert_close(cp.recurrence(factor, x, 1, by_matrix), by_definition(factor, x))
    assert torch.autograd.gradcheck(lambda *given: cp.recurrence(*given, 1, by_matrix), (factor, x))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cp.recurrence.default, (factor, x, 1, by_matrix), test_utils=checks)
    halves = [t.detach().bfloat16() for t in (factor, x)]
    in_float32 = by_definition(*(t.float() for t in halves)).bfloat16()
    assert torch.equal(cp.recurrence(*halves, 1, by_matrix), in_float32)


def test_values_are_numbered_only_where_there_may_be_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[fx.Graph] = []
    monkeypatch.setitem(find_recurrences.__globals__, "value_numbers", lambda graph: seen.append(graph) or {})
    q, *rest = operands()
    check_left_alone(lambda q: torch.cat([q @ q.mT, q @ q.mT]), q)
    assert not seen
    find_recurrences(traced(gated_delta, q, *rest))
    assert len(seen) == 1
