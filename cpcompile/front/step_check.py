"""Step check: a compiled step is asked once whether it is finite; one that is not runs again, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cpcompile.capture.lowering import placeholders
from cpcompile.capture.stages import say
from cpcompile.compile.inner import finish_graph
from cpcompile.compile.transform import Transformed
from cpcompile.errors import NotFiniteError
from cpcompile.front.finite_run import FiniteRun, is_number
from cpcompile.front.gradient_sums import GradientSync
from cpcompile.front.held_step import HeldStep, overwritten_inputs
from cpcompile.front.held_tokens import HeldTokens
from cpcompile.front.magnitudes import Magnitudes, magnitudes
from cpcompile.front.rank_agreement import device_of, named
from cpcompile.inspect.graph_listing import input_name
from cpcompile.inspect.not_finite import kind_of
from cpcompile.ir.annotation import annotation
from cpcompile.ir.copying import copied
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.passes.rewrite_dropout import draws
from cpcompile.runtime.record import recorded
from cpcompile.runtime.tokens.show import quiet

Tensor = torch.Tensor
NUM_NAMES = 4  # that a message has
RANDOM = "- The model draws random numbers, and Inductor draws others from the same seed than operators do."
SUMS = "- The sum of finite gradients, over ranks or over micro-batches, may be too large for its dtype (float16)."
NO_MEMORY = "It computes nothing again in backward, and holds more memory: a shorter sequence may show the same."


class StepCheck:
    """Checks the steps of one graph. It is made before the inner compiler gets the graph, and keeps a copy for second runs."""

    def __init__(
        self, transformed: Transformed, sync: GradientSync, summed: Sequence[int], site: int, inner: str
    ) -> None:
        graph = copied(transformed.graph)
        (output,) = graph.graph.find_nodes(op="output")
        self._outputs: list[Any] = list(output.args[0])
        self._inputs = placeholders(graph)
        self._overwritten = overwritten_inputs(graph)
        self._draws = any(map(draws, graph.graph.nodes))
        finish_graph(graph, summed, site)
        self._sync, self._axis, self._inner = sync, sync.axis, inner
        self._transformed = replace(transformed, graph=graph)
        self._again = FiniteRun(self._transformed, self._axis)
        self._meant: set[str] = set()  # outputs that hold infinities which the model writes

    def begin(self, given: list[Any], keys: Sequence[Any]) -> HeldStep:
        """Hold what a call is given, and have the step checked when backward comes to it. `no_sync` knows it under `keys`."""
        step = HeldStep.of(given, self._overwritten, self._axis.device_type, draws=self._draws)
        places = [i for i, needed in enumerate(step.needs) if needed]
        if places and torch.is_grad_enabled():
            of_places = [keys[i] for i in places]
            watched = Watched.apply(self, step, places, of_places, *(given[i] for i in places))  # type: ignore[no-untyped-call]
            for i, x in zip(places, watched, strict=True):
                given[i] = x
        return step

    def ran(self, step: HeldStep, results: Sequence[Any]) -> None:
        """Look at what the graph has returned. Where no backward follows, the step is checked now, which is collective.

        Raises:
            NotFiniteError: it is not finite.
        """
        nodes = Lengths.bounds_of(self._transformed.graph)
        bounds = dict(zip(nodes, results[len(results) - len(nodes) :], strict=True))
        held = HeldTokens(self._transformed, self._axis.rank, step.given, bounds)
        own = list(zip(self._outputs, results, strict=False))
        follows = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for _, x in own)
        looked_at = {}
        for place, (node, x) in enumerate(own):
            if not isinstance(x, Tensor) or not is_number(x):
                continue
            if follows and x.requires_grad:
                x.register_hook(keeper(step, place))  # type: ignore[no-untyped-call]
            # What is made of a rank's tokens behind the graph shows in the gradients.
            if not (follows and isinstance(annotation(node).placement, Sharded)):
                looked_at[output_name(place, len(own))] = held.of(node)(x.detach())
        step.outputs = magnitudes(looked_at, device_of(self._axis))
        if not follows:
            self._conclude(step, step.outputs)

    def came_back(self, step: HeldStep, keys: Sequence[Tensor], gradients: Mapping[int, Tensor | None]) -> None:
        """Check a step, of which backward has the gradients of the inputs. Collective.

        Raises:
            NotFiniteError: it is not finite.
        """
        assert step.outputs is not None, "the graph has returned"
        known = {
            i: self._sync.sums.kept(key) if x is None else x
            for key, (i, x) in zip(keys, gradients.items(), strict=True)
        }
        names = {
            f"the gradient of {input_name(self._inputs[i])}": x.detach() for i, x in known.items() if x is not None
        }
        self._conclude(step, step.outputs.and_those(magnitudes(names, device_of(self._axis))))
        step.gradients.clear()

    def _conclude(self, step: HeldStep, found: Magnitudes) -> None:
        unfit = ~found.values.isfinite()
        if self._meant:
            meant = torch.tensor([name in self._meant for name in found.names], device=unfit.device)
            unfit &= ~(meant & found.values.isinf())
        if not found.names or not self._is_any(unfit):
            return
        kinds = {name: kind for name, kind in found.kinds().items() if kind == "NaN" or name not in self._meant}
        head = f"the compiled step is not finite: {self._told(found.names, kinds)}"
        say(f"{head}. It runs again, operator by operator")
        again = self._run_again(step, head)
        meant_now = {name for name, kind in kinds.items() if kind == again.get(name) == "infinite"}
        self._meant |= meant_now
        if self._is_any(torch.tensor([bool(kinds.keys() - meant_now)], device=unfit.device)):
            raise NotFiniteError(
                f"{head}. But run again from the same inputs, operator by operator, every value and gradient is finite.\n\n"
                + self._reasons(step)
            )

    def _is_any(self, flags: Tensor) -> bool:
        """Tell whether one of the flags is set on any rank. Collective; the host waits for the device."""
        flag = flags.any().int()
        if self._axis.world_size == 1:
            return bool(flag)
        with recorded("check_finite", self._axis.group):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._axis.process_group)
            return bool(flag)

    def _told(self, order: Sequence[str], kinds: Mapping[str, str]) -> str:
        """Say what is not finite, in this order of all names, and on which ranks. Collective."""
        size = self._axis.world_size
        of_ranks: list[Mapping[str, str]] = [kinds] * size
        if size > 1:
            dist.all_gather_object(of_ranks, kinds, group=self._axis.process_group)
        names = [name for name in order if any(name in of_rank for of_rank in of_ranks)]
        texts = []
        for name in names[:NUM_NAMES]:
            ranks = [rank for rank, of_rank in enumerate(of_ranks) if name in of_rank]
            on = f" on {named(ranks)}" if len(ranks) < size else ""
            texts.append(f"{name} is {of_ranks[ranks[0]][name]}{on}")
        return ", ".join(texts) + (f", and {len(names) - NUM_NAMES} more are not" if len(names) > NUM_NAMES else "")

    def _run_again(self, step: HeldStep, head: str) -> Mapping[str, str]:
        """Return the kinds of the outputs of a second run, whose gradients reach no tensor of the user's. Collective.

        Raises:
            NotFiniteError: at the first value or gradient that is not finite, or where it cannot run.
        """
        leaves = step.leaves()
        try:
            with quiet(), self._sync.no_sync(), step.as_it_was():
                own = self._again.run(*leaves)[: len(self._outputs)]
                places = [i for i in step.gradients if isinstance(own[i], Tensor) and own[i].requires_grad]
                if places:
                    wanted = [x for x, needed in zip(leaves, step.needs, strict=True) if needed]
                    given = [step.gradients[i] for i in places]
                    torch.autograd.grad([own[i] for i in places], wanted, given, allow_unused=True)
        except NotFiniteError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise NotFiniteError(
                f"{head}. Run again, operator by operator, it ended in {what}\n\n{NO_MEMORY}"
            ) from error
        return {output_name(i, len(own)): kind_of(x) for i, x in enumerate(own) if isinstance(x, Tensor)}

    def _reasons(self, step: HeldStep) -> str:
        """Say what a step may be due to that is not finite once, and not again: the likeliest first."""
        reasons = []
        if self._inner != "eager":
            others = " or ".join(repr(x) for x in ("aot_eager", "eager") if x != self._inner)
            reasons.append(
                f"- It is likely that a kernel which inner={self._inner!r} has made computes it: try inner={others}, and please "
                "report it if the step is finite there."
            )
        if self._draws:
            reasons.append(RANDOM)
        written = [input_name(self._inputs[i]) for i in step.written()]
        if written:
            names = ", ".join(written[:NUM_NAMES])
            reasons.append(f"- The second run read other values, which were written since forward: {names}.")
        return "\n".join([*reasons, SUMS])


class Watched(torch.autograd.Function):
    """Identity on the inputs of a graph; backward has all their gradients, and has the step checked."""

    @staticmethod
    def forward(
        ctx: Any, check: StepCheck, step: HeldStep, places: Sequence[int], keys: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.check, ctx.step, ctx.places, ctx.keys = check, step, places, keys
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.check.came_back(ctx.step, ctx.keys, dict(zip(ctx.places, grads, strict=True)))
        return None, None, None, None, *grads


def keeper(step: HeldStep, place: int) -> Any:
    """Return a hook that keeps the gradient of an output until backward is over."""

    def keep(grad: Tensor | None) -> None:
        if grad is not None:
            step.gradients[place] = grad

    return keep


def output_name(place: int, count: int) -> str:
    """Return what an output of the model is called in messages."""
    return "what the model returns" if count == 1 else f"output {place} of the model"
