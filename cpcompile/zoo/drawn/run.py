"""Run: one drawn configuration, in this process."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cpcompile.zoo.build import NO_FLEX_REFERENCE, NotAvailable, import_transformers, make_model
from cpcompile.zoo.classify import own_failure
from cpcompile.zoo.drawn.batch import Batch
from cpcompile.zoo.drawn.draw import TEXT, Draw, draw
from cpcompile.zoo.drawn.heads import class_name, num_labels
from cpcompile.zoo.drawn.settings import shared_settings
from cpcompile.zoo.evidence import Evidence, Unsound, gather_evidence
from cpcompile.zoo.result import Result
from cpcompile.zoo.run import Job, Subject, run_variant
from cpcompile.zoo.sizes import SHARED, field_names


def job_of(drawn: Draw, device: str = "cpu") -> Job:
    """Return the job of a draw, whose key says what to draw."""
    return Job(drawn.key, (drawn.variant,), device)


def draw_of(key: str) -> Draw:
    """Return the draw of this key."""
    seed, index = key.split(":")
    return draw(int(seed), int(index))


def run_drawn(job: Job, report: Callable[[Result], None]) -> None:
    """Run the configuration that the key of a job says."""
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)
    start, drawn = time.perf_counter(), draw_of(job.key)
    try:
        taken, model, inputs, evidence = first_that_runs(drawn)
    except Exception as error:
        outcome, reason, detail = own_failure(error)
        report(Result(drawn.key, drawn.variant, outcome, reason, detail, drawn=drawn.text))
        return
    subject = Subject(model, inputs, evidence, **without_strict(drawn.options))
    result = run_variant(drawn.key, drawn.variant, subject)
    seconds = round(time.perf_counter() - start, 2)
    report(dataclasses.replace(result, seconds=seconds, drawn=taken.text))


def without_strict(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the variant does not have."""
    return {name: value for name, value in options.items() if name != "strict"}


def first_that_runs(drawn: Draw) -> tuple[Draw, nn.Module, dict[str, Any], Evidence]:
    """Return what was taken of a draw, and the model with its inputs, the first that one device runs.

    A model does not run with all settings, nor offer each implementation of attention: with those that it does not take,
    it is the zoo's.

    Raises:
        Exception: why the first that the model offers does not run.
    """
    errors: list[Exception] = []
    for candidate in candidates(drawn):
        try:
            model = model_of(candidate)
            inputs = Batch(candidate, model).make()
            return given(candidate, inputs), model, inputs, gather_evidence(model, inputs)
        except Unsound:
            raise
        except Exception as error:
            errors.append(error)
    raise next((error for error in errors if not isinstance(error, NotAvailable)), errors[-1])


def given(drawn: Draw, inputs: Mapping[str, Any]) -> Draw:
    """Return a draw without the inputs that the model does not take."""
    return dataclasses.replace(
        drawn,
        padding=drawn.padding if "attention_mask" in inputs else "none",
        is_packed="position_ids" in inputs,
        takes_embeddings="inputs_embeds" in inputs,
        has_types="token_type_ids" in inputs,
    )


def candidates(drawn: Draw) -> Iterator[Draw]:
    """Yield a draw, and what is left of it without rotary positions, sizes, and implementations of attention."""
    is_text = drawn.entry.category in TEXT
    for number in range(len(drawn.attention)):
        one = dataclasses.replace(drawn, attention=drawn.attention[number:])
        if is_text:
            yield one
            yield dataclasses.replace(one, rope={})
        yield dataclasses.replace(one, rope={}, settings={})


def model_of(drawn: Draw) -> nn.Module:
    """Return the model of a draw, in the first of its implementations of attention."""
    (attention, *_), entry = drawn.attention, drawn.entry
    if attention == "flex_attention" and entry.key in NO_FLEX_REFERENCE:
        raise NotAvailable(NO_FLEX_REFERENCE[entry.key])
    if entry.category not in TEXT:
        return make_model(entry, attention)
    own_class = class_name(entry, drawn.head)
    changes = rope_changes(entry.model_type, drawn.rope)
    changes |= {} if own_class is None else {"num_labels": num_labels(drawn.head)}
    shared = shared_settings(drawn.settings) if drawn.settings else SHARED
    model = make_model(entry, attention, class_name=own_class, shared=shared, changes=changes)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # the one that computes in float64
    return model


def rope_changes(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for rotary positions, which keep what else the config says of them; none where it has none."""
    known = import_transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if not rope or "rope_parameters" not in field_names(known[model_type]):
        return {}
    default = known[model_type]().rope_parameters or {}
    is_flat = not any(isinstance(value, dict) for value in default.values())
    return {"rope_parameters": {**default, **rope}} if is_flat else {}
