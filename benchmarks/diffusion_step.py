"""Benchmark: a training step of a few blocks of a diffusion transformer, beside diffusers' own context parallelism.

    python benchmarks/diffusion_step.py --ranks 2 --out benchmarks/results/diffusion_step.json
    python benchmarks/diffusion_step.py --device cpu --cases wan_tiny flux_tiny --steps 1 --out /tmp/diffusion_step.json

Wan 14B on 81 frames of 720p (75600 tokens), Flux on an image of 2048 by 2048 (16384 tokens and 512 of text). A step is the
forward, the mean-square loss and the backward, and with `--inference` the forward alone; its time is that of the slowest rank,
the median over steps. `limit` is the compiled model on one device, divided by the ranks.

Errors are relative to the whole model in float32, on the small inputs of the case: root mean square of the difference over that
of the reference, of the output and of all gradients together. diffusers leaves each rank the gradients of its own tokens; they
are summed here as a trainer would.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from fsdp_step import free_port
from torch import Tensor, nn
from train_step import synchronize

import cpcompile

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its inputs: of the size that is timed, and of a small one."""

    model: str
    config: dict[str, Any]
    timed: tuple[int, ...]
    small: tuple[int, ...]
    inputs: Callable[[dict[str, Any], tuple[int, ...]], Inputs]
    token_dims: dict[str, int] = field(default_factory=dict)


def wan(config: dict[str, Any], size: tuple[int, ...]) -> Inputs:
    """Return latents of a video [B, C, F, H, W], a time and a text."""
    latents = torch.randn(1, config["in_channels"], *size)
    text = torch.randn(1, 512 if config["text_dim"] > 64 else 7, config["text_dim"])
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": text,
        "target": torch.randn_like(latents),
    }


def flux(config: dict[str, Any], size: tuple[int, ...]) -> Inputs:
    """Return the patches of an image [B, H*W, C], their places, a time and a text."""
    rows, columns = size
    image = torch.randn(1, rows * columns, config["in_channels"])
    words = 512 if config["joint_attention_dim"] > 64 else 8
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return {
        "hidden_states": image,
        "encoder_hidden_states": torch.randn(1, words, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.3]),
        "img_ids": places,
        "txt_ids": torch.zeros(words, 3),
        "target": torch.randn_like(image),
    }


WAN = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 2,
}
FLUX = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4}
CASES = {
    "wan_14b": Case("WanTransformer3DModel", WAN, (21, 90, 160), (5, 32, 32), wan),
    "flux": Case("FluxTransformer2DModel", FLUX, (128, 128), (32, 32), flux, {"hidden_states": 1}),
    "wan_tiny": Case(
        "WanTransformer3DModel",
        {**TINY, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32, "num_layers": 2},
        (3, 8, 8),
        (3, 8, 8),
        wan,
    ),
    "flux_tiny": Case(
        "FluxTransformer2DModel",
        {**TINY, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 8}
        | {"axes_dims_rope": (4, 4, 4)},
        (8, 8),
        (8, 8),
        flux,
        {"hidden_states": 1},
    ),
}
SYSTEMS = (
    "limit",
    "cpcompile/ring",
    "cpcompile/ulysses",
    "cpcompile/gather",
    "diffusers/ring",
    "diffusers/ulysses",
    "diffusers/ring, compiled",
    "diffusers/ulysses, compiled",
)
WARM_UP = 2  # steps


class Denoiser(nn.Module):
    """The loss of a denoiser."""

    def __init__(self, model: nn.Module) -> None:
        """Keep the model."""
        super().__init__()
        self.model = model

    def forward(self, target: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the mean-square loss and the output."""
        output = self.model(**inputs, return_dict=False)[0]
        return F.mse_loss(output.float(), target.float()), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["wan_14b", "flux"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--inference", action="store_true", help="also the forward alone")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no other system is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**environment(options), "rows": []}, indent=1) + "\n")
    deadline = time.time() + options.budget
    for system in options.systems:
        if time.time() > deadline:
            print(f"left out for lack of time: {system}", flush=True)
            continue
        for name in options.cases:
            try:
                torch.multiprocessing.start_processes(
                    run, args=(options, system, name, free_port()), nprocs=options.ranks, start_method="spawn"
                )
            except torch.multiprocessing.ProcessExitedException as error:
                print(f"{name}, {system}: {error}", flush=True)


def run(rank: int, options: argparse.Namespace, system: str, name: str, port: int) -> None:
    """Measure one system in processes of its own, and add its row to the file."""
    is_cuda = options.device == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks
    )
    mesh = dist.init_device_mesh(options.device, (options.ranks,), mesh_dim_names=("cp",))
    try:
        row = measure(options, mesh, system, CASES[name])
    except Exception as error:
        if rank == 0:
            traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {error}"[:500]}
    if rank == 0:
        row = {"case": name, "system": system, "ranks": options.ranks, **row}
        print(json.dumps(row), flush=True)
        known = json.loads(options.out.read_text())
        known["rows"].append(row)
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    os._exit(0)  # threads of a system that failed may not end


def measure(options: argparse.Namespace, mesh: Any, system: str, case: Case) -> dict[str, Any]:
    """Return the errors of a system on small inputs, and its times."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(options.device):
        whole = getattr(diffusers, case.model)(**case.config)
        for parameter in whole.parameters():  # some begin as zeros, and would leave gradients of zero
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.normal_(parameter, 0.5, 0.1)
        small, timed = (case.inputs(case.config, size) for size in (case.small, case.timed))
    expected = results(Denoiser(deepcopy(whole)), small)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = whole.to(dtype)
    small, timed = (cast(inputs, dtype) for inputs in (small, timed))
    step = prepare(deepcopy(model), mesh, system, case)
    found = results(step, small, is_part=system.startswith("diffusers"))
    row: dict[str, Any] = {
        "error_output": error(found[0], expected[0]),
        "error_gradients": error(found[1], expected[1]),
    }
    step.zero_grad(set_to_none=True)
    del found, expected
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def train() -> None:
        step(**timed)[0].backward()

    def infer() -> None:
        with torch.no_grad():
            step(**timed)

    divisor = mesh.size() if system == "limit" else 1
    for name, one in {"ms": train, **({"inference_ms": infer} if options.inference else {})}.items():
        seconds = timed_steps(options, one)
        row[name] = round(statistics.median(seconds[WARM_UP:]) * 1e3 / divisor, 2)
        row.setdefault("first_step_s", round(seconds[0], 1))
    if options.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def timed_steps(options: argparse.Namespace, one: Callable[[], None]) -> list[float]:
    """Return the seconds of each step, of the slowest rank."""
    seconds = []
    for _ in range(options.steps + WARM_UP):
        dist.barrier()
        synchronize(options.device)
        start = time.perf_counter()
        one()
        synchronize(options.device)
        took = torch.tensor(time.perf_counter() - start, device=options.device, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(took.item())
    return seconds


def prepare(model: nn.Module, mesh: Any, system: str, case: Case) -> nn.Module:
    """Return the loss of a model, context parallel in the way of a system."""
    made = Denoiser(model)
    inner = "inductor" if model.device.type == "cuda" else "aot_eager"
    if system == "limit":
        made.forward = torch.compile(made.forward, backend=inner)  # type: ignore[method-assign]
        return made
    kind, _, strategy = system.partition("/")
    if kind == "cpcompile":
        cpcompile.apply(
            made, mesh, strategy=strategy, outputs="full", token_dims=case.token_dims, dynamic=False, inner=inner
        )
        return made
    from diffusers import ContextParallelConfig

    strategy, _, compiled = strategy.partition(", ")
    if model.device.type == "cuda":
        model.set_attention_backend("_native_cudnn")
    model.enable_parallelism(config=ContextParallelConfig(**{f"{strategy}_degree": mesh.size()}))
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    return made


def results(model: nn.Module, inputs: Inputs, is_part: bool = False) -> tuple[Tensor, Tensor]:
    """Return the output and all gradients in one vector, summed over the ranks where each has those of its part."""
    loss, output = model(**inputs)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten().double() for g in gradients])
    if is_part:
        dist.all_reduce(flat)
    return output.detach().double(), flat


def error(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return inputs with numbers of a type, but for places, times and targets."""
    kept = {"img_ids", "txt_ids", "timestep", "target"}
    return {n: x if n in kept or not x.is_floating_point() else x.to(dtype) for n, x in inputs.items()}


def environment(options: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "commit": options.commit or commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
