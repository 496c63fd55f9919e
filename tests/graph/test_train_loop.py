"""A run that was interrupted goes on exactly where it was, and the log shows one curve."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import cpcompile
from cpcompile.errors import InputError, StorageError, VerificationError
from cpcompile.train import checkpoint, loop
from cpcompile.train.events import Gradients
from cpcompile.train.group import process_group
from cpcompile.train.interrupt import Interrupt
from cpcompile.train.options import TrainOptions, validated
from cpcompile.train.report import Reporter
from tests.train_support import tiny_options


def run(folder: Path, console: Console | None = None, **changes: Any) -> list[dict[str, float]]:
    """Train on one rank in this process; return the log without times."""
    log = folder / "log.jsonl"
    options = tiny_options(folder, ranks=1, log=log, **changes)
    (folder / "store").unlink(missing_ok=True)
    with (
        Reporter(options, console or Console(quiet=True)) as report,
        process_group(options, 0, 1, 0, f"file://{folder}/store") as device,
    ):
        loop.train(options, 0, device, report)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: record[key] for key in ("step", "loss", "grad_norm")} for record in records]


def test_a_resumed_run_continues_the_same_curve(tmp_path: Path) -> None:
    whole = run(tmp_path, apply=False)
    save = tmp_path / "run"
    run(tmp_path, apply=False, save=save, steps=3, save_every=2)
    shutil.rmtree(save / "checkpoint-000003")
    resumed = run(tmp_path, apply=False, save=save, resume=True)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]
    assert resumed == whole
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_the_trained_model_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(tmp_path, apply=False, save=tmp_path / "run", steps=1)
    folder = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(folder)("fox")["input_ids"]
    state = checkpoint.load(tmp_path / "run").tensors
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], state[f"model.{name}"]) for name in saved)


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(tmp_path, apply=False, save=save, steps=1)
    with pytest.raises(InputError, match=r"belongs to another run: seed was 0 and is 1"):
        run(tmp_path, apply=False, save=save, resume=True, seed=1)
    dist.destroy_process_group()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^step 2: the loss is nan and the gradient norm nan\. .*Try a smaller --learning-rate",
    ):
        run(tmp_path, apply=False, learning_rate=1e30)
    dist.destroy_process_group()


def test_the_model_is_applied_with_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(cpcompile, "apply", lambda model, mesh, **given: seen.update(given), raising=False)
    run(tmp_path, steps=1, check=False, check_finite="operators", strategy="ring")
    rest = {"balancer": "auto", "kernel": "auto"}
    assert seen == {"strategy": "ring", "inner": "eager", "check_finite": "operators", **rest}


def test_no_number_on_one_device_either_is_not_a_difference(tmp_path: Path) -> None:
    options = tiny_options(tmp_path, ranks=1)
    with process_group(options, 0, 1, 0, f"file://{tmp_path}/store") as device:
        trainer = loop.build(options, 0, device, lambda event: None)
        trainer.model.get_output_embeddings().weight.data[0, 0] = float("nan")  # type: ignore[operator]
        single = loop.first_step_on_one_device(trainer, 0)
        with pytest.raises(InputError, match=r"^step 1: the loss is nan .* before any step, in lm_head\.weight"):
            loop.run_step(trainer, 0, single, Interrupt())


def test_seeds_of_64_bits(tmp_path: Path) -> None:
    assert run(tmp_path, apply=False, steps=2, seed=20261128215000) != run(tmp_path, apply=False, steps=2)


def test_damage_is_said_once_and_the_older_one_is_taken(tmp_path: Path) -> None:
    whole = run(tmp_path, apply=False)
    save = tmp_path / "run"
    run(tmp_path, apply=False, save=save, steps=3, save_every=2)
    tensors = save / "checkpoint-000003" / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-100] ^= 1
    tensors.write_bytes(data)
    console = Console(file=io.StringIO(), width=300)
    assert run(tmp_path, console, apply=False, save=save, resume=True) == whole
    said = [line for line in console.file.getvalue().splitlines() if "damaged" in line]  # type: ignore[attr-defined]
    assert said == [
        "checkpoint-000003 is damaged (tensors.safetensors does not have the digest that was written); "
        "checkpoint-000002 is used."
    ]


def test_another_model_of_equal_shapes_is_not_resumed(tmp_path: Path) -> None:
    save, config = tmp_path / "run", tmp_path / "tiny" / "config.json"
    run(tmp_path, apply=False, save=save, steps=1)
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(InputError, match=r"(?m)belongs to another run: model\.hidden_act was 'silu' and is 'gelu'\.$"):
        run(tmp_path, apply=False, save=save, resume=True)
    dist.destroy_process_group()


def test_a_run_that_was_killed_before_the_model_was_written_writes_it(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(tmp_path, apply=False, save=save, steps=1)
    shutil.rmtree(save / "model")
    validated(tiny_options(tmp_path, save=save, steps=1, resume=True))
    run(tmp_path, apply=False, save=save, steps=1, resume=True)
    assert (save / "model" / "model.safetensors").is_file()


def test_a_full_disk_for_the_model_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def full(model: Any, path: Path) -> None:
        path.mkdir()
        raise OSError(28, "No space left on device")

    save = tmp_path / "run"
    tiny_options(tmp_path)  # makes the model
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"the trained model cannot be written to .*that of step 1 is whole"):
        run(tmp_path, apply=False, save=save, steps=1)
    assert not (save / "model.partial").exists()
    dist.destroy_process_group()


def test_a_first_step_that_differs_ends_the_run(tmp_path: Path) -> None:
    options: TrainOptions = tiny_options(tmp_path, ranks=1)
    with process_group(options, 0, 1, 0, f"file://{tmp_path}/store") as device:
        trainer = loop.build(options, 0, device, lambda event: None)
        single = loop.first_step_on_one_device(trainer, 0)
        assert single is not None
        wrong = Gradients(single.loss * 1.001, single.grad_norm, single.grad_norms)
        loop.compare(trainer, single, single)
        with pytest.raises(VerificationError, match=r"the first step is not that of one device: loss .* against .*"):
            loop.compare(trainer, single, wrong)
