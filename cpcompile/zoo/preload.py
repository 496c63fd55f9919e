"""Preload: what the server process imports once for all workers."""

from importlib import import_module

import torch

from cpcompile.zoo.build import import_transformers

torch.set_num_threads(1)
import_transformers()
for name in ("cpcompile.inspect.verify", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
    import_module(name)
