"""A run that was interrupted goes on exactly where it was, and the log shows one curve."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from cpcompile.errors import InputError, VerificationError
from cpcompile.train import checkpoint, loop
from cpcompile.train.events import Gradients
from cpcompile.train.group import process_group
from cpcompile.train.options import TrainOptions
from cpcompile.train.report import Reporter
from tests.train_support import tiny_options


def run(folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Train on one rank in this process; return the log without times."""
    log = folder / "log.jsonl"
    options = tiny_options(folder, ranks=1, log=log, **changes)
    (folder / "store").unlink(missing_ok=True)
    with (
        Reporter(options, Console(quiet=True)) as report,
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
