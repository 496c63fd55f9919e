"""Call agreement: at each call of a model, what the ranks say of it is compared; one that fails on some ranks ends on all.

A call of a kind that was not there before is compared before it is compiled, so that nobody waits for a compiler in vain. Every
call is compared behind Dynamo, before its graph runs: only there is it known which graph that is on each rank. A rank that does
not come so far, because its compilation ends in an error, tells the others so in place of that comparison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from cpcompile.errors import RankFailed, RanksDiffer
from cpcompile.front.fingerprint import text_fingerprint
from cpcompile.front.gradient_sums import GradientSync
from cpcompile.front.graph_text import EMPTY, GraphText
from cpcompile.front.rank_agreement import FAILURE, NO_CALL, Details, agree, device_of, named
from cpcompile.front.statement import Model, Statement, fixed_details
from cpcompile.front.weights import REMEDY, Watch, describe_weight, differing_weights, send_weights
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

_GENERATORS = {"cpu": torch.get_rng_state, "cuda": torch.cuda.get_rng_state}


class CallAgreement:
    """Compares the calls of one model over the ranks of an axis."""

    def __init__(self, config: Config, sync: GradientSync, model: Model) -> None:
        self._config, self._sync, self._model = config, sync, model
        self._axis = axis = sync.axis
        self._watch = Watch()
        self._is_due = config.check_inputs != "never" and axis.world_size > 1
        self._is_sent_unseen = config.sync_weights and not self._is_due and axis.world_size > 1
        self._is_open = False  # the ranks wait for what this one has to say of the call under way
        self._fixed = fixed_details(config, axis)
        self._header = text_fingerprint(repr(self._fixed).encode())
        self._kinds: set[int] = set()  # of the calls that were compared before they were compiled
        self._same_as: dict[int, int] = {}  # for a graph that means the same as that of the first rank, its fingerprint
        self._said: Statement | None = None

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Surround one call of the model. If it fails before its graph runs, the other ranks are told so.

        Raises:
            RanksDiffer: another rank failed, or the ranks do not call alike.
        """
        self._is_open, self._said = self._is_due, None
        try:
            yield
            if self._is_open:
                self.before_running()
        except Exception as error:
            if self._is_open:
                self._tell(error)
            raise
        finally:
            self._is_open, self._said = False, None

    @contextlib.contextmanager
    def compilation(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Surround a compilation that no `call` surrounds, for a call that is given `inputs`. If it fails, the ranks are told so.

        With `check_inputs="first"` a rank that has compiled already would not listen.
        """
        try:
            yield
        except Exception as error:
            if self._is_due and self._config.check_inputs == "always":
                self._said = self._say(inputs)
                self._tell(error)
            raise

    def weights_changed(self) -> None:
        """Compare the weights again at the next call."""
        self._watch.is_due = True

    def before_compiling(self, inputs: Mapping[str, Any]) -> None:
        """Say what the call is given, and compare it if no call of its kind was compared before. Collective then."""
        if self._is_sent_unseen:
            self._send(self._model.weights())
        if not self._is_open:
            return
        self._said = self._say(inputs)
        if self._said.kind not in self._kinds:
            self._compare(b"before compiling", EMPTY, {})
            self._kinds.add(self._said.kind)
            self._is_open = True

    def before_running(
        self, graph: GraphText = EMPTY, drawing: Set[str] = frozenset(), inputs: Mapping[str, Any] | None = None
    ) -> None:
        """Compare the call and the graph that is about to run. Collective.

        Args:
            graph: its operators.
            drawing: kinds of devices from whose default generators it draws what all ranks must hold alike.
            inputs: what the call is given, where `before_compiling` was not told.

        Raises:
            RanksDiffer: ranks do not have the same, or one has failed. Raised on every rank.
        """
        if self._is_sent_unseen:
            self._send(self._model.weights())
        if not self._is_due:
            return
        if inputs is not None:
            self._said = self._say(inputs)
        states = {("generator", kind): _GENERATORS[kind]() for kind in sorted(drawing)}
        fingerprint = self._same_as.get(graph.fingerprint, graph.fingerprint)
        self._compare(repr((fingerprint, *states)).encode(), graph, states)
        self._is_due = self._config.check_inputs == "always"

    def least(self, value: int) -> int:
        """Return the least of a number over the ranks, amid a compilation. Collective.

        Raises:
            RankFailed: a rank has ended the call with an error, and says so in the place of its number.
        """
        said = self._said
        tensors = {} if said is None else said.tensors

        def details() -> Details:
            return {} if said is None else {**self._fixed, **said.details()}

        header = text_fingerprint(b"least", b"" if said is None else said.header)
        try:
            (lowest, *_), _ = agree(header, tensors, self._axis, details, value, 0, 0)
        except RanksDiffer:
            self._is_open = False  # all know
            raise
        return lowest

    def _say(self, inputs: Mapping[str, Any]) -> Statement:
        return Statement(inputs, self._axis, self._model, self._watch, holds_back=not self._sync.enabled)

    def _compare(self, header: bytes, graph: GraphText, states: Mapping[tuple[str, str], torch.Tensor]) -> None:
        said = self._said
        assert said is not None, "compared before anything was said"
        self._is_open = False

        def details() -> Details:
            of_states = {entry: describe_weight(x) for entry, x in states.items()}
            operators = {("operator", str(i)): line for i, line in enumerate(graph.lines)}
            return {**self._fixed, **said.details(), **of_states, **operators}

        least, of_first = agree(
            text_fingerprint(header, said.header, self._header.to_bytes(8, "little", signed=True)),
            {**said.tensors, **states},
            self._axis,
            details,
            -int(self._watch.is_due),
            said.writes,
            ~said.writes,
        )
        if of_first is not None:
            lines = [line for (kind, _), line in of_first.items() if kind == "operator"]
            self._same_as[graph.fingerprint] = GraphText.of_lines(lines).fingerprint
        if least[0] or least[1] != ~least[2]:
            self._compare_weights()

    def _tell(self, error: Exception) -> None:
        """Tell the other ranks that the call ended here. Collective.

        Raises:
            RanksDiffer: the ranks were not given the same, which may be why.
        """
        text, said = f"{type(error).__name__}: {error}", self._said
        self._is_open = False

        def details() -> Details:
            return {(NO_CALL, ""): text} if said is None else {**self._fixed, **said.details(), (FAILURE, ""): text}

        header = text_fingerprint(text.encode(), b"" if said is None else said.header)
        try:
            agree(header, {} if said is None else said.tensors, self._axis, details, 0, 0, 0)
        except RankFailed:
            return
        except RanksDiffer as difference:
            raise difference from error

    def _compare_weights(self) -> None:
        """Compare the values of all weights, or let the first rank send them. Collective.

        Raises:
            RanksDiffer: they differ. Raised on every rank.
        """
        weights = dict(zip(self._model.weight_names(), self._model.weights(), strict=True))
        if self._config.sync_weights:
            self._send(list(weights.values()))
        else:
            check_same_weights(weights, self._axis)
        self._watch.compared(self._model.weights())

    def _send(self, weights: Sequence[torch.Tensor]) -> None:
        send_weights(weights, self._axis.process_group, device_of(self._axis))
        self._is_sent_unseen = False


def check_same_weights(weights: Mapping[str, torch.Tensor], axis: Axis) -> None:
    """Compare the values of parameters and buffers over the ranks. Collective.

    Raises:
        RanksDiffer: they differ; the message names the first that does, and the ranks. Raised on every rank.
    """
    differing = differing_weights(weights, axis.process_group, device_of(axis))
    for name, ranks in differing.items():
        more = f"; {len(differing) - 1} more" if len(differing) > 1 else ""
        raise RanksDiffer(
            f"the parameter or buffer {name!r} differs between rank 0 and {named(ranks)} "
            f"({describe_weight(weights[name])}, in its values{more}). {REMEDY}"
        )
