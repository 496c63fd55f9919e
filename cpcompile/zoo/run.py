"""Run: all variants of one model, in this process, one result after the other."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cpcompile.choose.attention_sites import whole_attentions
from cpcompile.errors import InputError
from cpcompile.inspect.verification import Verification
from cpcompile.inspect.verify import Verifier
from cpcompile.zoo.build import build
from cpcompile.zoo.classify import classify, own_failure
from cpcompile.zoo.evidence import Evidence, changed_by_capture, gather_evidence, in_dtype
from cpcompile.zoo.programs import PROGRAMS, Program, make_program
from cpcompile.zoo.result import EXACT, NOT_CAPTURED, WRONG, Result, Variant

# In float64 what is left after rounding; a wrong program is off by orders of magnitude more.
TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Job:
    """The variants of one model or program that share its construction: all have the same attention and input."""

    key: str
    variants: tuple[Variant, ...]
    device: str = "cpu"


def run_job(job: Job, report: Callable[[Result], None]) -> None:
    """Run the variants of a job and report each result as soon as it is there."""
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)
    first, start = job.variants[0], time.perf_counter()
    try:
        made = program_of(job.key, first)
        device = one_of(job.device)
        model, inputs = (
            made.model.to(device),
            torch.utils._pytree.tree_map_only(torch.Tensor, mover(device), made.inputs),
        )
        subject = Subject(model, inputs, gather_evidence(model, inputs), **made.options)
    except Exception as error:
        outcome, reason, detail = own_failure(error)
        for variant in job.variants:
            report(Result(job.key, variant, outcome, reason, detail))
        return
    uncaptured: Result | None = None
    exact: dict[int, Result] = {}
    for variant in job.variants:
        # Capture does not depend on the ranks; and where nothing is refused, both modes make the same program.
        known = uncaptured or (None if variant.strict else exact.get(variant.world_size))
        if known is not None:
            report(dataclasses.replace(known, variant=variant, seconds=0.0))
            continue
        result = run_variant(job.key, variant, subject)
        result = dataclasses.replace(result, seconds=round(time.perf_counter() - start, 2))
        start = time.perf_counter()
        uncaptured = result if result.outcome == NOT_CAPTURED else None
        if variant.strict and result.outcome == EXACT:
            exact[variant.world_size] = result
        report(result)


def program_of(key: str, variant: Variant) -> Program:
    """Return what a key names: a program, or a model of transformers with its inputs."""
    if key in PROGRAMS:
        return make_program(key)
    return Program(*build(key, variant.attention, torch.float32, packed=variant.packed))


def mover(device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what moves a tensor to `device`."""
    return lambda x: x.to(device)


def one_of(device: str) -> str:
    """Return the device of this process: the GPUs are shared out among the workers."""
    return f"cuda:{os.getpid() % torch.cuda.device_count()}" if device == "cuda" else device


class Subject:
    """A model with its inputs, traced once in each mode for all variants.

    Attributes:
        model: in the mode of the last comparison.
        inputs: its keyword arguments.
        evidence: what one device computes.
        options: of `verify`, beside those of a variant.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], evidence: Evidence, **options: Any) -> None:
        self.model, self.inputs = model, in_dtype(inputs, evidence.dtype)
        self.evidence, self.options = evidence, options
        self._verifiers: dict[bool, Verifier] = {}

    def verify(self, variant: Variant, training: bool) -> Verification:
        """Compare in one mode. Raises what `verify` does."""
        self.model.train(training)
        if training not in self._verifiers:
            torch._dynamo.reset()
            is_double = self.evidence.dtype == torch.float64
            self._verifiers[training] = Verifier(
                self.model,
                self.inputs,
                dtype=torch.float64 if is_double else None,
                tolerance=TOLERANCE if is_double else None,
            )
        verifier = self._verifiers[training]
        return verifier(world_size=variant.world_size, strict=variant.strict, **self.options)

    def narrow(self) -> None:
        """Compare in float32 from now on."""
        self.evidence = gather_evidence(self.model, self.inputs, torch.float32)
        self.inputs = in_dtype(self.inputs, torch.float32)
        self._verifiers.clear()


def run_variant(key: str, variant: Variant, subject: Subject) -> Result:
    """Compare the transformed model with the untouched one.

    A model that branches on random numbers while training is compared in evaluation mode.
    """
    evidence = subject.evidence
    result = compare(key, variant, subject, evidence.training)
    if result.outcome == NOT_CAPTURED and evidence.is_random and evidence.training:
        evaluated = compare(key, variant, subject, training=False)
        return result if evaluated.outcome == NOT_CAPTURED else evaluated
    is_repeatable = not (evidence.is_random and evidence.training)
    if result.outcome == WRONG and is_repeatable and changed_by_capture(subject.model, subject.inputs):
        reason = "one device: the untouched model computes something else under torch.compile"
        return dataclasses.replace(result, outcome=NOT_CAPTURED, reason=reason)
    return result


def compare(key: str, variant: Variant, subject: Subject, training: bool) -> Result:
    """Compare in one mode."""
    try:
        found = subject.verify(variant, training)
    except Exception as error:
        if isinstance(error, InputError) and subject.evidence.dtype == torch.float64:
            # It names float32 where traced operators take no narrower dtype than their operands.
            try:
                subject.narrow()
            except Exception as own:
                return Result(key, variant, *own_failure(own), evaluation=not training)
            return compare(key, variant, subject, training)
        dtype = str(subject.evidence.dtype)[6:]
        return Result(key, variant, *classify(error), dtype=dtype, evaluation=not training)
    return dataclasses.replace(judge(key, variant, found, subject.evidence), evaluation=not training)


def judge(key: str, variant: Variant, found: Verification, evidence: Evidence) -> Result:
    """Return the result of a comparison."""
    counted = {name: error for name, error in found.gradient_errors.items() if name in evidence.gradients}
    reason, detail = "", ""
    if not found.ok:
        first = found.first_difference
        reason = f"first difference at {node_kind(first.node)}" if first else "values agree, gradients differ"
        detail = "\n".join(str(found).splitlines()[1:])
    return Result(
        key,
        variant,
        EXACT if found.ok else WRONG,
        reason,
        detail,
        dtype=str(evidence.dtype)[6:],
        loss_error=found.loss_error,
        gradient_error=max(counted.values(), default=0.0),
        num_gradients=len(counted),
        sites=len(found.transformed.choice.strategies),
        replicated=not is_sharded(found),
        whole=len(whole_attentions(found.transformed.graph)),
    )


def node_kind(name: str) -> str:
    """Return a node's name without its number."""
    return name.rstrip("0123456789").rstrip("_")


def is_sharded(found: Verification) -> bool:
    """Tell whether any rank computes on its own tokens."""
    graph = found.transformed.graph.graph
    return any(node.target is torch.ops.cpcompile.shard_tokens.default for node in graph.nodes)
