"""Trainers and loops of frameworks on 2 groups of 2 gloo ranks, against the same ones on one device: losses, metrics, weights."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import cpcompile
from cpcompile.errors import ConfigError
from cpcompile.integrations._trl import replace_fused_head
from cpcompile.integrations.accelerate import refuse as refuse_accelerator
from cpcompile.integrations.transformers import refuse as refuse_trainer
from tests.gloo.frameworks import far, on_one_device, on_ranks, weights, whole

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

GROUPS, LENGTH = 2, 29
FLOAT32 = 1e-5


def small(cls: str = "LlamaForCausalLM", **changes: Any) -> Any:
    """Return a small model, the same everywhere."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=48, num_key_value_heads=2, use_cache=False, pad_token_id=0, **(sizes | changes)
    )
    return getattr(transformers, cls)(config)


def rows(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Return random rows, in which other numbers of tokens have labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 48, (count, LENGTH), generator=generator)
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=generator) < torch.rand(count, 1, generator=generator), -100
    )
    labels[:, -1] = ids[:, -1]
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def mesh_of_groups(count: int = GROUPS) -> Any:
    return init_device_mesh("cpu", (count, torch.distributed.get_world_size() // count), mesh_dim_names=("dp", "cp"))


def assert_equal(results: list[dict[str, float]], tolerance: float = FLOAT32) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < tolerance, f"rank {rank}: {name} is off by {found[name]:.1e}"


class Iterable(torch.utils.data.IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter(rows(8))


def loop(together: int, apply: Callable[..., Any], data: Any, **arguments: Any) -> dict[str, Any]:
    """Train two steps of two batches with accelerate, and evaluate on rows that do not divide."""
    from accelerate import Accelerator

    is_sharded = arguments.pop("fsdp2", False)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2, **arguments), small()
    if is_sharded and apply is not untouched:
        shard_by_accelerate(accelerator)
    loader = torch.utils.data.DataLoader(data, batch_size=together)
    uneven = torch.utils.data.DataLoader(rows(7, 2), batch_size=together)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    apply(accelerator, model)
    wrapped, optimizer, loader, uneven = accelerator.prepare(model, optimizer, loader, uneven)
    found: dict[str, Any] = {}
    for index, batch in enumerate(loader):
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch, num_items_in_batch=10 * together).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                found[f"norm {index}"] = whole(accelerator.clip_grad_norm_(wrapped.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
        found[f"loss {index}"] = accelerator.reduce(loss.detach(), "mean")
    model.eval()
    seen, objects = [], []
    for batch in uneven:
        with torch.no_grad():
            logits = wrapped(**batch).logits
        joined = cpcompile.unshard(logits, wrapped) if apply is not untouched else logits
        seen.append(accelerator.gather_for_metrics(joined))
        objects += accelerator.gather_for_metrics([int(ids[0]) for ids in batch["input_ids"]], use_gather_object=True)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    after = unwrapped(**{name: x[None] for name, x in rows(1, 3)[0].items()}).loss.detach()
    return found | {"seen": torch.cat(seen), "objects": torch.tensor(objects), "after": after} | weights(model)


def shard_by_accelerate(accelerator: Any) -> None:
    """Have an Accelerator of CPU ranks prepare models by FSDP2, which it does on GPUs only."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2


def untouched(*args: Any, **options: Any) -> None:
    """Stand in for `apply` on one device."""


def accelerated(rank: Any, is_iterable: bool, arguments: dict[str, Any]) -> dict[str, float]:
    from cpcompile.integrations.accelerate import apply

    def data() -> Any:
        return Iterable() if is_iterable else rows(8)

    with on_ranks():
        mesh = mesh_of_groups()
        found = loop(1, lambda a, m: apply(a, m, mesh, axis="cp", inner="eager"), data(), **arguments)
    return far(found, on_one_device(lambda: loop(GROUPS, untouched, data(), **arguments)))


def slow(*values: Any) -> list[Any]:
    """Return parameters of tests that need not run each time."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("is_iterable", [False, *slow(True)])
def test_accelerate(pool: Any, is_iterable: bool) -> None:
    assert_equal(pool.run(4, accelerated, is_iterable, {}))


@pytest.mark.slow
def test_accelerate_in_bfloat16(pool: Any) -> None:
    assert_equal(pool.run(4, accelerated, False, {"mixed_precision": "bf16"}), tolerance=0.05)


def test_accelerate_with_fsdp2(pool: Any) -> None:
    assert_equal(pool.run(4, accelerated, False, {"fsdp2": True}))


def metrics(prediction: Any) -> dict[str, float]:
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    right = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).sum()
    return {"rows": len(logits), "right": float(right), "mean": float(logits.max(-1).values.mean())}


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss over the logits of all tokens."""
    scores = outputs.logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum())


def run_trainer(trainer: Any, resume: bool = False, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train and evaluate; returns what was logged, the metrics but those `skipped`, and the weights."""
    trainer.train(resume_from_checkpoint=resume)
    found = {
        f"{name} {line['step']}": line[name]
        for line in trainer.state.log_history
        for name in (
            "loss",
            "grad_norm",
            "entropy",
            "mean_token_accuracy",
            "rewards/margins",
            "logits/chosen",
            "num_tokens",
        )
        if name in line
    }
    evaluated = {
        name: x
        for name, x in trainer.evaluate().items()
        if not name.endswith(("runtime", "per_second", "time", "epoch", *skipped))
    }
    return found | evaluated | weights(trainer.model)


def arguments(cls: Any, together: int, folder: str, **changes: Any) -> Any:
    fixed = {
        "max_steps": 2,
        "per_device_train_batch_size": together,
        "per_device_eval_batch_size": together,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.5,
    }
    return cls(folder, **(fixed | changes))


def plain(together: int, apply: Callable[..., Any], case: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "smoothing": {"label_smoothing_factor": 0.1},
        "each device": {"average_tokens_across_devices": False},
        "resumed": {"save_strategy": "steps", "save_steps": 1, "max_steps": 3},
        "checkpoints": {"gradient_checkpointing": True},
    }.get(case, {})
    given: dict[str, Any] = {"own loss": {"compute_loss_func": own_loss}, "loss only": {}}.get(case, {})
    if case != "loss only":
        given["compute_metrics"] = metrics
    data = rows(24)
    if case == "each device":  # the mean over groups of their means is that over rows which have equally many labels
        for row in data:
            row["labels"] = row["input_ids"]
    # A Trainer's loss over groups is that of one device where batches are full, or counted over all ranks.
    num_rows, skipped = (7 if case == "metrics" else 8), ("eval_loss",) if case in ("metrics", "each device") else ()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if apply is not untouched:
            torch.distributed.broadcast_object_list(shared)
        made = arguments(transformers.TrainingArguments, together, shared[0], **changes)

        def trainer() -> Any:
            built = transformers.Trainer(small(), made, train_dataset=data, eval_dataset=rows(num_rows, 2), **given)
            if case == "fsdp2" and apply is not untouched:
                shard_by_accelerate(built.accelerator)
                built.is_fsdp_enabled = True
            apply(built)
            return built

        if case != "resumed":
            built = trainer()
            found = run_trainer(built, skipped=skipped)
            is_sharded = all(isinstance(p, DTensor) for p in built.model.parameters())
            assert is_sharded == (case == "fsdp2" and apply is not untouched)
            return found
        trainer().train()
        if apply is not untouched:
            torch.distributed.barrier()
        found = run_trainer(trainer(), resume=f"{shared[0]}/checkpoint-2")  # type: ignore[arg-type]
        if apply is not untouched:
            torch.distributed.barrier()
        return found


def trained(rank: Any, make: str, case: str) -> dict[str, float]:
    from cpcompile.integrations.transformers import apply

    run = {"plain": plain, "supervised": supervised, "preferred": preferred}[make]
    # KTO pairs completions with those of others on its device: one group is as one device, two groups are not.
    num_groups, together = (1, 2) if case == "kto" else (GROUPS, 1)
    with on_ranks():
        mesh = mesh_of_groups(num_groups)
        found = run(together, lambda trainer: apply(trainer, mesh, axis="cp", inner="eager"), case)
    return far(found, on_one_device(lambda: run(num_groups * together, untouched, case)))


@pytest.mark.always
@pytest.mark.parametrize(
    "case", ["metrics", "own loss", "resumed", "fsdp2", *slow("smoothing", "each device", "loss only", "checkpoints")]
)
def test_trainer(pool: Any, case: str) -> None:
    assert_equal(pool.run(4, trained, "plain", case))


def tokenizer() -> Any:
    """Return one whose words are w1, w2, ..."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 48)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def texts(count: int, longest: int, seed: int) -> list[str]:
    """Return texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(2, 48, (n,), generator=generator).tolist()) for n in sizes]


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}


def lora(is_wanted: bool) -> Any:
    """Return adapters that are not zero at the beginning."""
    return pytest.importorskip("peft").LoraConfig(**LORA, init_lora_weights=False) if is_wanted else None


def supervised(together: int, apply: Callable[..., Any], case: str) -> dict[str, Any]:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    changes: dict[str, Any] = {
        "packed": {"packing": True, "max_length": LENGTH},
        "padding-free": {"padding_free": True, "max_length": None},
        "dft": {"loss_type": "dft"},
    }.get(case, {})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=small(),
            args=arguments(trl.SFTConfig, together, folder, gradient_checkpointing=False, bf16=False, **changes),
            train_dataset=datasets.Dataset.from_dict({"text": texts(40, 20, 1)}),
            eval_dataset=datasets.Dataset.from_dict({"text": texts(12, 20, 2)}),
            processing_class=tokenizer(),
            peft_config=lora(case == "lora"),
        )
        apply(trainer)
        return run_trainer(trainer, skipped=("eval_loss",))  # a mean over groups of means over tokens


def preferred(together: int, apply: Callable[..., Any], case: str) -> dict[str, Any]:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    is_reward = case == "reward"
    name = {"reward": "Reward", "kto": "KTO"}.get(case, "DPO")
    made, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    columns: dict[str, list[Any]] = {
        "prompt": texts(16, 9, 3),
        "chosen": texts(16, 12, 4),
        "rejected": texts(16, 12, 5),
    }
    if case == "kto":
        columns = {
            "prompt": columns["prompt"],
            "completion": columns["chosen"],
            "label": [True, False, False, True] * 4,
        }
    model = small("LlamaForSequenceClassification", num_labels=1) if is_reward else small()
    reference = {"ref_model": small()} if case in ("dpo", "kto") else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(
            model=model,
            **reference,
            args=arguments(config, together, folder, gradient_checkpointing=False, bf16=False),
            train_dataset=datasets.Dataset.from_dict(columns),
            eval_dataset=datasets.Dataset.from_dict({name: x[:6] for name, x in columns.items()}),
            processing_class=tokenizer(),
            peft_config=lora(case == "lora"),
        )
        apply(trainer)
        return run_trainer(trainer)


@pytest.mark.parametrize("case", ["packed", *slow("lora", "padded", "padding-free", "dft")])
def test_supervised(pool: Any, case: str) -> None:
    assert_equal(pool.run(4, trained, "supervised", case))


@pytest.mark.parametrize("case", ["dpo", *slow("lora", "reward", "kto")])
def test_preferences(pool: Any, case: str) -> None:
    assert_equal(pool.run(4, trained, "preferred", case))


class Trainer:
    """What is read of a Trainer before it is touched."""

    def __init__(self, **changes: Any) -> None:
        off = {
            "torch_compile": False,
            "use_liger_kernel": False,
            "train_sampling_strategy": "random",
            "predict_with_generate": False,
            "neftune_noise_alpha": None,
            "n_gpu": 1,
        }
        own = {name: changes.pop(name) for name in ("model_init", "model_wrapped") if name in changes}
        self.args = types.SimpleNamespace(**(off | changes))
        self.accelerator, self.model, self.model_init, self.model_wrapped = None, 1, None, 1
        vars(self).update(own)


class GRPOTrainer(Trainer):
    """One that generates."""


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (Trainer(torch_compile=True), "torch_compile=True.*compiled twice.*leave it out"),
        (Trainer(model_init=dict), "model_init.*pass model="),
        (Trainer(use_liger_kernel=True), "use_liger_kernel=True.*leave it out"),
        (Trainer(train_sampling_strategy="batch_rebalance"), "batch_rebalance.*group_by_length"),
        (Trainer(predict_with_generate=True), "predict_with_generate=True.*cpcompile.remove"),
        (Trainer(neftune_noise_alpha=5.0), "neftune_noise_alpha.*leave it out"),
        (Trainer(n_gpu=2), "DataParallel.*torchrun"),
        (Trainer(model_wrapped=2), "wrapped its model already.*before train"),
        (GRPOTrainer(), "GRPOTrainer generates while it trains"),
        (torch.nn.Linear(1, 1), "Linear is no Trainer"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused(trainer: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        refuse_trainer(trainer)


def test_a_plain_trainer_is_not_refused() -> None:
    refuse_trainer(Trainer())
    refuse_accelerator(accelerator_stub())


def accelerator_stub(**changes: Any) -> Any:
    plain = {
        "distributed_type": "MULTI_GPU",
        "is_fsdp2": False,
        "parallelism_config": None,
        "state": types.SimpleNamespace(dynamo_plugin=types.SimpleNamespace(backend="NO")),
        "dispatch_batches": None,
    }
    return types.SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"distributed_type": "FSDP"}, "version 1.*fsdp_version=2"),
        ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED.*fsdp_version=2"),
        ({"parallelism_config": types.SimpleNamespace(cp_size=2)}, r"ParallelismConfig\(cp_size=2\).*mesh="),
        ({"parallelism_config": types.SimpleNamespace(tp_size=2)}, r"ParallelismConfig\(tp_size=2\).*leave it"),
        (
            {"state": types.SimpleNamespace(dynamo_plugin=types.SimpleNamespace(backend="INDUCTOR"))},
            "compiled twice.*INDUCTOR.*inner=",
        ),
        ({"dispatch_batches": True}, "dispatch_batches=True.*leave it out"),
    ],
)
def test_what_an_accelerator_cannot_do_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        refuse_accelerator(accelerator_stub(**changes))


def test_an_unknown_head_of_trl_is_refused() -> None:
    outputs, temperature, original_forward = ("log_probs", "new"), 1.0, None

    def _fused_forward(self: Any) -> Any:
        return outputs, temperature, original_forward

    model = torch.nn.Linear(2, 2)
    replace_fused_head(model)
    assert "forward" not in vars(model), "another model is left alone"
    model.forward = types.MethodType(_fused_forward, model)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"log_probs, new of each token.*TRL 1\.16"):
        replace_fused_head(model)
