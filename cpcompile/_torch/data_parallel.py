"""The DistributedDataParallel whose forward is running (torch 2.11 to 2.14)."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel


def bytes_of_buckets() -> int:
    """Return the bytes of the buckets of the wrapper that is calling the model, 0 where there is none.

    They are there from its making on, beside gradients or, with `gradient_as_bucket_view=True`, in their place between steps.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return 0
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return sum(p.nbytes for name, p in named if p.requires_grad and name not in ignored)
