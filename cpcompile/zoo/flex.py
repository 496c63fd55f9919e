"""Flex: what keeps a model with transformers' `flex_attention` from training on a CPU, removed.

torch refuses gradients of flex attention on a CPU because its compiled kernel has none there; uncompiled it has.
transformers compiles flex attention and the making of block masks when the model itself is not compiled, and asks for the
compilation of the latter with an argument that torch warns about, which breaks a graph.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any


def allow_flex_attention_on_cpu() -> None:
    """Let flex attention run and train on a CPU, in this process. Doing it again changes nothing."""
    import torch._dynamo
    import torch.nn.attention.flex_attention as flex
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
    flex._validate_device = lambda query, key, value: None
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    integration.is_torchdynamo_compiling = lambda: True
    if not isinstance(masking_utils.create_block_mask, functools.partial):
        masking_utils.create_block_mask = functools.partial(create_block_mask, masking_utils.create_block_mask)


def create_block_mask(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a block mask as it is, without compiling how it is made."""
    return original(*args, **{**kwargs, "_compile": False})
