"""Loading a model: weights that leave a parameter random are refused, and code that lies with it is not run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from cpcompile.errors import ConfigError
from cpcompile.train.model import find_model, load_model, load_tokenizer
from tests.train_support import save_tiny_llama

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def changed(original: Path, folder: Path, change: Callable[[Weights], object], **config: Any) -> Path:
    """Return a copy of the model with other weights and entries of the configuration."""
    shutil.copytree(original, folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder / "model"


def load(folder: Path, notes: list[str]) -> torch.nn.Module:
    return load_model(find_model(folder), torch.float32, torch.device("cpu"), notes.append)


def same(weights: Weights) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda weights: weights.pop("model.norm.weight"),
            {},
            r"its weights are not those of a LlamaForCausalLM: model\.norm\.weight would be random\.$",
        ),
        (
            lambda weights: weights.update({"model.nrom.weight": weights.pop("model.norm.weight")}),
            {},
            r"model\.norm\.weight would be random; the file has model\.nrom\.weight instead\.$",
        ),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(25)}), {}, r"does not load: RuntimeError"),
        (same, {"model_type": "mistral"}, r"model_type 'mistral' is MistralForCausalLM, but .* LlamaForCausalLM\.$"),
        (
            same,
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            r"not those of a GPT2LMHeadModel: .* and \d+ more would be random; the file has .* more instead\.$",
        ),
        (same, {"num_hidden_layers": 3}, r"model\.layers\.2\..* and 6 more would be random\.$"),
    ],
)
def test_refused(original: Path, tmp_path: Path, change: Any, config: dict[str, Any], message: str) -> None:
    folder = changed(original, tmp_path, change, **config)
    with pytest.raises(ConfigError, match=f"(?m){message}"):
        load(folder, [])


def test_a_damaged_file(original: Path, tmp_path: Path) -> None:
    folder = changed(original, tmp_path, same)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"does not load: SafetensorError"):
        load(folder, [])


def test_what_has_no_place_is_said(original: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    folder = changed(original, tmp_path, lambda weights: weights.update({"model.extra": torch.ones(2)}))
    load(folder, notes)
    assert notes == [f"LlamaForCausalLM has no place for model.extra of {folder}: left out."]


def test_a_whole_model_says_nothing(original: Path) -> None:
    notes: list[str] = []
    load(original, notes)
    assert notes == []


CODE = """
raise SystemExit("code of the folder was run")
"""


def test_code_in_the_folder_is_refused_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_llama(tmp_path)
    settings = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    (folder / "own.py").write_text(CODE)

    def asked(*args: Any) -> str:
        pytest.fail(f"asked on the terminal: {args}")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ConfigError, match=r"its tokenizer does not load: it needs code (.*)cpcompile\.apply\(model"):
        load_tokenizer(find_model(folder))
