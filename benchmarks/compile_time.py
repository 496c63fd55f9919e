"""Benchmark: seconds to compile a Llama for context parallelism, by stage and by pass, over its number of layers.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time.json
    python benchmarks/compile_time.py --plot benchmarks/results/compile_time.json

One rank of two, whose process group moves nothing, so that one process on a CPU is enough. Each model compiles in
a process of its own after a model of one layer (imports and first calls are not counted), with Inductor's caches off.
Seconds are of the CPU, of the process and the C++ compilers that it starts, so that a busy machine measures the same;
`--wall` takes the clock instead.
The stages follow each other: Dynamo traces the model; its graph is lowered to ATen; the passes run; Inductor compiles
forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import fx

from cpcompile.capture.dynamo import by_name, compile_whole, token_length
from cpcompile.capture.lowering import capture
from cpcompile.compile.inner import compile_inner, input_names
from cpcompile.compile.transform import Transformed, transform
from cpcompile.options.config import Config
from cpcompile.options.mesh import axis_of

# The module by its file: the package may offer the function under the same name.
transforming = sys.modules[transform.__module__]

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dynamic", action="store_true", help="one graph for all lengths")
    parser.add_argument("--each", action="store_true", help="compile each layer by itself (outline_layers=False)")
    parser.add_argument("--wall", action="store_true", help="seconds of the clock in place of those of the CPU")
    parser.add_argument("--repeat", type=int, default=1, help="processes for each model; the median is reported")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="only draw an earlier result")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
    elif options.measure:
        print(json.dumps(measure(options.measure, options)))
    else:
        rows = [median([measured_apart(n, options) for _ in range(options.repeat)]) for n in options.layers]
        result = {**environment(options), "rows": rows, **growth(rows)}
        print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            plot(options.out)


def measured_apart(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of one model, measured in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(layers), "--length", str(options.length)]
    # One compiler at a time: the seconds of children count once they have ended, and workers never do.
    environ = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    flags = ["--dynamic"] * options.dynamic + ["--wall"] * options.wall + ["--each"] * options.each
    done = subprocess.run(command + flags, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def measure(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compile a model of one layer, then one of `layers`, and return the seconds of the second."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    compiled(1, options)
    return compiled(layers, options)


def seconds(options: argparse.Namespace) -> float:
    """Return the seconds that this process and its children have taken so far."""
    return time.perf_counter() if options.wall else time.process_time() + sum(os.times()[2:4])


def compiled(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compile a Llama for rank 0 of 2, forward and backward, and return the seconds of each stage."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers))
    ids = torch.randint(SHAPE["vocab_size"], (1, options.length))
    inputs = {"input_ids": ids, "labels": ids}
    config = Config(dynamic=options.dynamic, strategy="ring", balancer="zig_zag", outline_layers=not options.each)
    stages = Stages(config, lambda: seconds(options))
    transforming.time = SimpleNamespace(perf_counter=stages.clock)  # type: ignore[attr-defined]  # times of passes by this clock
    gc.collect()
    gc.freeze()  # else what earlier objects cost the collector falls on whichever stage it runs in
    forward = compile_whole(model.forward, stages, config)
    token_length(inputs, config, mark_dynamic=config.dynamic)
    start = stages.clock()
    step(forward, model, inputs)
    first = stages.clock()
    step(forward, model, inputs)
    ran = stages.clock() - first
    dynamo = stages.entered - start
    known = dynamo + stages.lowering + stages.transforming
    transformed = stages.transformed
    assert transformed is not None
    return {
        "layers": layers,
        "nodes": len(transformed.original.graph.nodes),
        "dynamo": round(dynamo, 3),
        "lowering": round(stages.lowering, 3),
        "passes": round(stages.transforming, 3),
        "inductor": round(first - start - known - ran, 3),
        "by_pass": {name: round(seconds, 4) for name, seconds in transformed.seconds.items()},
    }


def step(forward: Callable[..., Any], model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    loss = forward(**by_name(model.forward, inputs)).loss
    loss.backward()


class Stages:
    """A backend that compiles as `cpcompile.apply` does and keeps the time of each stage."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.config, self.axis = config, axis_of(dist.init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), None)
        self.entered = self.lowering = self.transforming = 0.0
        self.transformed: Transformed | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.entered = self.clock()
        captured = capture(gm, example_inputs)
        lowered = self.clock()
        self.lowering = lowered - self.entered
        names = input_names(captured)
        self.transformed = transform(captured, config=self.config, axis=self.axis, inputs=names)
        self.transforming = self.clock() - lowered
        return compile_inner(self.transformed, example_inputs, self.config)


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of medians."""
    merged = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "by_pass"}
    passes = {name: statistics.median(row["by_pass"][name] for row in rows) for name in rows[0]["by_pass"]}
    return {**merged, "by_pass": passes}


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of the passes in the time of Dynamo and Inductor, and how the passes grow from each size to the next."""
    share = {row["layers"]: round(row["passes"] / (row["dynamo"] + row["inductor"]), 4) for row in rows}
    added = [
        {
            "layers": [a["layers"], b["layers"]],
            "seconds_per_layer": round((b["passes"] - a["passes"]) / (b["layers"] - a["layers"]), 4),
        }
        for a, b in itertools.pairwise(rows)
    ]
    return {"passes_over_dynamo_and_inductor": share, "growth_of_passes": added}


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": options.commit or commit.stdout.strip(),
        "ranks": 2,
        "seconds": "clock" if options.wall else "CPU",
        "repeat": options.repeat,
        "length": options.length,
        "dynamic": options.dynamic,
        "outline_layers": not options.each,
    }


def plot(path: Path) -> None:
    """Draw the stages and the passes over the number of layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    rows = result["rows"]
    layers = [row["layers"] for row in rows]
    names = [str(n) for n in layers]
    figure, (stages, passes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    below = [0.0] * len(rows)
    for stage in ("dynamo", "inductor", "lowering", "passes"):
        stages.bar(names, [row[stage] for row in rows], bottom=below, width=0.5, label=stage)
        below = [b + row[stage] for b, row in zip(below, rows, strict=True)]
    stages.set(title="seconds to compile", xlabel="layers")
    stages.legend()
    for name in rows[-1]["by_pass"]:
        seconds = [row["by_pass"][name] for row in rows]
        if max(seconds) > 0.02 * rows[-1]["passes"]:
            passes.plot(layers, seconds, marker="o", label=name)
    passes.plot(layers, [row["passes"] for row in rows], marker="o", color="black", label="all, with copies")
    passes.set(title="seconds of the passes", xlabel="layers", ylim=0)
    passes.legend(fontsize="small")
    share = list(result["passes_over_dynamo_and_inductor"].values())[-1]
    figure.suptitle(
        f"Llama, {result['device']}, torch {result['torch']}: passes {share:.1%} of Dynamo and Inductor at {layers[-1]} layers"
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
