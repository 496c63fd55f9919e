"""Benchmark: bytes that one training step holds at its peak, without and with context parallelism, by how masks are made.

    python benchmarks/mask_memory.py --length 65536 --out benchmarks/results/mask_memory.json

Method: nothing is computed. The untouched transformers model (one layer, few features, so that masks are what is large) runs
forward and backward on fake tensors, which have sizes but no memory; so does the program of one rank, with its collectives.
After each operator the bytes of all storages that are alive are added up, those of parameters and inputs left out; the
largest sum is the peak. `largest` is the largest storage, `squares` counts storages of at least S x S elements.
What an operator holds inside itself (a kernel's workspace) is not seen. Flex attention is compiled by transformers,
which fake tensors forbid: of it, what makes the mask is measured on one device, and the forward on a rank.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.masking_utils import create_causal_mask

from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.capture.lowering import capture
from cpcompile.compile.inner import input_names
from cpcompile.compile.transform import Transformed, transform
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes.lift_masks import describe

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1 << 20,
    "use_cache": False,
}
CASES = {
    "llama sdpa, causal": ("Llama", "sdpa", "plain", {}),
    "llama sdpa, padding": ("Llama", "sdpa", "padding", {}),
    "llama sdpa, documents": ("Llama", "sdpa", "documents", {}),
    "mistral sdpa, window and documents": ("Mistral", "sdpa", "documents", {"sliding_window": 4096}),
    "llama eager, documents": ("Llama", "eager", "documents", {}),
    "gemma 2 eager, window": ("Gemma2", "eager", "plain", {"sliding_window": 4096, "num_hidden_layers": 2}),
    "llama flex, documents": ("Llama", "flex_attention", "documents", {}),
}


@dataclass(frozen=True, slots=True)
class Peak:
    """What a step holds: bytes at its peak, bytes of its largest storage, storages of S x S elements or more."""

    bytes: int
    largest: int
    squares: int


class Held(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive after each operator."""

    def __init__(self, length: int, given: Any) -> None:
        super().__init__()
        self.length, self.peak, self.largest, self.squares = length, 0, 0, 0
        self.given = {self.key(x) for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @staticmethod
    def key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.key(tensor) not in self.alive | dict.fromkeys(self.given):
                size = tensor.untyped_storage().nbytes()
                self.alive[self.key(tensor)] = StorageWeakRef(tensor.untyped_storage()), size
                self.largest = max(self.largest, size)
                self.squares += size >= self.length**2 * tensor.element_size()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def step(run: Callable[..., Any], given: Any, length: int, with_backward: bool) -> Peak:
    """Run forward and perhaps backward, and return what they held; `given` was there before."""
    with Held(length, given) as held, torch.set_grad_enabled(with_backward):
        loss = run()
        if with_backward:
            loss.backward()
    return Peak(held.peak, held.largest, held.squares)


def model_of(family: str, implementation: str, changes: dict[str, Any]) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZES | changes, attn_implementation=implementation)
    return getattr(transformers, f"{family}ForCausalLM")(config).train()  # type: ignore[no-any-return]


def batch_of(kind: str, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(1, length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "documents":
        batch["position_ids"] = (torch.arange(length) % (length // 8))[None]
    if kind == "padding":
        batch["attention_mask"] = (torch.arange(length) < length - 7)[None].long()
    return batch


class Stop(Exception):
    """Ends a compilation."""


def transformed_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], ranks: int) -> tuple[Transformed, list[Any]]:
    """Return the transformed graph of a model and the arguments that it takes; nothing is run."""
    seen: list[Any] = []
    config, axis = Config(dynamic=False), Axis.in_process(ranks)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        captured = capture(gm, inputs)
        seen.extend((transform(captured, config=config, axis=axis, inputs=input_names(captured)), list(inputs)))
        raise Stop

    torch._dynamo.reset()
    try:
        compile_whole(model.forward, backend, config)(**by_name(model.forward, batch))
    except Exception:
        if len(seen) != 2:
            raise
    return seen[0], seen[1]


def measured(name: str, length: int, ranks: int) -> dict[str, Any]:
    """Return what a step of one case holds on one device, and on one of `ranks`."""
    family, implementation, kind, changes = CASES[name]
    model, batch = model_of(family, implementation, changes), batch_of(kind, length)
    transformed, inputs = transformed_of(model, batch, ranks)
    attentions = transformed.analysed.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    with_backward = implementation != "flex_attention"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = tree_map_only(torch.Tensor, lambda x: fake(mode, x), inputs)
    with mode:
        after = step(lambda: fx.Interpreter(transformed.graph).run(*faked)[0], faked, length, with_backward)
    parameters = {n: fake(mode, p) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    given = {n: fake(mode, x) for n, x in batch.items()}

    def untouched() -> torch.Tensor:
        if not with_backward:
            embeddings = torch.empty(1, length, SIZES["hidden_size"])
            masks = {"inputs_embeds": embeddings, "attention_mask": given.get("attention_mask")}
            mask: torch.Tensor = create_causal_mask(
                model.config, **masks, past_key_values=None, position_ids=given.get("position_ids")
            )
            return mask
        loss: torch.Tensor = torch.func.functional_call(model, parameters, (), given).loss
        return loss

    with mode:
        before = step(untouched, (parameters, given), length, with_backward)
    return {
        "case": name,
        "masks": sorted({describe(node) for node in attentions}),
        "one_device": asdict(before),
        "one_rank": asdict(after),
    }


def fake(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    out = mode.from_tensor(x.detach(), static_shapes=True)
    return out.requires_grad_(x.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        row = measured(name, options.length, options.ranks)
        rows.append(row)
        sizes = [
            f"{row[side][what] / 2**20:10.1f}" for side in ("one_device", "one_rank") for what in ("bytes", "largest")
        ]
        counts = [row[side]["squares"] for side in ("one_device", "one_rank")]
        print(
            f"{name:36} {' '.join(sizes)} MiB   S x S: {counts[0]} -> {counts[1]}   {'; '.join(row['masks'])}",
            flush=True,
        )
    if options.out:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        text = {"length": options.length, "ranks": options.ranks, "versions": versions, "rows": rows}
        options.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
