"""A checkpoint is taken up by the job that wrote it, and what differs is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cpcompile.errors import InputError
from cpcompile.train.job import check_same_job, describe_job
from tests.train_support import tiny_options

CONFIG = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def job(tmp_path: Path, text: str = "digest", config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **(config or {})}))
    return describe_job(dataclasses.replace(tiny_options(tmp_path), **changes), model, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 32}, "length was 65 and is 32"),
        ({"seed": 20261128215000}, "seed was 0 and is 20261128215000"),
        (
            {"learning_rate": 1e-4, "dtype": "bfloat16"},
            "learning_rate was 0.001 and is 0.0001; dtype was 'float32' and",
        ),
        ({"text": "other"}, "text was 'digest' and is 'other'"),
        ({"config": {"hidden_act": "gelu"}}, "model.hidden_act was 'silu' and is 'gelu'"),
        ({"config": {"rms_norm_eps": 1e-5}}, "model.rms_norm_eps was 1e-06 and is 1e-05"),
        (
            {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
            "model.rope_parameters.rope_theta was 10000.0 and is 500000.0",
        ),
        ({"config": {"num_attention_heads": 4, "head_dim": 4}}, "model.num_attention_heads was 2 and is 4"),
    ],
)
def test_another_job_of_equal_shapes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_same_job(job(tmp_path), job(tmp_path, **changes), "checkpoint-000001")
    assert str(raised.value).startswith("checkpoint-000001 belongs to another run: ")
    assert message in str(raised.value)


def test_the_same_job(tmp_path: Path) -> None:
    wanted = job(tmp_path, steps=1000, ranks=3, strategy="ring", save_every=7)
    check_same_job(job(tmp_path), wanted, "checkpoint-000001")


def test_entries_of_another_version_of_transformers_do_not_count(tmp_path: Path) -> None:
    saved, wanted = job(tmp_path), job(tmp_path)
    wanted["model"]["new_entry"] = None
    with pytest.raises(InputError, match=r"model\.new_entry was 'not there' and is None"):
        check_same_job(saved, wanted, "checkpoint-000001")
    wanted["transformers"] = "99.0.0"
    check_same_job(saved, wanted, "checkpoint-000001")
    wanted["model"]["hidden_act"] = "gelu"
    with pytest.raises(InputError, match=r"(?m)another run: model\.hidden_act was 'silu' and is 'gelu'\.$"):
        check_same_job(saved, wanted, "checkpoint-000001")


def test_another_class_with_the_same_entries(tmp_path: Path) -> None:
    saved, wanted = job(tmp_path), job(tmp_path)
    saved["model"]["class"] = "MistralForCausalLM"
    with pytest.raises(InputError, match=r"model\.class was 'MistralForCausalLM' and is 'LlamaForCausalLM'"):
        check_same_job(saved, wanted, "checkpoint-000001")
