"""What cannot work is refused in one line, before any process is started."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile.errors import CPError
from cpcompile.train import checkpoint, options
from cpcompile.train.options import missing_toolchain, validated
from tests.train_support import tiny_options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, r"--ranks 0 is not positive"),
        ({"learning_rate": float("nan")}, r"--learning-rate nan is not positive"),
        ({"length": 1}, r"--length 1 has nothing to predict"),
        ({"length": 3, "ranks": 4}, r"--length 3 is less than one token for each of --ranks 4"),
        ({"dtype": "int8"}, r"--dtype int8 is not an option: choose one of float64, float32"),
        ({"device": "tpu"}, r"--device tpu is not an option: choose one of auto, cpu, cuda"),
        ({"strategy": "rings"}, r"strategy='rings' is not an option"),
        ({"inner": "gcc"}, r"inner='gcc' is not an option"),
        ({"text": (Path("nowhere.txt"),)}, r"--text nowhere\.txt: no such file or folder"),
        ({"dataset": "books"}, r"--text and --dataset are two sources of texts: choose one"),
        ({"model": Path("nowhere")}, r"--model nowhere: no such folder or GGUF file"),
        ({"seed": 2**64}, r"--seed 18446744073709551616 has more than 64 bits"),
        ({"seed": -(2**63) - 1}, r"--seed -9223372036854775809 has more than 64 bits"),
        ({"heartbeat": -1.0}, r"--heartbeat -1.0 is negative: 0 waits for ever"),
        ({"heartbeat": float("nan")}, r"--heartbeat nan is negative"),
        ({"resume": True}, r"--resume needs --save DIR"),
        (
            {"check_finite": "operators", "inner": "aot_eager"},
            r"check_finite='operators' .* inner='aot_eager' would compile",
        ),
        (
            {"check_finite": "operators", "inner": "inductor"},
            r"check_finite='operators' .* inner='inductor' would compile",
        ),
        ({"check_finite": "steps", "inner": "eager"}, r"check_finite='steps' is not an option.*Did you mean 'step'"),
        ({"check_finite": "operators", "apply": False}, r"--check-finite runs what --no-apply does not make"),
        ({"log": Path("nowhere/log.jsonl")}, r"--log nowhere/log\.jsonl: not a file in an existing folder"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CPError, match=message):
        validated(tiny_options(tmp_path, **changes))


def test_datasets_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CPError, match=r"--dataset books needs datasets, which is not installed: pip install datasets\."
    ):
        validated(tiny_options(tmp_path, text=(), dataset="books"))


@pytest.mark.parametrize("is_local", [False, True])
def test_the_hub_is_asked_for_a_data_set_by_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(options.os, "environ", dict(options.os.environ))
    validated(tiny_options(tmp_path, text=(), dataset=str(tmp_path) if is_local else "someone/books"))
    assert options.os.environ["HF_HUB_OFFLINE"] == ("1" if is_local else "0")


def test_more_ranks_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CPError, match=r"--ranks 2 on this host needs 2 GPUs, and there are 1: use --device cpu"):
        validated(tiny_options(tmp_path, device="cuda"))
    chosen, notes = validated(tiny_options(tmp_path, device="auto"))
    assert chosen.device == "cpu"
    assert notes == ["2 ranks and 1 GPU(s): running on the CPU."]


def test_torchrun_with_another_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(CPError, match=r"--ranks 2 does not fit the 3 processes that torchrun has started"):
        validated(tiny_options(tmp_path))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()
    checkpoint.save(save, 4, {}, {})
    (save / "model").mkdir()
    with pytest.raises(CPError, match=r"holds a checkpoint of step 4: add --resume, or save to another folder"):
        validated(tiny_options(tmp_path, save=save))
    with pytest.raises(CPError, match=r"checkpoint-000004 has all of --steps 4 already"):
        validated(tiny_options(tmp_path, save=save, resume=True))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CPError, match=r"--resume: there is no checkpoint in"):
        validated(tiny_options(tmp_path, save=tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "is not a causal language model",
        ),
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        ({}, "config.json is not a transformers configuration"),
        ({"model_type": "llama"}, "no weights"),
    ],
)
def test_folder_without_a_causal_language_model(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CPError, match=message):
        validated(tiny_options(tmp_path, model=tmp_path))


def test_no_compiler_means_aot_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.shutil, "which", lambda name: None)
    chosen, notes = validated(tiny_options(tmp_path, inner="auto"))
    assert chosen.inner == "aot_eager"
    assert notes == ["Inductor needs a C++ compiler, which is not installed: using the inner compiler aot_eager."]
    with pytest.raises(CPError, match=r"--inner inductor needs a C\+\+ compiler"):
        validated(tiny_options(tmp_path, inner="inductor"))


def test_what_is_checked_is_not_compiled(tmp_path: Path) -> None:
    assert validated(tiny_options(tmp_path, inner="auto", check_finite="operators"))[0].inner == "eager"
    assert validated(tiny_options(tmp_path, inner="aot_eager", check_finite="step"))[0].inner == "aot_eager"


def test_the_chosen_compiler_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_toolchain("cpu") == "a C++ compiler"
