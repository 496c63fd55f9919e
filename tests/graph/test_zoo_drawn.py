"""Configurations drawn at random: the same by seed and index, run like the rest of the zoo, and counted with their reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")

from cpcompile.zoo.__main__ import app
from cpcompile.zoo.catalogue import ENTRIES
from cpcompile.zoo.drawn.batch import Batch
from cpcompile.zoo.drawn.command import run_random
from cpcompile.zoo.drawn.draw import Draw, draw
from cpcompile.zoo.drawn.heads import class_name, heads_of
from cpcompile.zoo.drawn.run import draw_of, first_that_runs, job_of, model_of, run_drawn
from cpcompile.zoo.drawn.settings import shared_settings
from cpcompile.zoo.drawn.summary import markdown
from cpcompile.zoo.progress import Limits
from cpcompile.zoo.result import CRASH, EXACT, NOT_CAPTURED, REFUSED, WRONG, Result, append, read
from cpcompile.zoo.sizes import SHARED

SIZES = {
    "heads": 3,
    "kv_heads": 1,
    "head_dim": 8,
    "layers": 1,
    "wide": 32,
    "vocabulary": 117,
    "experts": 2,
    "window": 3,
    "chunk": 4,
    "is_tied": False,
}


def a_draw(key: str = "causal:llama", **changes: Any) -> Draw:
    values: dict[str, Any] = {
        "seed": 0,
        "index": 0,
        "entry": ENTRIES[key],
        "head": "language model",
        "attention": ("sdpa", "eager"),
        "settings": SIZES,
        "rope": {},
        "batch": 2,
        "length": 11,
        "decoder_length": 9,
        "padding": "none",
        "is_packed": False,
        "takes_embeddings": False,
        "has_types": False,
        "hides_padding": True,
        "world_size": 2,
        "options": {"strategy": "auto", "balancer": "auto", "strict": True, "dynamic": True},
    }
    return Draw(**{**values, **changes})


class TestDraw:
    def test_the_same_by_seed_and_index(self) -> None:
        assert draw(5, 17) == draw(5, 17) == draw_of(draw(5, 17).key)
        assert draw(5, 17).text == (
            "vision:deit, sdpa, P=4, strategy=latent, balancer=balanced, strict=True, dynamic=True"
        )

    def test_every_choice_is_drawn(self) -> None:
        found = [draw(0, index) for index in range(400)]
        assert {d.world_size for d in found} == {1, 2, 3, 4, 8}
        assert {d.options["strategy"] for d in found} >= {"auto", "latent", "latent_heads", "usp", "halo"}
        assert {d.entry.category for d in found} == {"causal", "mlm", "s2s", "textenc", "vlm", "vision", "audio"}
        assert {d.padding for d in found} == {"none", "left", "right", "ones"}
        assert len({d.head for d in found}) == 9
        assert all(d.world_size % d.options["inner_size"] == 0 for d in found if d.options["strategy"] == "usp")

    def test_the_command_draws_the_same(self) -> None:
        assert draw(5, 17).command == "python -m cpcompile.zoo --random 1 --seed 5 --first 17"


class TestModel:
    def test_heads_are_those_of_transformers(self) -> None:
        assert set(heads_of(ENTRIES["causal:llama"])) == {
            "language model",
            "sequence classification",
            "token classification",
            "question answering",
            "no head",
        }
        assert heads_of(ENTRIES["vision:vit"]) == [""]
        assert class_name(ENTRIES["mlm:bert"], "question answering") == "BertForQuestionAnswering"
        assert class_name(ENTRIES["mlm:bert"], "masked language model") is None

    def test_sizes_and_rope_are_those_drawn(self) -> None:
        rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
        config = model_of(a_draw(rope=rope)).config
        assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (24, 3, 1)
        assert config.rope_parameters == rope
        assert shared_settings({}) == SHARED

    def test_what_a_model_does_not_take_is_the_zoos(self) -> None:
        taken, model, _, evidence = first_that_runs(a_draw("causal:gpt_oss"))
        assert (taken.attention[0], model.config.num_attention_heads) == ("eager", 3)
        assert evidence.dtype == torch.float64
        taken, model, _, _ = first_that_runs(a_draw("causal:dbrx"))
        assert (taken.settings, model.config.n_heads) == ({}, 4)

    def test_experts_are_compared_in_float64(self) -> None:
        assert first_that_runs(a_draw("causal:mixtral"))[3].dtype == torch.float64


class TestBatch:
    def test_padding(self) -> None:
        drawn = a_draw(padding="left")
        inputs = Batch(drawn, model_of(drawn)).make()
        mask = inputs["attention_mask"]
        assert mask[:, -1].all()
        assert not mask[:, 0].any()
        assert mask.sum(1).unique().numel() == 2
        assert (inputs["input_ids"][mask == 0] == 0).all()
        assert (inputs["labels"][mask == 0] == -100).all()

    def test_what_is_given(self) -> None:
        drawn = a_draw("mlm:bert", head="question answering", takes_embeddings=True, has_types=True, is_packed=True)
        inputs = Batch(drawn, model_of(drawn)).make()
        assert inputs.keys() == {"inputs_embeds", "token_type_ids", "start_positions", "end_positions"}
        packed = a_draw(is_packed=True, length=30)
        positions = Batch(packed, model_of(packed)).make()["position_ids"]
        assert positions[:, 0].tolist() == [0, 0]
        assert positions.diff().ne(1).any()


class TestRun:
    def test_a_handful(self) -> None:
        found: list[Result] = []
        for index in (2, 4, 14):
            run_drawn(job_of(draw(0, index)), found.append)
        assert [result.outcome for result in found] == [EXACT] * 3
        assert all(result.drawn and result.key == f"0:{i}" for result, i in zip(found, (2, 4, 14), strict=True))

    def test_the_command_resumes_and_says_what_failed(self, tmp_path: Path) -> None:
        path = tmp_path / "random.jsonl"
        append(path, [Result("0:3", draw(0, 3).variant, WRONG, "first difference at mul")])
        code = run_random(
            range(3, 4), 0, "", path, Console(quiet=True), Limits(num_workers=1, timeout=60, memory=8), resume=True
        )
        assert code == 1
        assert [result.key for result in read(path)] == ["0:3"]
        assert draw(0, 3).command in path.with_suffix(".md").read_text()

    def test_options_that_are_drawn_are_refused(self) -> None:
        result = CliRunner().invoke(app, ["--random", "3", "--attention", "sdpa"])
        assert result.exit_code == 2

    def test_only_those_of_a_pattern(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(
            app, ["--random", "40", "--only", "no such thing", "--output", str(tmp_path / "random")]
        )
        assert (result.exit_code, read(tmp_path / "random.jsonl")) == (0, [])


class TestSummary:
    def test_counts_and_reasons(self) -> None:
        outcomes = [EXACT, REFUSED, REFUSED, CRASH, NOT_CAPTURED]
        found = [Result(f"0:{i}", draw(0, i).variant, o, "why" if o != EXACT else "") for i, o in enumerate(outcomes)]
        page = markdown(found)
        assert "| all | 1 | 2 | 0 | 1 | 1 | 0 |" in page
        assert "- 2 x `why`" in page
        assert "`python -m cpcompile.zoo --random 1 --seed 0 --first 3`" in page
