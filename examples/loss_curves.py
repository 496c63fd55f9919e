"""The same optimizer steps on one device and on several ranks: two loss curves in one picture.

    python examples/loss_curves.py --steps 30 --ranks 2

trains the untouched model in one process, then the context-parallel one on the ranks, from the same weights, on the same batches.
Writes docs/loss_curves.json (both curves, their largest relative difference, versions, commit) and docs/loss_curves.png.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import transformers
import typer

from cpcompile.train import TrainOptions, train

ROOT = Path(__file__).parent.parent


def run(options: TrainOptions, log: Path) -> list[dict[str, Any]]:
    """Train, and return the records of all steps."""
    train(replace(options, log=log))
    return [json.loads(line) for line in log.read_text().splitlines()]


def largest_difference(single: list[dict[str, Any]], ranks: list[dict[str, Any]], key: str) -> float:
    """Return the largest relative difference of any step."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(single, ranks, strict=True))


def commit() -> str:
    """Return the commit of this checkout; `+` says that files have changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw both curves, and their difference below."""
    single, ranks = result["one_device"], result["ranks"]
    steps = [record["step"] for record in single]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained")
    upper.plot(
        steps, [record["loss"] for record in single], linewidth=5, alpha=0.35, label="one device, untouched model"
    )
    upper.plot(
        steps, [record["loss"] for record in ranks], color="black", linewidth=1, label=f"{result['num_ranks']} ranks"
    )
    upper.set_ylabel("loss")
    upper.set_title(
        f"{result['model']}, {result['length']} tokens a sequence, {result['dtype']}, {len(steps)} AdamW steps"
    )
    upper.legend()
    differences = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(single, ranks, strict=True)]
    lower.semilogy(steps, [max(value, 1e-9) for value in differences], marker=".", color="black", linewidth=0.8)
    lower.set_ylabel("relative difference")
    lower.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main(
    steps: int = 30,
    ranks: int = 2,
    length: int = 256,
    learning_rate: float = 2e-5,
    strategy: str = "auto",
    balancer: str = "auto",
    inner: str = "auto",
    model: Path | None = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "docs",
) -> None:
    """Train twice, compare, and write the results."""
    options = TrainOptions(
        model=model,
        ranks=ranks,
        steps=steps,
        length=length,
        learning_rate=learning_rate,
        strategy=strategy,
        balancer=balancer,
        inner=inner,
    )
    with tempfile.TemporaryDirectory() as folder:
        single = run(replace(options, ranks=1, apply=False), Path(folder) / "one.jsonl")
        parallel = run(options, Path(folder) / "ranks.jsonl")
    result = {
        "model": model.name if model is not None else "SmolLM2-135M",
        "length": length,
        "dtype": options.dtype,
        "learning_rate": learning_rate,
        "num_ranks": ranks,
        "strategy": strategy,
        "balancer": balancer,
        "inner": inner,
        "largest_relative_difference_of_loss": largest_difference(single, parallel, "loss"),
        "largest_relative_difference_of_grad_norm": largest_difference(single, parallel, "grad_norm"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit(),
        "one_device": single,
        "ranks": parallel,
    }
    out.mkdir(exist_ok=True)
    (out / "loss_curves.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / "loss_curves.png")
    difference = result["largest_relative_difference_of_loss"]
    typer.echo(f"{steps} steps; losses differ by at most {difference:.1e} (relative); see {out / 'loss_curves.png'}")


if __name__ == "__main__":
    typer.run(main)
