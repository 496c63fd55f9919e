"""The zoo: entries build, results are classified, a wrong transform is called wrong, and no model takes the others along."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("transformers")

from cpcompile.errors import GraphBreakError, InputError, NoRule
from cpcompile.rules import RULES
from cpcompile.zoo.__main__ import app, finish
from cpcompile.zoo.build import NotAvailable, build
from cpcompile.zoo.catalogue import CATEGORIES, ENTRIES, find_entries
from cpcompile.zoo.classify import classify, normalise, own_failure
from cpcompile.zoo.evidence import Unsound, gather_evidence, reach
from cpcompile.zoo.pool import run_jobs
from cpcompile.zoo.report import compact, markdown
from cpcompile.zoo.result import (
    CRASH,
    EXACT,
    NOT_AVAILABLE,
    NOT_CAPTURED,
    REFUSED,
    WRONG,
    Result,
    Variant,
    append,
    read,
)
from cpcompile.zoo.run import Job, Subject, run_job, run_variant
from cpcompile.zoo.sizes import tiny_settings
from cpcompile.zoo.summary import Counts, reasons, tabulate

aten = torch.ops.aten
STRICT = Variant("sdpa", packed=False, world_size=2, strict=True)
PACKED = Variant("sdpa", packed=True, world_size=2, strict=True)


def outcomes(key: str, *variants: Variant) -> list[Result]:
    found: list[Result] = []
    run_job(Job(key, variants), found.append)
    return found


class TestCatalogue:
    def test_it_has_every_entry(self) -> None:
        assert len(ENTRIES) == 220
        assert {name: len(entries) for name, entries in CATEGORIES.items()} == {
            "causal": 137,
            "vlm": 12,
            "mlm": 31,
            "textenc": 3,
            "s2s": 20,
            "vision": 13,
            "audio": 4,
        }

    def test_entries_are_found_by_key_name_and_category(self) -> None:
        assert [e.key for e in find_entries(["llama"])] == ["causal:llama"]
        assert [e.key for e in find_entries(["vlm:gemma3", "t5"])] == ["vlm:gemma3", "s2s:t5"]
        assert len(find_entries(["audio"])) == 4
        with pytest.raises(KeyError, match="nothing: no such entry"):
            find_entries(["nothing"])

    def test_layers_of_every_kind(self) -> None:
        from transformers import Qwen3NextConfig

        settings = tiny_settings(Qwen3NextConfig, {"hidden_size": None, "num_experts": 8})
        assert settings["layer_types"] == ["linear_attention", "full_attention"]
        assert settings["num_hidden_layers"] == 2
        assert settings["num_experts"] == 8
        assert "hidden_size" not in settings


class TestBuild:
    @pytest.mark.parametrize(
        "key", ["causal:llama", "mlm:bert", "s2s:t5", "vision:vit", "vlm:qwen2_vl", "audio:wav2vec2"]
    )
    def test_every_category_builds(self, key: str) -> None:
        model, inputs = build(key)
        assert model.training
        assert all(p.dtype == torch.float64 for p in model.parameters())
        assert gather_evidence(model, inputs).dtype == torch.float64

    def test_no_dropout_is_left(self) -> None:
        model, _ = build("mlm:bert")
        assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
        assert model.config.attention_probs_dropout_prob == 0

    def test_no_parameter_is_constant(self) -> None:
        model, _ = build("causal:qwen3")
        assert all(p.std() > 0.05 for p in model.parameters())

    def test_what_transformers_does_not_offer(self) -> None:
        with pytest.raises(NotAvailable, match="does not offer sdpa"):
            build("causal:gpt_oss", "sdpa")
        with pytest.raises(NotAvailable, match="takes no positions"):
            build("causal:mamba", "eager", packed=True)

    def test_documents_are_packed(self) -> None:
        _, inputs = build("causal:llama", packed=True)
        assert inputs["position_ids"][0].diff().ne(1).sum() == 2
        assert inputs["position_ids"][:, 0].tolist() == [0, 0]

    @pytest.mark.slow
    @pytest.mark.parametrize("key", ENTRIES)
    def test_the_loss_depends_on_tokens_of_other_ranks(self, key: str) -> None:
        model, inputs = self.build_any(key)
        evidence = gather_evidence(model, inputs)
        assert len(evidence.gradients) > 0.3 * len(
            list(model.parameters())
        )  # of text models with an unused image encoder
        if {"input_ids", "labels"} <= inputs.keys():
            assert reach(model.train(evidence.training), inputs, evidence.dtype) > 1e-4

    def build_any(self, key: str) -> tuple[nn.Module, dict[str, Any]]:
        for attention in ("sdpa", "eager"):
            try:
                return build(key, attention)
            except NotAvailable as error:
                missing = str(error)
        pytest.skip(missing)


class Flip(nn.Module):
    """Reverses the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        weights = torch.arange(x.shape[1], device=x.device)[:, None]
        return (self.head(x.flip(1)) * weights).sum()


def refusing(*args: Any) -> Any:
    raise InputError("it names float32")


class TestClassification:
    def test_exact(self) -> None:
        (result,) = outcomes("causal:llama", STRICT)
        assert (result.outcome, result.dtype, result.num_gradients, result.sites) == (EXACT, "float64", 21, 2)
        assert result.loss_error is not None and result.loss_error < 1e-10
        assert result.gradient_error is not None and 0 < result.gradient_error < 1e-10
        assert not result.replicated

    def test_a_wrong_rule_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = {"input_ids": torch.arange(14).view(2, 7) % 8}
        model = Flip()
        subject = Subject(model, inputs, gather_evidence(model, inputs))
        assert run_variant("flip", STRICT, subject).outcome == EXACT
        monkeypatch.setitem(RULES, aten.flip.default, RULES[aten.relu.default])
        result = run_variant("flip", STRICT, subject)
        assert (result.outcome, result.reason) == (WRONG, "first difference at flip")

    def test_no_rule_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(RULES, aten.silu.default)
        (result,) = outcomes("causal:llama", STRICT)
        assert result.outcome == REFUSED
        assert result.reason.startswith("aten.silu.default: there is no rule")
        assert "in model.layers.0.mlp.act_fn" in result.detail

    def test_an_error_of_our_own_is_a_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise IndexError("list index 7 out of range")

        monkeypatch.setattr("cpcompile.inspect.model_runs.transform", broken)
        (result,) = outcomes("causal:llama", STRICT)
        assert (result.outcome, result.reason[:38]) == (CRASH, "IndexError: list index N out of range ")

    def test_a_graph_break_is_not_captured_for_any_number_of_ranks(self) -> None:
        error = GraphBreakError("The model does not trace as one graph: call of print.\n\n  print()  model.py:3")
        assert classify(error)[:2] == (NOT_CAPTURED, "graph break: call of print")

    def test_a_model_that_fails_alone_is_not_captured(self) -> None:
        assert own_failure(RuntimeError("shape '[2, 3]'"))[:2] == (
            NOT_CAPTURED,
            "one device: RuntimeError: shape '[..]'",
        )
        assert classify(Unsound("two runs of the model differ"))[0] == NOT_CAPTURED

    def test_what_dynamo_cannot_trace_is_not_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("in the middle of tracing")

        monkeypatch.setattr("torch._dynamo.symbolic_convert.InstructionTranslator.run", refuse)
        (result,) = outcomes("causal:llama", STRICT)
        assert (result.outcome, result.reason) == (NOT_CAPTURED, "Dynamo: AssertionError: in the middle of tracing")

    def test_what_is_missing_is_not_available(self) -> None:
        first, second = outcomes("causal:mamba", STRICT, PACKED)
        assert (first.outcome, first.reason) == (NOT_AVAILABLE, "does not offer sdpa")
        assert second.outcome == NOT_AVAILABLE

    def test_random_losses_prove_nothing(self) -> None:
        class Noisy(Flip):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return super().forward(input_ids) * torch.rand(())

        with pytest.raises(Unsound, match="two runs"):
            gather_evidence(Noisy(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})

    def test_a_branch_on_random_numbers_is_left_out_by_evaluation(self) -> None:
        class Layerdrop(Flip):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                if self.training and torch.rand([]) < 0:
                    input_ids = input_ids + 1
                return super().forward(input_ids)

        model, inputs = Layerdrop(), {"input_ids": torch.arange(14).view(2, 7) % 8}
        evidence = gather_evidence(model, inputs)
        assert evidence.training
        assert evidence.is_random
        result = run_variant("layerdrop", STRICT, Subject(model, inputs, evidence))
        assert (result.outcome, result.evaluation) == (EXACT, True)

    def test_a_model_that_names_float32_when_traced_is_compared_in_it(self) -> None:
        class Normed(Flip):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                weight = self.head.weight
                return super().forward(input_ids) / torch.linalg.vector_norm(weight, dtype=torch.float32)

        model, inputs = Normed(), {"input_ids": torch.arange(14).view(2, 7) % 8}
        result = run_variant("normed", STRICT, Subject(model, inputs, gather_evidence(model, inputs)))
        assert (result.outcome, result.dtype) == (EXACT, "float32")

    def test_a_model_that_fails_alone_in_float32_is_not_captured(self) -> None:
        class OnlyDouble(Flip):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                if self.head.weight.dtype != torch.float64:
                    raise ValueError("in double only")
                return super().forward(input_ids) / torch.linalg.vector_norm(self.head.weight, dtype=torch.float32)

        model, inputs = OnlyDouble(), {"input_ids": torch.arange(14).view(2, 7) % 8}
        evidence = dataclasses.replace(gather_evidence(Flip(), inputs), dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Subject, "verify", refusing)
            result = run_variant("only double", STRICT, Subject(model, inputs, evidence))
        assert (result.outcome, result.reason) == (NOT_CAPTURED, "one device: ValueError: in double only")

    def test_reasons_of_one_cause_are_equal(self) -> None:
        first = NoRule(
            "aten.view.default cannot keep its operands sharded: [1, 32, 16] -> [2, 16, 16] moves tokens.\n\n  x_3"
        )
        second = NoRule("aten.view.default cannot keep its operands sharded: [s0, 8] -> [2, 16] moves tokens.\n\n  x_4")
        assert (
            classify(first)[1]
            == classify(second)[1]
            == ("aten.view.default cannot keep its operands sharded: [..] -> [..] moves tokens.")
        )
        assert normalise("cannot tell (inputs of this graph: x [1, 2]). Name it.") == "cannot tell."
        assert normalise("model.layers.12.mlp.experts is declared") == "model.layers.N.mlp.experts is declared"
        assert normalise("aten.conv1d.default of mul_12 with 4 taps") == "aten.conv1d.default of mul with N taps"


def exit_at_once(job: Job, report: Callable[[Result], None]) -> None:
    report(Result(job.key, job.variants[0], EXACT))
    os._exit(3)


def hang(job: Job, report: Callable[[Result], None]) -> None:
    report(Result(job.key, job.variants[0], EXACT))
    time.sleep(600)


class TestPool:
    def run(self, function: Callable[[Job, Callable[[Result], None]], None], timeout: float) -> list[Result]:
        found: list[Result] = []
        jobs = [Job("a", (STRICT, PACKED)), Job("b", (STRICT,))]
        run_jobs(
            jobs, lambda job, results: found.extend(results), num_workers=2, timeout=timeout, memory=8, run=function
        )
        return sorted(found, key=lambda r: (r.key, r.variant.packed))

    def test_a_process_that_ends_costs_its_own_results_only(self) -> None:
        first, second, third = self.run(exit_at_once, 120)
        assert (first.outcome, third.outcome) == (EXACT, EXACT)
        assert (second.outcome, second.reason) == (CRASH, "the process ended with exit code 3")

    def test_a_process_that_hangs_is_ended(self) -> None:
        first, second, third = self.run(hang, 15)
        assert (first.outcome, third.outcome) == (EXACT, EXACT)
        assert (second.outcome, second.reason) == (CRASH, "no result within 15 s")


REFUSAL = Result("causal:t", STRICT, REFUSED, "aten.topk.default: no", "x.topk(2)", dtype="float64")
FOUND = [
    Result("causal:a", STRICT, EXACT, dtype="float64", loss_error=1e-15, gradient_error=2e-14, num_gradients=3),
    Result("causal:b", STRICT, EXACT, dtype="float32", gradient_error=3e-7, replicated=True),
    REFUSAL,
    Result("mlm:u", STRICT, REFUSED, "aten.topk.default: no", "", dtype="float64"),
    Result("mlm:v", STRICT, NOT_AVAILABLE, "does not offer sdpa"),
]


class TestReport:
    def test_results_come_back_from_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "zoo.jsonl"
        append(path, FOUND)
        with path.open("a") as file:
            file.write('{"key": "causal:cut')
        assert read(path) == FOUND

    def test_counts(self) -> None:
        counts = Counts.of(tabulate(FOUND)[STRICT.text].values())
        assert (counts.captured, counts[EXACT], counts.replicated, counts[REFUSED], counts.rate) == (4, 2, 1, 2, "50%")

    def test_the_worst_number_of_ranks_counts(self) -> None:
        four = Variant("sdpa", packed=False, world_size=4, strict=True)
        table = tabulate([*FOUND, Result("causal:a", four, WRONG, "first difference at mul")])
        assert table[STRICT.text]["causal:a"].outcome == WRONG

    def test_reasons_by_frequency(self) -> None:
        assert {reason: list(keys) for reason, keys in reasons(tabulate(FOUND), REFUSED).items()} == {
            "aten.topk.default: no": ["causal:t", "mlm:u"]
        }

    def test_page(self) -> None:
        page = markdown(FOUND)
        assert "| sdpa, dense, strict | all | 4 | 2 | 50% | 1 | 0 | 2 | 0 | 0 | 0 | 1 |" in page
        assert "- **R1** (2) `aten.topk.default: no`\n  t, u" in page
        assert "| causal:a | 2e-14 |" in page
        assert "| causal:b | 3e-07 (float32), replicated |" in page
        assert "| mlm:u | R1 |" in page
        models = [dataclasses.replace(found, key=f"vision:{found.key}") for found in FOUND]
        assert markdown(models).startswith("# Model zoo") and "programs were run" not in markdown(models)

    def test_compact_results(self) -> None:
        found = json.loads(compact(FOUND))
        assert found["ranks"] == [2]
        assert found["entries"]["causal:a"][STRICT.text] == {
            "outcome": "exact",
            "dtype": "float64",
            "error": 2e-14,
            "gradients": 3,
            "sites": 0,
        }
        assert found["entries"]["mlm:u"][STRICT.text] == {"outcome": "refused", "reason": "aten.topk.default: no"}

    @pytest.mark.parametrize("outcome", [WRONG, CRASH])
    def test_the_exit_code_tells_of_failures(self, tmp_path: Path, outcome: str) -> None:
        path = tmp_path / "zoo.jsonl"
        append(path, FOUND)
        finish(path, Console(quiet=True))
        append(path, [Result("causal:c", STRICT, outcome, "why")])
        with pytest.raises(typer.Exit) as stop:
            finish(path, Console(quiet=True))
        assert stop.value.exit_code == 1


class TestCommand:
    def test_a_run_and_a_resumed_run(self, tmp_path: Path) -> None:
        arguments = [
            "--attention",
            "sdpa",
            "--world-size",
            "2",
            "--dense",
            "--strict",
            "--output",
            str(tmp_path / "zoo"),
        ]
        first = CliRunner().invoke(app, ["-m", "mamba", "-m", "xlnet", *arguments])
        assert first.exit_code == 0, first.output
        assert [(r.key, r.outcome) for r in read(tmp_path / "zoo.jsonl")] == [
            ("causal:mamba", NOT_AVAILABLE),
            ("causal:xlnet", NOT_AVAILABLE),
        ]
        again = CliRunner().invoke(app, ["-m", "mamba", "-m", "xlm", *arguments, "--resume"])
        assert "causal:mamba sdpa" not in again.output
        assert [r.key for r in read(tmp_path / "zoo.jsonl")] == ["causal:mamba", "causal:xlnet", "causal:xlm"]
        assert (tmp_path / "zoo.md").read_text().startswith("# Model zoo")

    @pytest.mark.parametrize("arguments", [["-m", "nothing"], ["--attention", "flash"]])
    def test_unknown_names(self, arguments: list[str]) -> None:
        assert CliRunner().invoke(app, arguments).exit_code == 2

    def test_an_interrupted_run_keeps_what_is_done(self, tmp_path: Path) -> None:
        arguments = ["-m", "mamba", "-m", "llama", "--attention", "sdpa", "--dense", "--output", str(tmp_path / "zoo")]
        # A shell starts what runs in the background with interrupts ignored, and its children inherit that.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        run = subprocess.Popen(
            [sys.executable, "-m", "cpcompile.zoo", *arguments], stdout=subprocess.PIPE, text=True, preexec_fn=heed
        )
        assert run.stdout is not None
        assert run.stdout.readline().startswith("causal:mamba sdpa, dense, strict: not available")
        run.send_signal(signal.SIGINT)
        assert "continue with --resume" in run.communicate(timeout=120)[0]
        assert run.returncode == 130
        assert {r.key for r in read(tmp_path / "zoo.jsonl")} == {"causal:mamba"}

    @pytest.mark.slow
    def test_decoders_of_every_attention(self) -> None:
        for attention in ("sdpa", "eager"):
            for packed in (False, True):
                variants = [Variant(attention, packed, size, strict=True) for size in (2, 4)]
                for key in ("causal:llama", "causal:qwen3", "causal:gemma3_text"):
                    assert [r.outcome for r in outcomes(key, *variants)] == [EXACT, EXACT], (key, attention, packed)
