"""Selective checkpoints: what a user's policy says of each operator that a node runs, without running the model.

`create_selective_checkpoint_contexts` returns a dispatch mode that asks `policy_fn` about every operator below autograd, in
torch 2.13 by its attribute of that name. Here nodes run under that mode on fake values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext


class NoPolicyError(Exception):
    """A `context_fn` whose contexts ask no policy, so that it cannot be known what they do."""


class PolicyFailedError(Exception):
    """A policy raised an error, its `__cause__`."""


class Policy:
    """The policy of one activation checkpoint, with the state that its `context_fn` made for it.

    Attributes:
        answers: (operator, what is to be done with its results), as they were asked for since `answers` was cleared.
    """

    def __init__(self, context_fn: Callable[[], Any]) -> None:
        """Make the contexts of a forward.

        Raises:
            NoPolicyError: they ask no policy.
        """
        contexts = context_fn()
        self._mode = contexts[0] if isinstance(contexts, tuple) and contexts else None
        self._policy_fn = getattr(self._mode, "policy_fn", None)
        if not callable(self._policy_fn):
            raise NoPolicyError
        self._mode.policy_fn = self._ask  # type: ignore[union-attr]
        self.answers: list[tuple[Any, CheckpointPolicy]] = []

    def ask(self, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Return what the policy says of an operator that is not run."""
        return self._ask(SelectiveCheckpointContext(is_recompute=False), operator, *args, **kwargs)

    def _ask(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        try:
            answer = self._policy_fn(context, operator, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise PolicyFailedError from error
        if not isinstance(answer, CheckpointPolicy):
            answer = CheckpointPolicy.MUST_SAVE if answer else CheckpointPolicy.PREFER_RECOMPUTE
        self.answers.append((operator, answer))
        return answer

    @contextlib.contextmanager
    def asking(self, mode: FakeTensorMode) -> Iterator[None]:
        """Have the policy asked about every operator that runs on fake values inside this context."""
        with torch.enable_grad(), enable_python_dispatcher(), mode, self._mode:  # type: ignore[union-attr]
            yield
