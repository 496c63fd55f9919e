"""Dynamo: how a model is called so that it traces as one graph with named inputs and a symbolic length."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.capture.arguments import describe_call, refuse_earlier_tokens, refuse_unnamed, takes
from cpcompile.capture.constants import Constant, constants_of, fold_known
from cpcompile.capture.definitions import Definitions
from cpcompile.capture.dynamo_errors import clear_errors
from cpcompile.capture.stages import Tracing
from cpcompile.capture.token_inputs import KNOWN, token_dim
from cpcompile.errors import ConfigError, InputError, LengthDependent
from cpcompile.options.checking import did_you_mean
from cpcompile.options.config import Config


def by_name(forward: Callable[..., Any], kwargs: Mapping[str, Any], *args: Any, beside: str = "") -> dict[str, Any]:
    """Return all arguments of a call of `forward` by name, so that messages and options can name them.

    One that is called `beside` is for us, if `forward` does not take it.

    Raises:
        InputError: `forward` cannot be called so, or a cache holds earlier tokens.
        ConfigError: an argument has no name.
    """
    refuse_unnamed(forward, kwargs)
    signature = inspect.signature(forward)
    own = {beside: kwargs[beside]} if beside in kwargs and not takes(signature, beside) else {}
    given = {name: value for name, value in kwargs.items() if name not in own}
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise InputError(describe_call(signature, given, str(error))) from None
    named = dict(bound.arguments) | own
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
        elif (
            parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
            and parameter.name in named
        ):
            raise ConfigError(f"pass the arguments of the model by name: {parameter.name} is positional only.")
    refuse_earlier_tokens(named)
    return named


def reading(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `forward`, called by names, as one that reads the input `name`, so that its graph has it, even if it takes none."""
    is_taken = takes(inspect.signature(forward), name)

    def call(**named: Any) -> Any:
        told = named.get(name)
        if told is not None:
            torch.ops.aten.alias(told)
            for x in named.values():
                if isinstance(x, torch.Tensor) and x.dim() == told.dim() == 2 and x.shape[1] == told.shape[1]:
                    told = x  # the comparison tells Dynamo that both dims are the same
        return forward(**{key: value for key, value in named.items() if is_taken or key != name})

    return call


def by_names(forward: Callable[..., Any], constants: Sequence[Constant]) -> Callable[..., Any]:
    """Return `forward` called by names that are its own, with inputs that are constants made of numbers.

    Dynamo reads no signature any more once a mapping of the caller's is written to, as methods of transformers do. It is a method
    where `forward` is one, so that modules keep their paths.
    """
    inner = getattr(forward, "__func__", None)
    has_mapping = any(x.kind is x.VAR_KEYWORD for x in inspect.signature(forward).parameters.values())
    if not (constants or has_mapping):
        return forward  # Dynamo imports the module of what is called inside, and there may be none of its name
    if isinstance(inner, types.FunctionType):

        def call(self: Any, **kwargs: Any) -> Any:
            return inner(self, **kwargs, **{each.name: each.tensor() for each in constants})

        return types.MethodType(call, forward.__self__)  # type: ignore[attr-defined]
    return lambda **kwargs: forward(**kwargs, **{each.name: each.tensor() for each in constants})


def token_length(inputs: Mapping[str, Any], config: Config, *, mark_dynamic: bool) -> int | None:
    """Return how many tokens the inputs have, as far as their names tell.

    With `mark_dynamic`, every input dim of that size (or of that of a second sequence) may change without compiling
    again.

    Raises:
        InputError: there are none.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    dims = {
        name: token_dim(name, tensors[name], dim) for name, dim in config.token_dims.items() if name in tensors
    } or KNOWN
    sizes = [x.shape[dims[name]] for name, x in tensors.items() if name in dims and x.dim() > dims[name]]
    if not sizes:
        sizes = [x.shape[-1] for x in tensors.values() if x.dim() >= 2 and not x.is_floating_point()]
    if not sizes:
        return None
    if 0 in sizes:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise InputError(f"the inputs hold no tokens: {shapes}.")
    labels = tensors.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        sizes.append(labels.shape[1])
    for x in tensors.values():
        for dim, size in enumerate(x.shape):
            if mark_dynamic and size in sizes and size > 1:
                torch._dynamo.maybe_mark_dynamic(x, dim)
    return int(sizes[0])


def compile_whole(function: Callable[..., Any], backend: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Return `function` compiled as one graph by `backend`; errors come out as ours, with the user's line.

    Where one graph for all lengths is refused, and one for each length may not be, it is compiled so, which a warning says.
    """
    signature = inspect.signature(function)
    for name in config.constants:
        if not takes(signature, name):
            raise ConfigError(
                f"constants names {name!r}, which the model does not take: its inputs are {', '.join(signature.parameters)}."
                f"{did_you_mean(name, signature.parameters)}"
            )
    told = reading(function, config.told_by) if config.told_by else function
    model = getattr(function, "__self__", None)
    definitions, tracing = Definitions(model), Tracing()
    is_dynamic = config.dynamic
    programs: dict[tuple[Constant, ...], Callable[..., Any]] = {}

    def compiled_for(constants: tuple[Constant, ...]) -> Callable[..., Any]:
        def remembering(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            tracing.end()
            definitions.remember()
            if constants:
                fold_known(gm)
            result: Callable[..., Any] = backend(gm, example_inputs)
            return result

        whole = with_own_code(by_names(told, constants))
        # Not dynamic=True, which would make every size a symbol: `token_length` marks those that may change.
        return torch.compile(whole, backend=remembering, fullgraph=True, dynamic=None if is_dynamic else False)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_dynamic
        try:
            return called(*args, **kwargs)
        except LengthDependent as error:
            if not is_dynamic:
                raise
            is_dynamic, reason = False, str(error).partition("\n\nCompute this")[0]
            programs.clear()
            result = called(*args, **kwargs)
        warnings.warn(
            f"one graph for all lengths cannot be sharded, so that each length is compiled by itself: {reason}\n\n"
            "Keep to a few lengths (pad batches to them), or pass dynamic=False to say so.",
            stacklevel=2,
        )
        return result

    def called(*args: Any, **kwargs: Any) -> Any:
        if not is_dynamic:
            for x in kwargs.values():
                if isinstance(x, torch.Tensor):
                    _torch.forget_dynamic(x)
        install_recorders(model, kwargs)
        if definitions.have_changed():
            programs.clear()  # others are of another backend, so that Dynamo finds nothing compiled before
        constants = constants_of(kwargs, config.constants)
        if constants not in programs:
            programs[constants] = compiled_for(constants)
        given = {name: x for name, x in kwargs.items() if all(name != constant.name for constant in constants)}
        # DDP has Dynamo cut the model into a graph for each bucket; the parts could not be sharded.
        with (
            clear_errors(function, kwargs),
            _torch.quiet_fake_tensors(),
            _torch.tracing_one_graph(),
            torch._dynamo.config.patch(optimize_ddp=False),
            tracing.call(),
            _torch.known_values() if constants else contextlib.nullcontext(),
        ):
            return programs[constants](*args, **given)

    return call


_number = itertools.count()


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function or a method as one with code of its own, of which Dynamo remembers nothing.

    Dynamo makes a size a symbol when it has seen the same code with another one. One rank may have, to explain the model or to
    evaluate it, and would compile another graph than the others.
    """
    inner = function.__func__ if isinstance(function, types.MethodType) else function
    if not isinstance(inner, types.FunctionType):
        return function
    code = inner.__code__.replace(co_name=f"{inner.__code__.co_name}_{next(_number)}")
    own = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    own.__kwdefaults__, own.__qualname__ = inner.__kwdefaults__, inner.__qualname__
    own.__dict__.update(inner.__dict__)
    return types.MethodType(own, function.__self__) if isinstance(function, types.MethodType) else own


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that `torch.compile` wrapped, or the model itself.

    Raises:
        InputError: it is no module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, torch.nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}: give a torch.nn.Module, whose forward may call a function."
        )
    return inner


def install_recorders(model: object, kwargs: Mapping[str, Any]) -> None:
    """Put the hooks into a transformers model that record what is asked for (router logits, hidden states).

    The model would do so itself at its first call, under a lock that does not trace; what makes features of images asks for a
    layer of the encoder.
    """
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is None or not isinstance(model, torch.nn.Module):
        return
    for module in model.modules():
        names = getattr(module, "_can_record_outputs", None) or {}
        config = getattr(module, "config", None)
        is_asked = any(kwargs.get(f"output_{name}", getattr(config, f"output_{name}", False)) for name in names)
        if is_asked or (names and hasattr(model, "get_image_features")):
            recording.maybe_install_capturing_hooks(module)
