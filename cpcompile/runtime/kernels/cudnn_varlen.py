"""cuDNN's attention of variable lengths, through NVIDIA's graph API (the package nvidia-cudnn-frontend).

One call computes many rectangles, and one plan serves all sizes up to those that it was made for: where rectangles begin and
how long they are is read from the GPU's memory. cuDNN makes a plan in 50 ms, and its kernels are as fast under a plan for far
larger sizes. So plans are made for few sizes, and batches of other documents meet plans that are there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.torch_version import TorchVersion

from cpcompile.balance.token_spans import Rectangle
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FORMS, Case, Kernel
from cpcompile.runtime.kernels.common import on_device
from cpcompile.runtime.kernels.cudnn import KERNEL as FIXED_SIZES
from cpcompile.runtime.kernels.flash import is_installed, packed, unpacked

Tensor = torch.Tensor
Rectangles = tuple[Rectangle, ...]
Shape = torch.Size
_PACKAGE, _FIRST_VERSION = "nvidia-cudnn-frontend", "1.18"
# What plans are made for at least: rectangles, tokens of a rectangle, and tokens of all. 12 batches of 16 random documents, a
# ring of 4 with 64k tokens: 50 to 85 plans of a rank with powers of two, about 10 so, and the kernels took the same time (H200).
_LEAST_NUM, _LEAST_SIZE, _LEAST_TOKENS = 16, 1024, 16384
_one_at_a_time = threading.Lock()  # a handle has one stream


@dataclass(frozen=True, slots=True)
class _Form:
    """What a plan is made for.

    Attributes:
        num: rectangles at most.
        size: rows and columns of one rectangle at most.
        tokens: of q, and of k and v, at most. Memory for the gradients of so many is reserved while backward runs.
        window: how many columns before the diagonal, it included, a row sees; 0: all.
        is_shifted: the diagonal of a rectangle ends in its last corner, not begins in its first.
    """

    device: int
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    num: int
    size: int
    tokens: int
    is_causal: bool
    window: int
    is_shifted: bool
    scale: float

    @classmethod
    def of(
        cls, device: int, dtype: torch.dtype, shapes: Sequence[Shape], block: Block, rectangles: Rectangles
    ) -> _Form:
        """Return the form of packed q, k and v of these shapes, `[T, H, D]` each."""
        (rows, heads, dim), (columns, key_heads, _), (*_, value_dim) = shapes
        is_causal = block.high == 0
        tokens = max(_LEAST_TOKENS, _power_of_two(max(rows, columns)))
        longest = max(max(part.rows, part.columns) for part in rectangles)
        return cls(
            device,
            dtype,
            heads,
            key_heads,
            dim,
            value_dim,
            _size(len(rectangles), _LEAST_NUM),
            min(_size(longest, _LEAST_SIZE), tokens),
            tokens,
            is_causal,
            0 if block.low is None else 1 - block.low,
            is_causal and any(part.rows != part.columns for part in block.rectangles),
            block.scale,
        )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _size(size: int, least: int) -> int:
    """Return what a plan for `size` is made for: the first of `least`, 4 `least`, 16 `least` ... that is not below it."""
    while least < size:
        least *= 4
    return least


class _Plan:
    """A graph of cuDNN: the names of its tensors in the order of their use, and the memory that it works in."""

    def __init__(self, form: _Form) -> None:
        library = _library()
        kinds = {torch.bfloat16: library.data_type.BFLOAT16, torch.float16: library.data_type.HALF}
        single = library.data_type.FLOAT
        self.form, self._library, self._handle = form, library, _handle(form.device)
        self._graph = library.pygraph(
            io_data_type=kinds[form.dtype],
            intermediate_data_type=single,
            compute_data_type=single,
            handle=self._handle,
        )
        self._tensors: list[Any] = []
        alignments = library.diagonal_alignment
        self.terms: dict[str, Any] = {"attn_scale": form.scale, "use_padding_mask": True}
        if form.is_causal:
            self.terms["diagonal_band_right_bound"] = 0
            self.terms["diagonal_alignment"] = alignments.BOTTOM_RIGHT if form.is_shifted else alignments.TOP_LEFT
        long, short = library.data_type.INT64, library.data_type.INT32
        if form.window:
            self.terms["diagonal_band_left_bound"] = form.window
        # Where the rectangles of q, out, the statistics, k and v begin, then how many rows and columns they have.
        self._q, self._out, self._stats, self._k, self._v = (self._numbers(form.num + 1, long) for _ in range(5))
        self.terms["seq_len_q"], self.terms["seq_len_kv"] = (self._numbers(form.num, short) for _ in range(2))

    def _numbers(self, size: int, kind: Any) -> Any:
        tensor = self._graph.tensor(dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)
        self._tensors.append(tensor)
        return tensor

    def _layout(self, name: str) -> tuple[list[int], list[int], Any]:
        """Return the dims and strides of one of q, k, v, out and the statistics, and the offsets of its rectangles."""
        form = self.form
        heads, dim, offsets = {
            "q": (form.heads, form.head_dim, self._q),
            "k": (form.key_heads, form.head_dim, self._k),
            "v": (form.key_heads, form.value_dim, self._v),
            "out": (form.heads, form.value_dim, self._out),
            "stats": (form.heads, 1, self._stats),
        }[name]
        return [form.num, heads, form.size, dim], [form.size * heads * dim, dim, heads * dim, 1], offsets

    def given(self, name: str) -> Any:
        """Return a tensor that is given."""
        dims, strides, offsets = self._layout(name)
        kind = {"data_type": self._library.data_type.FLOAT} if name == "stats" else {}
        tensor = self._graph.tensor(dim=dims, stride=strides, **kind)
        tensor.set_ragged_offset(offsets)
        self._tensors.append(tensor)
        return tensor

    def found(self, tensor: Any, name: str) -> None:
        """Let a tensor be a result."""
        dims, strides, offsets = self._layout(name)
        tensor.set_output(True).set_dim(dims).set_stride(strides).set_ragged_offset(offsets)
        if name == "stats":
            tensor.set_data_type(self._library.data_type.FLOAT)
        self._tensors.append(tensor)

    def attend(self) -> None:
        """Plan the forward: of q, k and v, out and the statistics."""
        q, k, v = map(self.given, ("q", "k", "v"))
        out, stats = self._graph.sdpa(q=q, k=k, v=v, generate_stats=True, **self.terms)
        self.found(out, "out")
        self.found(stats, "stats")

    def differentiate(self) -> None:
        """Plan the backward: of dout, q, k, v, out and the statistics, dq, dk and dv."""
        dout, q, k, v, out, stats = map(self.given, ("out", "q", "k", "v", "out", "stats"))
        sizes = {"max_total_seq_len_q": self.form.tokens, "max_total_seq_len_kv": self.form.tokens}
        found = self._graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=dout, stats=stats, **sizes, **self.terms)
        for tensor, name in zip(found, ("q", "k", "v"), strict=True):
            self.found(tensor, name)

    def build(self) -> None:
        """Choose and compile the kernels."""
        graph = self._graph
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._library.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self._names = [tensor.get_uid() for tensor in self._tensors]
        self._num_bytes = graph.get_workspace_size()

    def run(self, numbers: Numbers, *tensors: Tensor) -> None:
        """Compute on the current stream."""
        stream = torch.cuda.current_stream(self.form.device)
        numbers.wait(stream)
        workspace = torch.empty(max(self._num_bytes, 1), dtype=torch.uint8, device=tensors[0].device)
        pointers = (*numbers.pointers(self.form.num), *(x.data_ptr() for x in tensors))
        with _one_at_a_time:
            self._library.set_stream(handle=self._handle, stream=stream.cuda_stream)
            given = dict(zip(self._names, pointers, strict=True))
            self._graph.execute(given, workspace.data_ptr(), handle=self._handle)


def _library() -> Any:
    return importlib.import_module("cudnn")


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return _library().create_handle()


@functools.lru_cache(maxsize=128)
def _plan(form: _Form, is_backward: bool) -> _Plan:
    with _one_at_a_time, torch.cuda.device(form.device):
        plan = _Plan(form)
        (plan.differentiate if is_backward else plan.attend)()
        plan.build()
    return plan


def _numbers_of(rectangles: Rectangles, form: _Form) -> list[int]:
    """Return where rectangles begin in q, out, the statistics, k and v, in elements, and how many rows and columns they have.

    There are `form.num` of them, and where the last ends; those that are missing are empty. The sizes are of 32 bits, two in each
    number.
    """
    last = max(part.row + part.rows for part in rectangles), max(part.column + part.columns for part in rectangles)
    spare = form.num - len(rectangles)
    first_rows = [part.row for part in rectangles] + [last[0]] * (spare + 1)
    first_columns = [part.column for part in rectangles] + [last[1]] * (spare + 1)
    of_rows = form.heads * form.head_dim, form.heads * form.value_dim, form.heads
    of_columns = form.key_heads * form.head_dim, form.key_heads * form.value_dim
    starts = [row * size for size in of_rows for row in first_rows]
    starts += [column * size for size in of_columns for column in first_columns]
    sizes = [part.rows for part in rectangles] + [0] * spare + [part.columns for part in rectangles] + [0] * spare
    return starts + [low | high << 32 for low, high in zip(sizes[::2], sizes[1::2], strict=True)]


class Numbers:
    """What `_numbers_of` returns in the memory of a GPU, for calls on any stream."""

    def __init__(self, rectangles: Rectangles, form: _Form) -> None:
        """Send the numbers of some rectangles."""
        self._held, self._arrival = on_device(_numbers_of(rectangles, form), form.device)
        self._has_arrived = False

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait until they are there, and the memory live until it has read them."""
        self._has_arrived = self._has_arrived or self._arrival.query()  # type: ignore[no-untyped-call]
        if not self._has_arrived:
            stream.wait_event(self._arrival)
        self._held.record_stream(stream)

    def pointers(self, num: int) -> list[int]:
        """Return the addresses in the order in which plans name them."""
        first, starts = self._held.data_ptr(), 5 * (num + 1)
        return [first + 8 * i * (num + 1) for i in range(5)] + [first + 8 * starts, first + 8 * starts + 4 * num]


def _rectangles(batch: int, rows: int, columns: int, block: Block) -> Rectangles:
    """Return the rectangles of a block, for all rows of the batch laid one after the other."""
    found = block.rectangles or (Rectangle(0, rows, 0, columns),)
    if block.lengths:
        ends = accumulate(block.lengths)
        found = tuple(Rectangle(at - size, size, at - size, size) for at, size in zip(ends, block.lengths, strict=True))
    return tuple(
        Rectangle(part.row + b * rows, part.rows, part.column + b * columns, part.columns)
        for b in range(batch)
        for part in found
    )


class _Call:
    """What a block of some sizes needs beside its tensors, found once for all layers of a batch.

    Attributes:
        form: what to plan for.
        leaves_rows, leaves_columns: whether some rows, or columns, which no two rectangles share, are in none.
        numbers: of the rectangles.
    """

    def __init__(self, form: _Form, rectangles: Rectangles, num_rows: int, num_columns: int) -> None:
        """Tell what is needed for so many rows and columns, those of all rows of the batch."""
        self.form, self._rectangles = form, rectangles
        self.leaves_rows = sum(part.rows for part in rectangles) < num_rows
        self.leaves_columns = sum(part.columns for part in rectangles) < num_columns

    @functools.cached_property
    def numbers(self) -> Numbers:
        """The numbers of the rectangles, in the memory of the GPU."""
        return Numbers(self._rectangles, self.form)


@functools.lru_cache(maxsize=256)
def _call(batch: int, device: int, dtype: torch.dtype, q: Shape, k: Shape, v: Shape, block: Block) -> _Call:
    """Return the call of a block for packed q, k and v of these shapes."""
    rectangles = _rectangles(batch, q[0] // batch, k[0] // batch, block)
    return _Call(_Form.of(device, dtype, (q, k, v), block, rectangles), rectangles, q[0], k[0])


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    batch = q.shape[0]
    q, k, v = (packed(x).contiguous() for x in (q, k, v))
    call = _call(batch, q.device.index, q.dtype, q.shape, k.shape, v.shape, block)
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
    if call.leaves_rows:
        out.zero_()
        lse.fill_(-torch.inf)
    _plan(call.form, False).run(call.numbers, q, k, v, out, lse)
    return unpacked(out, batch), torch.unflatten(lse, 0, (batch, -1)).transpose(1, 2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    batch = q.shape[0]
    dout, q, k, v, out = (packed(x).contiguous() for x in (dout, q, k, v, out))
    call = _call(batch, q.device.index, q.dtype, q.shape, k.shape, v.shape, block)
    stats = lse.transpose(1, 2).contiguous()
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for grad, leaves in zip(grads, (call.leaves_rows, call.leaves_columns, call.leaves_columns), strict=True):
        if leaves:
            grad.zero_()
    _plan(call.form, True).run(call.numbers, dout, q, k, v, out, stats, *grads)
    dq, dk, dv = (unpacked(x, batch) for x in grads)
    return dq, dk, dv


@functools.cache
def _is_old() -> bool:
    try:
        return TorchVersion(importlib.metadata.version(_PACKAGE)) < _FIRST_VERSION
    except importlib.metadata.PackageNotFoundError:
        return False  # built from source


def _limits(case: Case) -> str:
    reason = FIXED_SIZES.limits(case)
    if not reason and not is_installed("cudnn"):
        return f"is not installed (pip install {_PACKAGE})"
    return reason or (f"needs {_PACKAGE} {_FIRST_VERSION} or newer" if _is_old() else "")


def _avoids(case: Case) -> str:
    # 6% slower than `cudnn` on a causal square of 32k tokens (cuDNN 9.19, H100).
    return "" if case.features & (FORMS | {"window"}) else "is slower without documents or a window"


def is_missed(case: Case) -> bool:
    """Tell whether `auto` would take this kernel for a case if its package were installed."""
    would_take = not FIXED_SIZES.limits(case) and case.features - FORMS <= _TAKES and not _avoids(case)
    return would_take and not is_installed("cudnn")


# Other bands it could take, but its backward computes all that they hide.
_TAKES = frozenset(("causal", "window", "lengths", "rectangles"))
KERNEL: Kernel = Kernel("cudnn_varlen", forward, backward, _limits, _TAKES, FIXED_SIZES.dims, _avoids)
