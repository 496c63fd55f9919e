"""Benchmark: a training step under FSDP2, beside the recipe of torchtitan (FSDP2 by block, compiled blocks, `context_parallel`).

    python benchmarks/fsdp_step.py --ranks 2 --layers 8 --lengths 32768 131072 --out benchmarks/results/fsdp_step.json

The model has the shape of Llama 3 8B with fewer layers; weights and tokens are random. Parameters and the state of AdamW are
float32 and sharded, computation is bfloat16, and all layers have activation checkpoints. A step is forward, loss, backward and
optimizer; its time is that of the slowest rank, the median over steps. MFU counts causal attention half and no recomputation.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import transformers
from memory_peak import peak_of
from step_trace import trace
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import environment, print_ledger, synchronize

import cpcompile
from cpcompile.choose.machine import Machine
from cpcompile.inspect.explanation import Explanation

SHAPES = {
    "8b": {  # Llama 3 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
}
# What a GPU can do in bfloat16 without sparsity, FLOP/s.
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}
OVERLAP = {"reorder_for_compute_comm_overlap": True}
BUCKETS = {"bucket_all_gathers_fx": "all", "bucket_reduce_scatters_fx": "all"}
SYSTEMS: dict[str, dict[str, Any]] = {
    "cpcompile": {},
    "cpcompile, no prefetch": {"prefetch": 0},
    "cpcompile, attention again": {"recompute_attention": True},
    "cpcompile, loss whole": {"loss_chunk": 0},
    "cpcompile, tiles": {"tile": 4096},
    "cpcompile, inputs in host memory": {"offload": "inputs"},
    "cpcompile, tiles, inputs in host memory": {"tile": 4096, "offload": "inputs"},
    "cpcompile, reordered": {"inner_options": OVERLAP},
    "cpcompile, bucketed": {"inner_options": OVERLAP | BUCKETS},
    "cpcompile, scheduled": {"inner_options": {"aten_distributed_optimizations.enable_overlap_scheduling": True}},
    "cpcompile, ulysses": {"strategy": "ulysses"},
    "cpcompile, heads in groups": {"strategy": "ulysses", "heads_per_message": 1},
    "cpcompile, reduce-overhead": {"mode": "reduce-overhead", "dynamic": False},
    "torchtitan recipe": {},
}

Step = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=["cpcompile", "torchtitan recipe"])
    parser.add_argument("--options", type=json.loads, default={}, help='more of cpcompile, {"tile": 16384}')
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no other system is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--profile", type=Path, help="folder for a trace of one step of each system")
    parser.add_argument("--memory", action="store_true", help="print what the first rank holds at the peak of a step")
    parser.add_argument(
        "--ledger", action="store_true", help="also what a rank holds as predicted; with --steps 0 only that"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.dynamic = True
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.unlink(missing_ok=True)
    ours = [system for system in options.systems if not system.startswith("torchtitan")] if options.ledger else []
    options.predicted = {(x, length): predicted(options, x, length) for x in ours for length in options.lengths}
    if not options.steps:
        return
    deadline = time.time() + options.budget
    for system in options.systems:
        if time.time() < deadline:  # in processes of its own: what another system leaves behind is not its memory
            torch.multiprocessing.start_processes(
                run, args=(options, system, free_port()), nprocs=options.ranks, start_method="spawn"
            )


def config_of(options: argparse.Namespace) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **SHAPES[options.shape],
        num_hidden_layers=options.layers,
        max_position_embeddings=max(options.lengths),
        attn_implementation="sdpa",
        use_cache=False,
    )


def predicted(options: argparse.Namespace, system: str, length: int) -> float:
    """Print the ledger of a step, made without a GPU, and return its GiB at the peak."""
    torch._dynamo.reset()
    return print_ledger(f"{system}, {length} tokens", plan_of(options, SYSTEMS[system] | options.options, length))


def plan_of(
    options: argparse.Namespace, of_system: dict[str, Any], length: int, device: str | Machine = ""
) -> Explanation:
    """Return the plan of a step with the options of a system, with its memory and time, made without a GPU."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config_of(options)).bfloat16()
        ids = torch.zeros(1, length, dtype=torch.int64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sharded = cpcompile.FullySharded(options.ranks, stored_dtype=torch.float32, reduce_dtype=torch.float32)
    return cpcompile.explain(
        model,
        {"input_ids": ids, "labels": ids},
        world_size=options.ranks,
        memory=True,
        device=device,
        fully_sharded=sharded,
        **of_system,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(rank: int, options: argparse.Namespace, system: str, port: int) -> None:
    is_cuda = options.device == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks
    )
    mesh = dist.init_device_mesh(options.device, (options.ranks,), mesh_dim_names=("cp",))
    rows: list[dict[str, Any]] = []
    try:
        measure(rank, options, mesh, system, rows)
    except Exception as error:
        if rank == 0:
            traceback.print_exc()
        rows.append({"system": system, "error": f"{type(error).__name__}: {error}"[:500]})
    if rank == 0 and options.out:
        before = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        known = {**environment(options), "layers": options.layers, "rows": before + rows}
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    dist.destroy_process_group()
    os._exit(0)  # NCCL's threads of a system that failed may not end


def measure(rank: int, options: argparse.Namespace, mesh: Any, system: str, rows: list[dict[str, Any]]) -> None:
    """Append a row for each length."""
    torch.manual_seed(0)
    config = config_of(options)
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).float()
        ids = {length: torch.randint(config.vocab_size, (1, length)) for length in options.lengths}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    make = torchtitan if system.startswith("torchtitan") else parallel
    step = make(model, mesh, policy, SYSTEMS[system] | options.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.device == "cuda")
    num_parameters = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    for length, tokens in ids.items():
        seconds: list[float] = []
        loss = torch.zeros(())
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def one(tokens: torch.Tensor = tokens) -> torch.Tensor:
            loss = step(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        losses = []
        for _ in range(options.steps + 2):
            dist.barrier()
            synchronize(options.device)
            start = time.perf_counter()
            loss = one()
            synchronize(options.device)
            took = torch.tensor(time.perf_counter() - start, device=options.device, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds.append(took.item())
            losses.append(float(loss))
        peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
        if options.memory:
            table = peak_of(one)
            if rank == 0:
                print(f"{system}, {length} tokens\n{table}", flush=True)
        if options.profile:
            trace(rank, options.profile, one, f"{system}_{length}".replace(" ", "_").replace(",", ""))
        median = statistics.median(seconds[2:])
        attention = 6 * length**2 * config.num_attention_heads * config.head_dim * options.layers
        flops = 6 * num_parameters * length + attention
        peak_rate = PEAK.get(torch.cuda.get_device_name() if options.device == "cuda" else "", float("nan"))
        row = {
            "system": system,
            **({"options": options.options} if options.options else {}),
            "ranks": options.ranks,
            "length": length,
            "ms": round(median * 1e3, 1),
            "tokens_per_second": round(length / median),
            "mfu": round(flops / median / options.ranks / peak_rate, 4),
            "peak_gib": round(peak, 2),
            **({"predicted_gib": options.predicted[system, length]} if (system, length) in options.predicted else {}),
            "first_step_s": round(seconds[0], 1),
            "losses": losses,
        }
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)


def parallel(model: Any, mesh: Any, policy: Any, options: dict[str, Any]) -> Step:
    """Return the loss of cpcompile: FSDP2 on blocks and root, then `apply`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    cpcompile.apply(model, mesh, check_inputs="first", **options)
    return lambda ids: model(input_ids=ids, labels=ids).loss


def torchtitan(model: Any, mesh: Any, policy: Any, options: dict[str, Any]) -> Step:
    """Return the loss of torchtitan's recipe: checkpoints and `torch.compile` by block, FSDP2, `context_parallel`.

    The rings of torch take as many key heads as query heads, so transformers is told to repeat them. The loss is compiled, and
    summed over local tokens: FSDP averages over the ranks, so it counts P-fold.
    """
    transformers.integrations.sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
    base, num_layers = model.model, len(model.model.layers)
    for i in range(num_layers):
        block = checkpoint_wrapper(base.layers[i])
        block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        base.layers[i] = block

    def forward(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        hidden = base.embed_tokens(ids)
        tables = base.rotary_emb(hidden, places)
        for block in base.layers:
            hidden = block(hidden, attention_mask=None, position_ids=places, position_embeddings=tables)
        return model.lm_head(base.norm(hidden))

    model.forward = forward
    fully_shard(model, mesh=mesh, mp_policy=policy)
    world_size = mesh.size()

    @functools.partial(torch.compile, dynamic=False)
    def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")

    class Loss(torch.autograd.Function):
        """A loss whose backward runs where the forward did, inside the context."""

        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor, count: int) -> torch.Tensor:
            ctx.scale = world_size / count
            total = loss.detach().clone()
            dist.all_reduce(total)
            return total / count

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0] * ctx.scale, None

    def step(ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        labels = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
        ids, places = ids.clone(), torch.arange(length, device=ids.device)[None].clone()
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        contexts: list[Any] = [sdpa_kernel(kernels)]
        if world_size > 1:
            buffers = [ids, labels, places]
            contexts.insert(
                0, context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers))
            )
        holder = _Held(contexts)
        loss = sum_of_losses(model(ids, places), labels)
        return holder.until_backward(Loss.apply(loss, length - 1))

    return step


class _Held:
    """Contexts that are left after the backward of a loss: torch's attention is a ring only inside."""

    def __init__(self, contexts: list[Any]) -> None:
        self.contexts = contexts
        for context in contexts:
            context.__enter__()

    def until_backward(self, loss: torch.Tensor) -> torch.Tensor:
        backward = loss.backward

        def run() -> None:
            backward()
            for context in reversed(self.contexts):
                context.__exit__(None, None, None)

        loss.backward = run  # type: ignore[method-assign]
        return loss


if __name__ == "__main__":
    main()
