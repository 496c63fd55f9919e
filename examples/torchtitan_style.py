"""A loop as torchtitan writes it: meta-device init, selective checkpoints, FSDP2 over data- and context-parallel ranks together.

    python examples/torchtitan_style.py                          # 2 processes on the CPU
    python examples/torchtitan_style.py --ranks 4 --data 2       # 2 data-parallel groups
    torchrun --nproc-per-node 2 examples/torchtitan_style.py

One line stands for `context_parallel(buffers=...)`, shifted labels and compiled blocks. The untouched model trains on one device;
exits with 1 if losses or weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from one_device import Trained, compare
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import cpcompile

VOCABULARY, LENGTH, ROWS = 128, 53, 2
aten = torch.ops.aten
SAVED = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def selective() -> Any:
    """Return contexts of a checkpoint that saves attention and every second product of matrices."""
    count: dict[Any, int] = defaultdict(int)

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        count[func] += 1
        is_saved = func in SAVED and not (func is aten.mm.default and count[func] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Checkpoint and shard the blocks, shard the root, and share each sequence among the ranks of `cp`."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    every_rank = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i], context_fn=selective)
        fully_shard(layers[i], mesh=every_rank, mp_policy=policy)
    fully_shard(model, mesh=every_rank, mp_policy=policy)
    cpcompile.apply(model, mesh, axis="cp", inner="aot_eager")


def train(options: argparse.Namespace) -> Trained:
    """Train for some steps."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, use_cache=False, **sizes)
    torch.manual_seed(0)
    start = LlamaForCausalLM(config)
    model, groups = start, range(options.data)
    if not options.alone:
        dist.init_process_group("gloo")
        mesh = init_device_mesh(
            "cpu", (options.data, dist.get_world_size() // options.data), mesh_dim_names=("dp_shard", "cp")
        )
        groups = range(mesh["dp_shard"].get_local_rank(), mesh["dp_shard"].get_local_rank() + 1)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        parallelize(model, mesh)
        model.to_empty(device="cpu")
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are in no checkpoint
        set_model_state_dict(model, start.state_dict(), options=StateDictOptions(full_state_dict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses: list[float] = []
    for step in range(options.steps):
        rows = torch.randint(VOCABULARY, (options.data, ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        ids = rows[groups].flatten(0, 1)  # of this group, on one device of all
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if not options.alone:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses, get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=not options.alone)
    )


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
