"""Benchmark: the time of a training step as `explain` estimates it, beside what was measured.

    python benchmarks/step_estimate.py --out benchmarks/results/step_estimate.json

Needs no GPU: it reads what `train_step.py` and `fsdp_step.py` wrote in `benchmarks/results` and plans the same steps for the same
GPUs, on the meta device. Of rows that were measured again the last counts. Steps of documents are left out: nobody knows where
they begin before a batch is read, and `explain` takes them for one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsdp_step
import torch
import train_step

from cpcompile.choose.machine import machine_named
from cpcompile.inspect.explanation import Explanation

RESULTS = Path(__file__).parent / "results"
NAMES = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100"}
OF_TRAINING = ("train_step.json", "train_step_2.json", "outlined_layers.json")
OF_FSDP = ("fsdp_step_1.json", "fsdp_step_2.json", "fsdp_step_4.json")
# What the names of rows say beside systems of `fsdp_step.py`: today's defaults, measured when they were not yet.
DEFAULTS = ("elementwise results again", "layers outlined", "joined transfers")
KERNEL = {"kernel": "cudnn"}  # of rows that name none
LEFT_OUT = "forward twice"  # a fault of that time
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step that was measured: what tells it from others, its row, and how it is planned."""

    key: tuple[Any, ...]
    row: Row
    plan: Callable[[], Explanation]
    has_optimizer: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="of results whose file has this in its name; rows of others stay in --out"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    steps = {step.key: step for step in (*training_steps(options.only), *fsdp_steps(options.only))}
    before = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    rows = [row for row in before if options.only not in row["file"]]
    for step in steps.values():
        torch._dynamo.reset()
        rows.append(compared(step))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, options.out)


def write(rows: list[Row], out: Path | None) -> None:
    """Write the rows, and how far off they are."""
    off = sorted(abs(row["over_measured"] - 1) for row in rows)
    within = sum(each <= 0.1 for each in off)
    known = {
        "torch": torch.__version__,
        "steps": len(rows),
        "within_10_percent": within,
        "median_error": round(statistics.median(off), 4),
    }
    if out:
        out.write_text(json.dumps({**known, "rows": rows}, indent=1) + "\n")


def training_steps(only: str) -> Iterator[Step]:
    """Yield the steps of `train_step.py`, which have no optimizer."""
    for name, result in results(OF_TRAINING, only):
        for row in result["rows"]:
            if row["strategy"] == "limit" or row.get("documents"):
                continue
            given = {
                key: row[key] for key in ("kernel", "memory_budget", "offload", "recompute_elementwise") if key in row
            }
            options = argparse.Namespace(
                shape=result["shape"],
                layers=row.get("layers"),
                length=row["length"],
                ranks=row["ranks"],
                checkpoints=row.get("checkpoints", False),
                inner="inductor",
                options=given,
            )
            plan = partial(train_step.plan_of, options, row["strategy"], machine_of(result, row))
            known = row["strategy"], row["ranks"], row["length"], options.layers, options.checkpoints
            yield Step((name, *known, *(KERNEL | given).items()), row | {"file": name}, plan, has_optimizer=False)


def fsdp_steps(only: str) -> Iterator[Step]:
    """Yield the steps of cpcompile in `fsdp_step.py`."""
    for name, result in results(OF_FSDP, only):
        for row in result["rows"]:
            if not row["system"].startswith("cpcompile") or LEFT_OUT in row["system"]:
                continue
            kernel = {"kernel": row["kernel"]} if "kernel" in row else {}
            given = {**options_of(row["system"]), **row.get("options", {}), **kernel}
            options = argparse.Namespace(
                shape=result["shape"], layers=result["layers"], lengths=[row["length"]], ranks=row["ranks"]
            )
            plan = partial(fsdp_step.plan_of, options, given, row["length"], machine_of(result, row))
            yield Step(
                (name, row["ranks"], row["length"], *(KERNEL | given).items()),
                row | {"file": name},
                plan,
                has_optimizer=True,
            )


def options_of(system: str) -> dict[str, Any]:
    """Return the options of what the name of a system says, `cpcompile, loss whole, no prefetch`."""
    found: dict[str, Any] = {}
    for part in system.split(", ")[1:]:
        found |= {} if part in DEFAULTS else fsdp_step.SYSTEMS[f"cpcompile, {part}"]
    return found


def results(names: tuple[str, ...], only: str) -> Iterator[tuple[str, Any]]:
    """Yield the results of these files."""
    for name in names:
        if only in name:
            yield name, json.loads((RESULTS / name).read_text())


def machine_of(result: Any, row: Row) -> Any:
    """Return the GPUs that a row was measured on."""
    return machine_named(NAMES[result["device"]], gpus=row["ranks"])


def compared(step: Step) -> Row:
    """Return a step as it is estimated beside what was measured; without an optimizer where that had none."""
    plan, row = step.plan(), step.row
    assert plan.step is not None
    seconds = {kind: each for kind, each in plan.step.seconds.items() if step.has_optimizer or kind != "optimizer"}
    estimated = sum(seconds.values()) * 1e3
    names = ("file", "system", "strategy", "ranks", "length", "layers", "checkpoints", "kernel", "offload", "commit")
    return {
        **{name: row[name] for name in names if name in row},
        "taken": plan.taken,
        "measured_ms": row["ms"],
        "estimated_ms": round(estimated, 1),
        "over_measured": round(estimated / row["ms"], 3),
        "estimated_by_kind_ms": {kind: round(each * 1e3, 2) for kind, each in seconds.items()},
        "hidden_ms": round(plan.step.hidden * 1e3, 2),
        **({"measured_mfu": row["mfu"], "estimated_mfu": round(plan.step.mfu, 4)} if "mfu" in row else {}),
    }


if __name__ == "__main__":
    main()
