"""Axolotl's context parallelism (`axolotl.monkeypatch.ring_attn`) over this runtime: same names, without ring-flash-attn.

    from cpcompile.compat.axolotl import RingAttnFunc, SequenceParallelContextManager

    with SequenceParallelContextManager([model], 2, 1, RingAttnFunc.BATCH_ZIGZAG, None, False, device_mesh=mesh):
        model(input_ids=input_ids, labels=labels).loss.backward()     # the whole batch, on every rank of the dim "cp"

`register_ring_attn_from_device_mesh` alone replaces the attention of all models of transformers, for scripts that cut batches
themselves. What axolotl has no or wrong results for is right here:

* Labels are shifted in the whole sequence: no target is lost between ranks. Loss and gradients are those of one device.
* Windows, capped scores, sinks, padding, chunks, batches of several rows, and documents in each of them.
* Each attention implementation of transformers, on CPUs too; all that cannot be shared is refused by name.
"""

from __future__ import annotations

from cpcompile.compat._axolotl_accelerate import patch_accelerate, unpatch_accelerate
from cpcompile.compat._axolotl_batch import apply_sequence_parallelism
from cpcompile.compat._axolotl_context import SequenceParallelContextManager
from cpcompile.compat._axolotl_layout import RingAttnFunc
from cpcompile.compat._axolotl_register import (
    get_ring_attn_group,
    register_ring_attn_from_device_mesh,
    set_ring_attn_group,
    unregister_ring_attn,
    update_ring_attn_params,
)

__all__ = [
    "RingAttnFunc",
    "SequenceParallelContextManager",
    "apply_sequence_parallelism",
    "get_ring_attn_group",
    "patch_accelerate",
    "register_ring_attn_from_device_mesh",
    "set_ring_attn_group",
    "unpatch_accelerate",
    "unregister_ring_attn",
    "update_ring_attn_params",
]
