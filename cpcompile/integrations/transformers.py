"""transformers: a Trainer, or one of TRL, whose model is context parallel.

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    cpcompile.integrations.transformers.apply(trainer)                           # the added line
    trainer.train()

To the Trainer the ranks of a group look like data-parallel ranks that happen to get equal batches, so that the means that it
takes over ranks (loss, gradients, items in a batch) are those of one device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.errors import ConfigError
from cpcompile.front.apply import whole_outputs
from cpcompile.front.data import rank_and_replicas
from cpcompile.integrations._trl import replace_fused_head
from cpcompile.integrations.accelerate import AxisName, apply_to, base_of, mesh_of_all, share_batches

Trainer = TypeVar("Trainer")
# Trainers that generate while they train, by class name.
GENERATING = ("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "DistillationTrainer", "GKDTrainer", "PPOTrainer")


def apply(trainer: Trainer, mesh: DeviceMesh | None = None, *, axis: AxisName = None, **options: Any) -> Trainer:
    """Make the model of a Trainer context parallel, and have it deal the same batches to the ranks of a group.

    Call it before `train`, `evaluate` or `predict`. Losses in the log, clipping, accumulation, checkpoints and resuming are as on
    one device with the batches of all groups. Metrics get whole outputs, each sample once. In training the outputs are whole if
    the Trainer computes the loss from them (`compute_loss_func`, label smoothing, a `compute_loss` of its own, TRL), otherwise no
    logits leave a rank; `outputs="local"` leaves them there, for a loss by `cpcompile.cross_entropy`.

    Args:
        trainer: a `transformers.Trainer` or a subclass; TRL's for supervised, preference and reward training.
        mesh: of all ranks, or None: all ranks share each sequence.
        axis, options: as for `cpcompile.apply`; `grad_sync` follows from how the Trainer wraps the model.

    Returns:
        The same Trainer.

    Raises:
        ConfigError: an argument of the Trainer does not go together with this; the message says what to change.
    """
    refuse(trainer)
    own: Any = trainer
    mesh = mesh if mesh is not None else mesh_of_all(own.accelerator)
    share_batches(own.accelerator, mesh, axis)
    options = {"outputs": "full" if reads_outputs(own) else "local"} | options
    reference = getattr(own, "ref_model", None)  # of preference training
    for model in [own.model] if reference is None else [own.model, reference]:
        replace_fused_head(base_of(model))
        apply_to(own.accelerator, model, mesh, axis, options)
    count_once(own, mesh, axis)
    give_whole_outputs(own)
    return trainer


def refuse(trainer: Any) -> None:
    """Refuse what is no Trainer, and arguments that would make another model, program or deal.

    Raises:
        ConfigError: with the argument and what to do.
    """
    names = [cls.__name__ for cls in type(trainer).__mro__]
    if "Trainer" not in names or not hasattr(trainer, "accelerator"):
        raise ConfigError(f"{names[0]} is no Trainer of transformers: pass the one that will train.")
    for name in names:
        if name in GENERATING:
            raise ConfigError(
                f"{name} generates while it trains, token by token, which a model of sharded sequences does not: generate by "
                "another model, and train on what it returns."
            )
    args = trainer.args
    found = {
        "torch_compile=True": (
            args.torch_compile,
            "the model would be compiled twice, and cpcompile compiles it: leave it out",
        ),
        "model_init": (trainer.model_init is not None, "it makes another model in train(): pass model= instead"),
        "use_liger_kernel=True": (
            getattr(args, "use_liger_kernel", False),
            "its kernels have a backward that cannot be followed: leave it out",
        ),
        'train_sampling_strategy="batch_rebalance"': (
            getattr(args, "train_sampling_strategy", "") == "batch_rebalance",
            'it deals each rank batches of its own: use "random" or "group_by_length"',
        ),
        "predict_with_generate=True": (
            getattr(args, "predict_with_generate", False),
            "generation is token by token: evaluate losses, and generate after cpcompile.remove(model)",
        ),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "each rank would draw noise of its own: leave it out",
        ),
    }
    for name, (is_set, reason) in found.items():
        if is_set:
            raise ConfigError(f"{name} does not go together with context parallelism: {reason}.")
    if args.n_gpu > 1:
        raise ConfigError("one process would run all GPUs (DataParallel): start one for each GPU, by torchrun.")
    if trainer.model_wrapped is not trainer.model:
        raise ConfigError("the Trainer has wrapped its model already: call this before train().")


def reads_outputs(trainer: Any) -> bool:
    """Tell whether, in training, more is read of what the model returns than its loss."""
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    is_own = not (owner.__name__ == "Trainer" and owner.__module__.startswith("transformers."))
    return is_own or trainer.label_smoother is not None or trainer.compute_loss_func is not None


def count_once(trainer: Any, mesh: DeviceMesh, axis: AxisName) -> None:
    """Let the samples of a group count once, in metrics and in the numbers of the log."""
    _, replicas = rank_and_replicas(mesh, axis)
    ranks = mesh.size() // replicas
    total = trainer.get_total_train_batch_size
    trainer.get_total_train_batch_size = lambda args: total(args) // ranks
    gather = trainer.gather_function
    given = gather.keywords if isinstance(gather, functools.partial) else {}
    trainer.gather_function = functools.partial(trainer.accelerator.gather_for_metrics, **given)


def give_whole_outputs(trainer: Any) -> None:
    """Have steps of evaluation return whole outputs, unless the loss alone is asked for."""
    step = trainer.prediction_step

    @functools.wraps(step)
    def prediction_step(
        model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        with contextlib.nullcontext() if prediction_loss_only else whole_outputs(base_of(trainer.model)):
            return step(model, inputs, prediction_loss_only, *args, **kwargs)

    trainer.prediction_step = prediction_step
