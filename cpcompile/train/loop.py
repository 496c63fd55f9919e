"""Loop: what every rank runs, from loading the model to the last checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cpcompile
from cpcompile.errors import InputError, StorageError, VerificationError
from cpcompile.front.weights import differing_weights
from cpcompile.runtime.record import recorded
from cpcompile.train import checkpoint, data
from cpcompile.train.events import Comparison, Event, Gradients, Note, Phase, Resumed, Saved, Step
from cpcompile.train.interrupt import Interrupt, Interrupted
from cpcompile.train.job import check_same_job, describe_job
from cpcompile.train.model import active_dropout, find_model, load_model, load_tokenizer, reading_once
from cpcompile.train.not_finite import explain_not_finite, is_finite
from cpcompile.train.options import DTYPES, TrainOptions
from cpcompile.train.state import (
    from_tensors,
    get_random_state,
    random_states,
    set_random_state,
    share_checkpoint,
    to_tensors,
)

# Largest relative difference of the first step to one device that rounding explains.
TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(slots=True)
class Trainer:
    """A rank's model, optimizer and data, and the channel on which it reports. Only rank 0 has `batches`."""

    options: TrainOptions
    rank: int
    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: data.Batches | None
    job: dict[str, Any]
    emit: Callable[[Event], None]

    def batch(self, step: int) -> torch.Tensor:
        """Return the batch of a step, counted from 0: rank 0 reads it, all ranks get all of it."""
        if self.batches is not None:
            batch = self.batches.at(step).to(self.device)
        else:
            batch = torch.empty(self.options.batch_size, self.options.length, dtype=torch.int64, device=self.device)
        with recorded("send_batch", world_name(), batch):
            dist.broadcast(batch, src=0)
        return batch

    def backward(self, batch: torch.Tensor) -> Gradients:
        """Fill the gradients, and return the loss of the whole batch and the norms."""
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        norms = grad_norms(self.model)
        return Gradients(float(loss.detach()), math.hypot(*norms.values()), norms)


def train(
    options: TrainOptions,
    rank: int,
    device: torch.device,
    emit: Callable[[Event], None],
    interrupt: Interrupt | None = None,
) -> None:
    """Run all steps on this rank. The process group is there; only rank 0's events are shown.

    Raises `Interrupted` on all ranks, after a checkpoint, when `interrupt` of one of them asks for the end.
    """
    with reading_once(find_model(options.model)):
        trainer = build(options, rank, device, emit)
    start = resume(trainer) if options.resume else 0
    if start < options.steps:
        take_steps(trainer, start, interrupt or Interrupt())
    if options.save is not None and rank == 0:
        emit(Saved(str(save_model(trainer, options.save))))


def take_steps(trainer: Trainer, start: int, interrupt: Interrupt) -> None:
    """Take all steps from `start`, counted from 0, with a checkpoint after some."""
    options, rank, device, emit = trainer.options, trainer.rank, trainer.device, trainer.emit
    random_state = get_random_state(device)
    single = first_step_on_one_device(trainer, start) if options.check and options.apply and rank == 0 else None
    if options.apply:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
        chosen = {name: getattr(options, name) for name in ("strategy", "balancer", "kernel", "inner", "check_finite")}
        cpcompile.apply(trainer.model, mesh, **chosen)
    set_random_state(device, random_state)
    emit(Phase("first step (compiling takes a while)" if options.apply else "first step"))
    for step in range(start, options.steps):
        signal = run_step(trainer, step, single if step == start else None, interrupt)
        if options.save is not None:
            interrupt.is_patient = True
        is_last = step + 1 == options.steps
        if signal or is_last or (step + 1) % options.save_every == 0:
            finish_steps(trainer, step + 1)
        if signal and not is_last:
            # Rank 0 may still be writing, and is ended when another rank leaves.
            largest(device, 0.0)
            raise Interrupted(signal, ended_after(options, step + 1))


def ended_after(options: TrainOptions, step: int) -> str:
    """Say where a run was interrupted, and how it goes on."""
    saved = f"checkpoint-{step:06d} is saved, --resume continues from it" if options.save else "nothing is saved"
    return f"ended after step {step} of {options.steps}; {saved}."


def build(options: TrainOptions, rank: int, device: torch.device, emit: Callable[[Event], None]) -> Trainer:
    """Load the model on every rank, and the text on rank 0."""
    torch.manual_seed(options.seed)
    source = find_model(options.model)
    emit(Phase(f"loading {source.name}"))
    model = load_model(source, DTYPES[options.dtype], device, lambda text: emit(Note(text)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    batches, text = None, ""
    if rank == 0:
        emit(Phase("reading the text"))
        documents, num_skipped = data.read_documents(options.text, options.source)
        tokens = data.tokenize(documents, load_tokenizer(source))
        check_vocabulary(tokens, model)
        batches = data.Batches(data.pack(tokens, options.length), options.batch_size, options.seed)
        text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        emit(Note(describe(source.name, model, documents, batches, num_skipped)))
    return Trainer(options, rank, device, model, optimizer, batches, describe_job(options, model, text), emit)


def describe(
    name: str, model: torch.nn.Module, documents: list[data.Document], batches: data.Batches, skipped: int
) -> str:
    """Return one line about the model and the text."""
    count = sum(parameter.numel() for parameter in model.parameters())
    num_sequences, length = batches.sequences.shape
    text = f"{name}: {count / 1e6:.1f} M parameters; {len(documents)} documents in {num_sequences} sequences of {length} tokens"
    return text + (f"; {skipped} files skipped: not UTF-8 text" if skipped else "")


def check_vocabulary(tokens: torch.Tensor, model: torch.nn.Module) -> None:
    """Refuse a tokenizer that does not belong to the model."""
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest_token = int(tokens.max())
    if largest_token >= size:
        raise InputError(
            f"the tokenizer gives token {largest_token}, but the model knows {size}: they do not belong together."
        )


def run_step(trainer: Trainer, step: int, single: Gradients | None, interrupt: Interrupt) -> int:
    """One optimizer step, its numbers, and the comparison with one device if there is one.

    Return the signal by which any rank was asked to end, or 0: the same on all ranks.
    """
    batch = trainer.batch(step)
    begin = time.perf_counter()
    trainer.optimizer.zero_grad(set_to_none=True)
    found = trainer.backward(batch)
    norm, max_norm, is_broken = found.grad_norm, trainer.options.max_norm, not is_finite(found)
    if not is_broken:
        torch.nn.utils.clip_grads_with_norm_(trainer.model.parameters(), max_norm, torch.tensor(norm))
        trainer.optimizer.step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds, memory, signal, any_broken = largest(
        trainer.device, time.perf_counter() - begin, peak_memory(trainer.device), interrupt.number, is_broken
    )
    if any_broken:
        raise explain_not_finite(trainer.model, found, single, step + 1, trainer.options.dtype)
    trainer.emit(Step(step + 1, found.loss, norm, seconds, batch.numel() / seconds, int(memory)))
    if single is not None:
        compare(trainer, single, found)
    return int(signal)


def first_step_on_one_device(trainer: Trainer, step: int) -> Gradients | None:
    """Compute a step on the untouched model, all tokens on this device; None when they do not fit."""
    assert trainer.batches is not None, "only rank 0 has the data"
    trainer.emit(Phase("first step on one device, for comparison"))
    try:
        with all_threads(trainer.device):
            return trainer.backward(trainer.batches.at(step).to(trainer.device))
    except torch.OutOfMemoryError:
        trainer.emit(
            Note("the first step does not fit one device, so there is nothing to compare with (--no-check skips it).")
        )
        return None
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)


def grad_norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the norm of each parameter's gradient, added up in float64: in float32, rounding would hide small differences."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norms = torch._foreach_norm(list(grads.values()), dtype=torch.float64)
    return dict(zip(grads, torch.stack(norms).tolist(), strict=True))


def compare(trainer: Trainer, single: Gradients, ranks: Gradients) -> None:
    """Report both first steps. With dropout they differ by chance, without it by rounding only."""
    dtype, dropout = trainer.options.dtype, active_dropout(trainer.model)
    trainer.emit(Comparison(single, ranks, dist.get_world_size(), dtype, exact=not dropout))
    difference = max(relative(single.loss, ranks.loss), relative(single.grad_norm, ranks.grad_norm))
    if not dropout and not difference <= TOLERANCE[dtype]:
        raise VerificationError(
            f"the first step is not that of one device: loss {ranks.loss:.8g} against {single.loss:.8g}, gradient norm "
            f"{ranks.grad_norm:.8g} against {single.grad_norm:.8g}; `cpcompile verify` finds the first node that differs."
        )


def relative(expected: float, actual: float) -> float:
    """Return the relative difference of two numbers."""
    return abs(expected - actual) / max(abs(expected), 1e-300)


def finish_steps(trainer: Trainer, step: int) -> None:
    """After some steps: are all ranks still one model? Then save it."""
    options = trainer.options
    if options.check_ranks:
        check_ranks(trainer, step)
    if options.save is None:
        return
    generators: list[list[torch.Tensor]] = [[]] * dist.get_world_size()
    dist.all_gather_object(generators, get_random_state(trainer.device))
    if trainer.rank != 0:
        return
    tensors = to_tensors(trainer.model, trainer.optimizer, generators)
    record = {"job": trainer.job, "ranks": dist.get_world_size()}
    trainer.emit(Saved(str(checkpoint.save(options.save, step, tensors, record))))


def save_model(trainer: Trainer, folder: Path) -> Path:
    """Write the trained model as a transformers folder, with its tokenizer. Raises `StorageError`."""
    path, partial = folder / "model", folder / "model.partial"
    tokenizer = load_tokenizer(find_model(trainer.options.model))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        trainer.model.save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            checkpoint.sync(file)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        checkpoint.sync(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(checkpoint.cannot_write(folder, "the trained model", error)) from error
    return path


def resume(trainer: Trainer) -> int:
    """Load the newest checkpoint, and return how many steps it has."""
    loaded = None
    if trainer.rank == 0:
        assert trainer.options.save is not None, "checked before"
        loaded = checkpoint.load(trainer.options.save)
        for name, reason in loaded.damaged.items():
            trainer.emit(Note(f"{name} is damaged ({reason}); {loaded.path.name} is used."))
        # Only rank 0 has read the text, so only it knows all of the job.
        check_same_job(loaded.record["job"], trainer.job, loaded.path.name)
    shared = share_checkpoint(loaded)
    from_tensors(shared.tensors, trainer.model, trainer.optimizer)
    ranks = shared.record["ranks"]
    if ranks != dist.get_world_size():
        trainer.emit(Note(f"{shared.path.name} is of {ranks} rank(s): all take the random state of the first."))
    set_random_state(
        trainer.device, random_states(shared.tensors, trainer.rank if ranks == dist.get_world_size() else 0)
    )
    trainer.emit(Resumed(shared.step))
    return shared.step


def check_ranks(trainer: Trainer, step: int) -> None:
    """Compare every parameter and buffer over the ranks: all must have taken the same steps."""
    weights = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    group = dist.group.WORLD
    assert group is not None, "made before the model"
    for name, ranks in differing_weights(weights, group, trainer.device).items():
        raise VerificationError(f"after step {step}, rank {ranks[0]} and rank 0 hold different values of {name}.")


def largest(device: torch.device, *values: float) -> list[float]:
    """Return the largest of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    with recorded("end_step", world_name()):  # the host waits for the result
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()


def world_name() -> str:
    """Return the name of the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None, "made before the model"
    return str(group.group_name)


def peak_memory(device: torch.device) -> int:
    """Return the peak so far in bytes: of the allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def all_threads(device: torch.device) -> Iterator[None]:
    """Use every core for a while: the other ranks only wait."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(num_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
