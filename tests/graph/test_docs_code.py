"""The code in README.md and docs/ runs, and the commands in them exist.

Each block of Python is run by itself, in a group of one rank on the CPU, with the names of `names_of`. A comment in the line
above a block, `<!-- not run: reason -->`, says why one is not.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import cpcompile
from cpcompile.cli import app
from cpcompile.zoo.__main__ import app as zoo

ROOT = Path(__file__).parents[2]
# Graphs and signatures, which docs/write_reference.py writes, and pages with a test that compares what is printed.
ELSEWHERE = {"passes.md", "rules.md", "api.md", "diagnostics.md", "verification.md"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LLAMAS = {"docs/recipes/generation.md", "docs/recipes/lora.md"}  # pages whose blocks need more than a module
VOCABULARY = 64
# What blocks print in full, and need not do here: steps, tokens, layers and ranks.
SMALLER = {"range(10)": "range(1)", "2048": "64", "num_hidden_layers=2": "num_hidden_layers=1", "size=1024": "size=16"}
COMPILED = {"memory", "memory_budget", "offload", "mode", "inner_options"}  # options that inner="eager" refuses


@dataclass(frozen=True, slots=True)
class Block:
    """A block of Python of a page, the line where it begins, and why it is not run, if it is not."""

    page: str
    line: int
    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """Yield the blocks of all pages."""
    for page in PAGES:
        text = page.read_text()
        for found in () if page.name in ELSEWHERE else BLOCK.finditer(text):
            line = text.count("\n", 0, found.start(2))
            yield Block(str(page.relative_to(ROOT)), line + 1, found[2], found[1] or "")


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if not block.reason]
NOT_RUN = [block for block in BLOCKS if block.reason]


class Output(NamedTuple):
    """What a language model returns."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class Layer(nn.Module):
    """Causal attention of two heads, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(16, 48), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return x + self.mlp(x)


class SmallModel(nn.Module):
    """A causal language model with the names of one of transformers: what most blocks need, and traced in a moment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.model.layers = nn.ModuleList([Layer()])
        self.lm_head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(x)
        if labels is None:
            return Output(None, logits)
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


def small_llama() -> nn.Module:
    """Return a model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes))


class Stage(nn.Module):
    """A stage of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden)


def names_of(page: str) -> dict[str, Any]:
    """Return the names that the blocks of a page may use without an import."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = small_llama() if page in LLAMAS else SmallModel()
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    init_device_mesh = dist.device_mesh.init_device_mesh
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "cpcompile": cpcompile,
        "init_device_mesh": init_device_mesh,
        "fully_shard": fully_shard,
        "MixedPrecisionPolicy": MixedPrecisionPolicy,
        "mesh": init_device_mesh("cpu", (1,), mesh_dim_names=("cp",)),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "ids": ids,
        "labels": ids,
        "inputs": {"input_ids": ids, "labels": ids},
        "dataset": list(ids[:, None].unbind(0)) * 2,
    }
    if page == "docs/composition.md":
        from torch.distributed.pipelining import PipelineStage

        hidden = torch.zeros(2, 24, 16)
        names |= {"PipelineStage": PipelineStage, "stage_module": Stage(), "index": 0, "device": torch.device("cpu")}
        names |= {"batch_of_my_dp_group": names["inputs"], "hidden": hidden}
    if page == "docs/recipes/data.md":
        names["dataset"] = [ids[0], ids[1]]
    return names


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make meshes of one rank on the CPU, whatever a block says, and compile nothing where it leaves the compiler open."""
    make, apply = dist.device_mesh.init_device_mesh, cpcompile.apply

    def small_mesh(device: str, shape: tuple[int, ...], **options: Any) -> DeviceMesh:
        return make("cpu", (1,) * len(shape), **options)

    def uncompiled(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
        inner = "aot_eager" if options.keys() & COMPILED else "eager"
        if options.keys() & {"mode", "inner_options"}:
            inner = "inductor"
        return apply(model, mesh, **{"inner": inner} | options)

    monkeypatch.setattr(dist.device_mesh, "init_device_mesh", small_mesh)
    monkeypatch.setattr(cpcompile, "apply", uncompiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch._dynamo.reset()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings(
    "ignore"
)  # generate says that it is not sharded, and PEFT uses what transformers deprecates
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_runs(block: Block, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    # Dynamo looks for a module when it reads what the functions of a model use.
    module = ModuleType(f"block_{zlib.crc32(str(block).encode())}")
    sys.modules[module.__name__] = module
    vars(module).update(names_of(block.page))
    code = block.code
    for text, other in SMALLER.items():
        code = code.replace(text, other)
    exec(compile(code, str(block), "exec"), vars(module))


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_block_that_is_not_run_is_python(block: Block) -> None:
    compile(block.code, str(block), "exec")


def test_few_blocks_are_not_run() -> None:
    assert len(NOT_RUN) == 8, "name the reason, and change this number only if the block cannot run on one CPU"
    assert len(RUN) > 40


def script_of_the_readme() -> str:
    """Return the training script in the README."""
    (code,) = [block.code for block in BLOCKS if block.page == "README.md" and block.code.startswith("import os")]
    return code


@pytest.mark.slow
def test_the_script_of_the_readme_trains_on_two_ranks_as_printed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(script_of_the_readme())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"^step \d+  loss (\S+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 1


def test_the_script_of_the_readme_is_short() -> None:
    lines = [line for line in script_of_the_readme().splitlines() if line.strip()]
    assert len(lines) <= 25


# Commands

STARTS = ("make ", "python ", "torchrun ", "cpcompile ", "pip install ", "sudo ", "sh ")
WRITTEN_BY_READER = {"train.py"}
INLINE = re.compile(r"`([^`\n]+)`")


def commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command) of all that a reader might type."""
    for page in PAGES:
        text = re.sub(r"^```(?:python|text).*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        lines += "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).splitlines()
        for line in [*lines, *INLINE.findall(text)]:
            words = without_variables(line)
            if f"{words} ".startswith(STARTS) and "..." not in words:
                yield str(page.relative_to(ROOT)), shlex.join(shlex.split(words, comments=True))


def without_variables(line: str) -> str:
    """Return a command without variables of the environment before it."""
    return re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)


COMMANDS = sorted(set(commands()))


def options_of(command: typer.core.TyperCommand) -> set[str]:
    """Return the options that a command of typer knows."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def flags(words: list[str]) -> set[str]:
    """Return the options among words, without values."""
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def fault(words: list[str]) -> str:
    """Return what a command names that does not exist, or ''."""
    match words:
        case ["sudo", *rest]:
            return fault(["sh", *rest])
        case ["make", *rest]:
            text = (ROOT / "Makefile").read_text()
            variables = [word.partition("=")[0] for word in rest if "=" in word]
            targets = [word for word in rest if "=" not in word]
            return " ".join(
                [x for x in variables if not re.search(rf"^{x} \?=", text, re.MULTILINE)]
                + [x for x in targets if not re.search(rf"^{x}:", text, re.MULTILINE)]
            )
        case ["pip", "install", *rest]:
            extras = re.findall(r"(?:cpcompile|\.)\[([a-z,]+)\]", " ".join(rest))
            listed = (ROOT / "pyproject.toml").read_text()
            return " ".join(x for names in extras for x in names.split(",") if f"\n{x} = [" not in listed)
        case ["torchrun", *rest]:
            start = next((i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py")), len(rest))
            return fault(["python", *rest[start:]])
        case ["cpcompile", *rest] | ["python", "-m", "cpcompile", *rest]:
            if not rest or rest[0].isupper():
                return ""
            group = typer.main.get_command(app)
            if rest[0] not in group.list_commands(group.context_class(group)):
                return rest[0]
            _, command, _ = group.resolve_command(group.context_class(group), rest[:1])
            inner = getattr(command, "commands", {})  # plot has commands of its own
            if inner and rest[1:2] and rest[1] not in inner:
                return rest[1]
            command = inner.get(rest[1], command) if inner and rest[1:2] else command
            return " ".join(flags(rest) - options_of(command) - {"--help"})
        case ["python", "-m", "cpcompile.zoo", *rest]:
            return " ".join(flags(rest) - options_of(typer.main.get_command(zoo)) - {"--help"})
        case ["python", "-m", module, *_]:
            return "" if (ROOT / f"{module.replace('.', '/')}.py").is_file() else module
        case ["python" | "sh", file, *rest] if file not in WRITTEN_BY_READER:
            if not (ROOT / file).is_file():
                return file
            text = "".join(x.read_text() for x in (ROOT / file).parent.glob("*.py"))
            return " ".join(x for x in flags(rest) if f'"{x}"' not in text)
    return ""


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_exists(page: str, command: str) -> None:
    assert fault(shlex.split(command)) == ""


def test_many_commands_are_checked() -> None:
    found = {command for _, command in COMMANDS}
    assert len(found) > 40
    assert any(command.startswith("make demo") for command in found)
    assert any(command.startswith("make test") for command in found)


def test_what_does_not_exist_is_a_fault() -> None:
    wrong = ["make nothing", "make test TOAST=1", "cpcompile fly", "cpcompile verify x --wings 2", "python no.py"]
    wrong += [
        "pip install '.[nothing]'",
        "python -m cpcompile.zoo --wings",
        "python examples/fsdp2.py --wings",
        "torchrun -m no",
    ]
    assert [command for command in wrong if not fault(shlex.split(command))] == []
