"""Catalogues of programs: they are found, run for several numbers of ranks from one trace, and reported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

pytest.importorskip("transformers")

from cpcompile.inspect.model_runs import LockstepBackend
from cpcompile.rules import RULES
from cpcompile.zoo.__main__ import app
from cpcompile.zoo.evidence import gather_evidence
from cpcompile.zoo.inputs import Sampler
from cpcompile.zoo.programs import PROGRAMS, find_programs, make_program
from cpcompile.zoo.programs.making import CATALOGUES
from cpcompile.zoo.programs.parts import VOCABULARY, WIDTH, Attention, token_loss
from cpcompile.zoo.programs.registry import Program
from cpcompile.zoo.report import compact, markdown
from cpcompile.zoo.result import EXACT, NOT_AVAILABLE, REFUSED, Result, Variant, read
from cpcompile.zoo.run import Job, run_job

OWN = [key for key in PROGRAMS if key.startswith(("handwritten:", "science:"))]


def variant(world_size: int = 2, strict: bool = True) -> Variant:
    return Variant("", packed=False, world_size=world_size, strict=strict)


def results(key: str, *variants: Variant) -> list[Result]:
    found: list[Result] = []
    run_job(Job(key, variants), found.append)
    return found


class TestCatalogues:
    def test_each_has_programs(self) -> None:
        counts = {name: len(find_programs([name])) for name in CATALOGUES}
        assert sum(counts.values()) == len(PROGRAMS)
        assert counts["diffusion"] > 50
        assert counts["vision"] > 30
        assert counts["science"] > 30
        assert counts["handwritten"] > 90

    def test_they_are_found_by_key_name_and_catalogue(self) -> None:
        assert find_programs(["handwritten"], "dit") == ["handwritten:dit"]
        assert find_programs(["handwritten", "science"], "science:hstu") == ["science:hstu"]
        assert find_programs(["science"], "dit") == []
        assert len(find_programs(CATALOGUES, "vision")) == len(find_programs(["vision"]))

    @pytest.mark.parametrize(
        ("key", "package"),
        [
            ("handwritten:nanogpt", "torch"),
            ("science:sasrec", "torch"),
            ("diffusion:WanTransformer3DModel", "diffusers"),
            ("vision:vit_tiny_patch16_224", "timm"),
        ],
    )
    def test_one_of_each(self, key: str, package: str) -> None:
        (result,) = results(key, variant(strict=False))
        assert (result.outcome, result.reason) == (
            (EXACT, "") if find_spec(package) else (NOT_AVAILABLE, f"{package} is not installed")
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("key", OWN)
    def test_every_parameter_matters(self, key: str) -> None:
        made = make_program(key)
        evidence = gather_evidence(made.model, made.inputs)
        assert evidence.dtype == torch.float64
        assert len(evidence.gradients) > 0.4 * len(list(made.model.parameters()))


class Sines(nn.Module):
    """Attention of hyperbolic sines."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            Attention(),
            nn.Linear(WIDTH, VOCABULARY),
        )

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return token_loss(self.head(self.attention(self.embed(input_ids).sinh())), labels)


def sines(sampler: Sampler) -> Program:
    return Program(Sines(), {"input_ids": sampler.tokens(), "labels": sampler.labels()})


class TestRun:
    @pytest.fixture
    def traces(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A program whose first operator has no rule, and the graphs that Dynamo traces."""
        monkeypatch.setitem(PROGRAMS, "handwritten:sines", sines)
        monkeypatch.delitem(RULES, torch.ops.aten.sinh.default)
        traced: list[Any] = []
        original = LockstepBackend.__call__

        def counting(self: LockstepBackend, gm: Any, example_inputs: Any) -> Any:
            traced.append(gm)
            return original(self, gm, example_inputs)

        monkeypatch.setattr(LockstepBackend, "__call__", counting)
        return traced

    def test_variants_share_a_trace(self, traces: list[Any]) -> None:
        variants = [variant(size, strict) for strict in (True, False) for size in (2, 3)]
        found = results("handwritten:sines", *variants)
        assert [(r.variant, r.outcome) for r in found] == list(zip(variants, [REFUSED] * 2 + [EXACT] * 2, strict=True))
        assert len(traces) == 1

    def test_what_was_gathered_is_sharded_again(self, traces: list[Any]) -> None:
        (result,) = results("handwritten:sines", variant(strict=False))
        assert (result.outcome, result.whole, result.replicated) == (EXACT, 0, False)

    def test_tokens_that_blocks_choose_of_all_are_sharded_again(self) -> None:
        (result,) = results("handwritten:mixture_of_depths", variant(strict=False))
        assert (result.outcome, result.whole, result.replicated) == (EXACT, 0, False)

    @pytest.mark.slow
    def test_attentions_of_every_rank_are_counted(self) -> None:
        """Every rank runs the image encoder."""
        (result,) = results("vision_language:LlavaForConditionalGeneration", variant(strict=True))
        assert (result.outcome, result.whole, result.replicated) == (EXACT, 1, False)


FOUND = [
    Result("handwritten:a", variant(strict=False), EXACT, dtype="float64", gradient_error=2e-14, whole=2),
    Result("handwritten:a", variant(), REFUSED, "aten.topk.default: no"),
    Result("vision:b", variant(), NOT_AVAILABLE, "timm is not installed"),
]


class TestReport:
    def test_page(self) -> None:
        page = markdown(FOUND)
        assert page.startswith("# Beyond the model zoo\n\nWritten by `python -m cpcompile.zoo --catalogue vision")
        assert "| not strict | all | 1 | 1 | 100% | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in page
        assert "| handwritten:a | 2e-14, 2 whole | R1 |" in page
        assert f"Only 0 of {len(find_programs(['vision', 'handwritten']))} programs were run." in page
        assert '"whole": 2' in compact(FOUND)

    def test_command(self, tmp_path: Path) -> None:
        name, arguments = "MlpMixer", ["--world-size", "2", "--no-strict", "--output", str(tmp_path / "beyond")]
        done = CliRunner().invoke(app, ["--catalogue", "vision", "-m", name, *arguments])
        assert done.exit_code == 0, done.output
        (result,) = read(tmp_path / "beyond.jsonl")
        assert (result.key, result.outcome) == (f"vision:{name}", EXACT if find_spec("timm") else NOT_AVAILABLE)
        assert f"vision:{name}" in (tmp_path / "beyond.md").read_text()

    @pytest.mark.parametrize("arguments", [["--catalogue", "music"], ["--catalogue", "science", "-m", "llama"]])
    def test_unknown_names(self, arguments: list[str]) -> None:
        assert CliRunner().invoke(app, arguments).exit_code == 2
