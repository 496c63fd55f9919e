"""Loading: code that lies with a model is not run, and nobody is asked for it on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from cpcompile.errors import ConfigError
from cpcompile.train.model import find_model, load_tokenizer
from tests.train_support import save_tiny_llama

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
