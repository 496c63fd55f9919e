"""Agreement time: what comparing the ranks costs the host at each call, for a model of some hundred modules.

Two CPU ranks compare a Llama of tiny layers; no forward runs. What is left is the host: reading modules and weights, fingerprints
of the inputs, and one all-reduce.

    python benchmarks/agreement_time.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from cpcompile.front.backend import gradient_sync
from cpcompile.front.call_agreement import CallAgreement
from cpcompile.front.fingerprint import value_fingerprint
from cpcompile.front.module_state import ModuleState
from cpcompile.front.rank_agreement import agree
from cpcompile.front.statement import Statement
from cpcompile.front.weights import Watch
from cpcompile.options.config import Config
from cpcompile.options.mesh import axis_of

ROUNDS, REPEATS = 7, 50


def microseconds(call: Any) -> float:
    """Return the time of a call on this thread, the lowest median of some rounds: a machine may do other things too."""

    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return 1e6 * min(statistics.median(once() for _ in range(REPEATS)) for _ in range(ROUNDS))


def measure(rank: int, store: str) -> None:
    """Print the times of rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **sizes))
    axis = axis_of(init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), None)
    config, sync = Config(), gradient_sync(Config(), axis)
    state, watch = ModuleState(model), Watch()
    agreement = CallAgreement(config, sync, state)
    ids = torch.arange(4096).view(1, -1)
    inputs = {"input_ids": ids, "labels": ids.clone(), "num_items_in_batch": 4096, "use_cache": False}

    def whole() -> None:
        with agreement.call():
            agreement.before_compiling(inputs)

    def statement() -> None:
        Statement(inputs, axis, state, watch, holds_back=False)
        watch.compared(state.weights())

    def before() -> None:
        agree(0, {("input", name): x for name, x in inputs.items() if isinstance(x, torch.Tensor)}, axis, dict)

    whole()
    statement()
    rows = {
        "all of it": whole,
        "of this, inputs alone (fingerprints and the all-reduce)": before,
        "of this, modules, weights, settings (no message)": statement,
        "one fingerprint of 4096 ids": lambda: value_fingerprint(ids),
    }
    for name, call in rows.items():
        taken = microseconds(call)
        if rank == 0:
            print(f"{taken:8.0f} us  {name}")
    if rank == 0:
        print(
            f"{len(state.training())} modules, {len(state.weights())} parameters and buffers, torch {torch.__version__}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (os.path.join(folder, "store"),), nprocs=2)  # type: ignore[no-untyped-call]
