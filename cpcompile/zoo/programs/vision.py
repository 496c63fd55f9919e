"""Vision: image classifiers of timm with tiny arguments and a cross entropy, as people train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.build import NotAvailable
from cpcompile.zoo.inputs import BATCH, Sampler
from cpcompile.zoo.programs.registry import Program, add_program

SIDE = 40  # of an image: 25 patches, or windows of 5


class Classifier(nn.Module):
    """A backbone with its loss."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.backbone(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}


def make(name: str) -> Callable[[Sampler], Program]:
    """Return what makes the program of a model of timm."""

    def made(sampler: Sampler) -> Program:
        try:
            import timm
        except ImportError:
            raise NotAvailable("timm is not installed") from None
        if not timm.is_model(name) and not hasattr(timm.models, name):
            raise NotAvailable(f"timm {timm.__version__} has no {name}")
        arguments = {"num_classes": 10, **ARGUMENTS[name]}
        side = arguments.pop("side", SIDE)
        is_named = timm.is_model(name)
        backbone = timm.create_model(name, **arguments) if is_named else getattr(timm.models, name)(**arguments)
        images = sampler.normal(BATCH, 3, side, side)
        return Program(Classifier(backbone), {"images": images, "labels": torch.tensor([3, 7])})

    return made


VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 5}

# Of models by name, or of classes where the name fixes what has to be tiny.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch16_36x1_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "vit_base_patch16_rope_reg1_gap_256": VIT,
    "vit_base_patch16_siglip_256": VIT,
    "vit_small_patch14_reg4_dinov2": {**VIT, "reg_tokens": 4},
    "vit_medium_patch16_gap_240": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "cait_xxs24_224": VIT,
    "xcit_nano_12_p16_224": VIT,
    "VOLO": {
        "side": 64,
        "img_size": 64,
        "layers": (1, 1, 1, 1),
        "embed_dims": (8, 16, 16, 16),
        "num_heads": (2, 2, 2, 2),
        "use_mix_token": False,
        "use_aux_head": False,
        "downsamples": (True, False, False, False),
    },
    "convit_tiny": {**VIT, "local_up_to_layer": 1},
    "MlpMixer": {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "num_blocks": 2},
    "swin_tiny_patch4_window7_224": {**SWIN, "img_size": SIDE},
    "swinv2_tiny_window8_256": {**SWIN, "img_size": SIDE},
    "swinv2_cr_tiny_224": {**SWIN, "img_size": SIDE},
    "maxvit_rmlp_pico_rw_256": {
        "side": 64,
        "img_size": 64,
        "embed_dim": (32, 32),
        "depths": (1, 1),
        "stem_width": 8,
        "block_type": ("M",) * 2,
        "head_hidden_size": 16,
    },
    "twins_svt_small": {
        "side": 64,
        "img_size": 64,
        "embed_dims": (8, 16),
        "num_heads": (1, 2),
        "depths": (2, 2),
        "sr_ratios": (4, 2),
        "wss": (4, 4),
        "mlp_ratios": (2, 2),
    },
    "pvt_v2_b0": {"side": 64, "embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "hiera_tiny_224": {"side": 64, "img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "levit_128s": {
        "side": 64,
        "img_size": 64,
        "embed_dim": (16, 16, 16),
        "key_dim": 8,
        "num_heads": (2, 2, 2),
        "depth": (1, 1, 1),
    },
    "efficientformerv2_s0": {"side": 64, "img_size": 64},
    "mobilevit_xxs": {"side": 64},
    "davit_tiny": {
        "side": 64,
        "embed_dims": (8, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "window_size": 4,
    },
    "FocalNet": {"side": 64, "embed_dim": 8, "depths": (1, 1)},
    "Nest": {"side": 64, "img_size": 64, "embed_dims": (8, 8, 16), "num_heads": (1, 1, 2), "depths": (1, 1, 1)},
    "edgenext_xx_small": {"side": 64, "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "fastvit_t8": {"side": 64, "embed_dims": (8, 8, 16, 16), "layers": (1, 1, 1, 1)},
    "flexivit_small": VIT,
    "samvit_base_patch16": {**VIT, "global_attn_indexes": (1,), "window_size": 3},
}

for model_name in ARGUMENTS:
    add_program("vision", model_name, make(model_name))
