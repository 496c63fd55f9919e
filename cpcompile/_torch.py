"""The private parts of torch that cpcompile needs, each behind one function. Checked on torch 2.11 to 2.14."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
import torch.fx.traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile import _functorch
from cpcompile._functorch import TransformError as TransformError


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Return the fake mode of the compilation under way and `example_inputs` in it, with the symbols that Dynamo gave them.

    A backend receives real tensors; AOTAutograd makes them fake again by the same steps, so both see the same
    symbols.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        mode = detect_fake_mode(list(example_inputs)) or FakeTensorMode(
            shape_env=ShapeEnv(), allow_non_fake_inputs=True
        )

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbols = context.tensor_to_context.get(value) if context is not None else None  # type: ignore[no-untyped-call]
        source = symbols.tensor_source if symbols is not None else None
        return mode.from_tensor(value, static_shapes=symbols is None, symbolic_context=symbols, source=source)

    return mode, [fake(value) for value in example_inputs]


class SelectiveCheckpointError(Exception):
    """A checkpoint that chooses what to recompute by a `context_fn`, which the graph in line could not honour."""


class _InlineCheckpoints(fx.Interpreter):
    """Run a Dynamo graph with the bodies of activation checkpoints in line, their nodes marked for recomputation.

    Calls of `torch.vmap` run as plain operators.
    """

    num_regions = 0

    def __init__(self, gm: fx.GraphModule, skipped: Container[fx.Node]) -> None:
        super().__init__(gm)
        self.skipped = skipped

    def run_node(self, n: fx.Node) -> Any:
        if n in self.skipped:
            return None
        if not _functorch.is_opening(n) or _functorch.is_inside():
            return super().run_node(n)
        calls = _functorch.calls_of(n)
        self.env.update(dict.fromkeys(calls))  # what is there already does not run again
        self.env.update(self._run_transform(calls))
        return self.env[n]

    def _run_transform(self, calls: list[fx.Node]) -> dict[fx.Node, Any]:
        """Run the calls of a transform as plain operators and return the values that are read behind it."""
        inside = set(calls)
        given = list({x: None for node in calls for x in node.all_input_nodes if x not in inside})
        results = [node for node in calls if any(user not in inside for user in node.users)]
        inputs = [self.env[node] for node in given]
        _functorch.refuse_wrong_gradients(calls, inputs)

        def run(*values: Any) -> list[Any]:
            self.env.update(zip(given, values, strict=True))
            for node in calls:
                self.env[node] = None if node in self.skipped else super(_InlineCheckpoints, self).run_node(node)
            return [self.env[node] for node in results]

        found = _functorch.run_as_operators(run, inputs)
        self.env.update(zip(given, inputs, strict=True))
        return dict(zip(results, found, strict=True))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.flex_attention:
            # Its gradient asks for the lists of blocks, though only kernels read them.
            no_list = args[0].new_empty(0, dtype=torch.int32)
            lists = [no_list if i in (2, 3, 6, 7) and x is None else x for i, x in enumerate(args[4])]
            args = (*args[:4], tuple(lists), *args[5:])
        if target is not tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        body = args[0]
        if "_checkpoint_context_fn" in body.meta:
            raise SelectiveCheckpointError
        _InlineCheckpoints.num_regions += 1
        for node in body.graph.nodes:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = _InlineCheckpoints.num_regions
        return _InlineCheckpoints(body, self.skipped).run(*args[1:])


def symbolic_operators() -> AbstractContextManager[None]:
    """Return a context in which composite operators take symbolic sizes; before torch 2.13 some read them in C++."""
    return enable_python_dispatcher()


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Switch the hooks of saved tensors on again when tracing ends inside a derivative, which switches them off."""
    try:
        yield
    except BaseException:
        torch._C._autograd._saved_tensors_hooks_enable()
        raise


def trace_pre_dispatch(
    gm: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any], skipped: Container[fx.Node] = ()
) -> fx.GraphModule:
    """Trace `gm` to ATen before dispatch: no decomposition, no autograd, source lines and module paths kept.

    Nodes that are `skipped` do not run and give None.
    """
    interpreter = _InlineCheckpoints(gm, skipped)
    with torch.fx.traceback.preserve_node_meta(), enable_python_dispatcher(), mode, _hooks_kept():
        return make_fx(
            lambda *args: interpreter.run(*args),
            decomposition_table={},
            tracing_mode="real",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*inputs)


def is_only_traced(value: torch.Tensor) -> bool:
    """Tell whether a tensor exists only while tracing, and has no value afterwards."""
    is_wrapped = isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    return is_wrapped or value.grad_fn is not None


@contextlib.contextmanager
def trial_on_fake_tensors() -> Iterator[None]:
    """Run operators on fake tensors of a mode of its own; one whose shapes do not fit raises and logs nothing."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    finally:
        log.disabled = was_disabled


def source_name(node: fx.Node) -> str:
    """Return where Dynamo found the value of a placeholder, e.g. `L['kwargs']['input_ids']`, or ''."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.12, an attribute since


def dynamo_break_reason(gm: fx.GraphModule) -> Any | None:
    """Return why Dynamo ended the graph before the end of the function (with `.reason`, `.user_stack`), or None."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


def inner_compiler(name: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return the function that compiles the transformed graph: `inductor`, `aot_eager` or `eager`."""
    if name == "eager":
        return lambda gm, inputs: gm
    if name == "aot_eager":
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        return aot_autograd(fw_compiler=nop, bw_compiler=nop)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx  # type: ignore[return-value]


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """Return the process group with that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return _resolve_process_group(name)  # type: ignore[arg-type]


def shares_gpus() -> bool:
    """Whether torch lets several ranks have symmetric memory on one GPU, which somebody has to ask for."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "").lower() in ("1", "y", "yes", "t", "true")


class SymmetricMemory:
    """Bytes on a GPU that the other ranks of a group can read. All of them make it at once, of one size; their hosts wait for it.

    Multicast is not used. Raises `RuntimeError` where the GPUs cannot read each other's memory.
    """

    def __init__(self, num_bytes: int, device: torch.device, group: str) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not `symmetric_memory.empty`: its pool would keep what is given back.
        self._own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
        self._handle = symmetric_memory.rendezvous(self._own, group)  # type: ignore[arg-type]
        self._of: dict[int, torch.Tensor] = {}

    def of(self, rank: int) -> torch.Tensor:
        """Return the bytes of a rank, by its number in the group."""
        if rank not in self._of:
            self._of[rank] = self._handle.get_buffer(rank, (self._own.numel(),), torch.uint8)
        return self._of[rank]

    def barrier(self) -> None:
        """Make the current stream wait until those of all ranks are here."""
        self._handle.barrier(channel=0)


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Raise `RuntimeError` unless a scalar is true; on a GPU when the device gets there, so that the host need not wait."""
    torch._assert_async(condition, message)


def run_backward(loss: torch.Tensor) -> None:
    """Back-propagate from a scalar with the active torch function mode kept: `Tensor.backward` switches it off."""
    ones = torch.ones_like(loss)
    torch.autograd.graph._engine_run_backward(
        (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


_LOGGING = (
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "critical",
    "log",
    "warning_once",
    "info_once",
    "warning_advice",
)
_RECOMPILE_LIMIT = 256
# Before torch 2.13, the log of compilation metrics fails, harmlessly but loudly, on a config that ignores functions.
_METRICS_MISREAD_CONFIG = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def _on_any_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Stand in for the check of flex attention that its backward has a kernel on the device."""


@contextlib.contextmanager
def tracing_one_graph() -> Iterator[None]:
    """Let Dynamo skip logging calls and warnings, so that a model that logs once still traces as one graph.

    The limit of compilations for one function is raised: several models, plans or lengths may share a forward.
    Flex attention is traced on any device, because it is opened: what it lacks on some is a kernel for its backward.
    """
    import torch._dynamo.config as config
    import torch.nn.attention.flex_attention as flex

    methods = {getattr(logging.Logger, name) for name in _LOGGING if hasattr(logging.Logger, name)}
    ignored = config.ignore_logging_functions | methods | {warnings.warn}
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    was_disabled, metrics.disabled = metrics.disabled, metrics.disabled or _METRICS_MISREAD_CONFIG
    validate, flex._validate_device = flex._validate_device, _on_any_device
    try:
        with config.patch(ignore_logging_functions=ignored, recompile_limit=_RECOMPILE_LIMIT):
            yield
    finally:
        metrics.disabled = was_disabled
        flex._validate_device = validate


def break_frames(error: torch._dynamo.exc.TorchDynamoException) -> traceback.StackSummary:
    """Return the user's stack where Dynamo gave up, as far as the error knows it."""
    return traceback.StackSummary.from_list(getattr(error, "real_stack", []))


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """Let operators record for autograd also inside a custom operator, whose body runs below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield
