"""Diffusion: the transformers of diffusers from tiny settings, wrapped as people train them.

Where pipelines pack latents to tokens `[B, tokens, C]` before the model, these are declared; of images and videos nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.build import NotAvailable
from cpcompile.zoo.flex import allow_flex_attention_on_cpu
from cpcompile.zoo.inputs import BATCH, Sampler
from cpcompile.zoo.programs.registry import Program, add_program

ROWS, COLUMNS, FRAMES = 5, 7, 5  # of patches: 35 or 175 tokens
WORDS = 9
TEXT = 6  # width of a word


class Denoiser(nn.Module):
    """A transformer with the loss of its output."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, target: Tensor, **inputs: Any) -> dict[str, Tensor]:
        sample = output_of(self.transformer, inputs)
        return {"loss": F.mse_loss(sample, target), "sample": sample}


def output_of(transformer: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what a transformer says of the latents, samples that it returns as a list stacked."""
    output = transformer(**inputs, return_dict=False)
    sample = output[0] if isinstance(output, tuple) else output
    return torch.stack(sample) if isinstance(sample, list) else sample


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model of diffusers is made tiny, and what it is given.

    Attributes:
        settings: of its constructor.
        inputs: its keyword arguments.
        token_dims: those that a user has to declare.
    """

    settings: Mapping[str, Any]
    inputs: Callable[[Sampler], dict[str, Any]]
    token_dims: Mapping[str, int] = field(default_factory=dict)


def make(name: str) -> Callable[[Sampler], Program]:
    """Return what makes the program of a class of diffusers."""

    def made(sampler: Sampler) -> Program:
        try:
            import diffusers
        except ImportError:
            raise NotAvailable("diffusers is not installed") from None
        allow_flex_attention_on_cpu()
        if not hasattr(diffusers, name):
            raise NotAvailable(f"diffusers {diffusers.__version__} has no {name}")
        recipe = RECIPES[name]
        model = Denoiser(getattr(diffusers, name)(**recipe.settings))
        inputs = recipe.inputs(sampler)
        with torch.no_grad():
            shape = output_of(model.transformer, inputs).shape
        return Program(model, {"target": sampler.normal(*shape), **inputs}, {"token_dims": recipe.token_dims})

    return made


PACKED = {"hidden_states": 1}


def packed(s: Sampler, channels: int, length: int = ROWS * COLUMNS) -> Tensor:
    """Return latents that are tokens already."""
    return s.normal(BATCH, length, channels)


def image(s: Sampler, channels: int, patch: int = 2) -> Tensor:
    """Return latents of images."""
    return s.normal(BATCH, channels, ROWS * patch, COLUMNS * patch)


def video(s: Sampler, channels: int, patch: int = 2, frames: int = FRAMES) -> Tensor:
    """Return latents of videos."""
    return s.normal(BATCH, channels, frames, ROWS * patch, COLUMNS * patch)


def text(s: Sampler, width: int = TEXT, words: int = WORDS) -> Tensor:
    """Return embeddings of words."""
    return s.normal(BATCH, words, width)


def words_mask(dtype: torch.dtype = torch.bool) -> Tensor:
    """Return which words are there: the second text is shorter."""
    mask = torch.ones(BATCH, WORDS, dtype=dtype)
    mask[1, 6:] = 0
    return mask


def times() -> Tensor:
    """Return a time of each sample."""
    return torch.tensor([0.3, 0.8])


def steps() -> Tensor:
    """Return a step of each sample."""
    return torch.tensor([300, 800])


def grid(*sizes: int) -> Tensor:
    """Return the coordinates of a grid, row by row."""
    return torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"), -1).flatten(0, -2)


def image_ids(first: int = 1) -> Tensor:
    """Return coordinates `[tokens, 3]` of the patches of an image."""
    return grid(first, ROWS, COLUMNS).float()


def ids_4(length: int, start: int = 0) -> Tensor:
    """Return coordinates `[B, tokens, 4]`."""
    ids = torch.zeros(BATCH, length, 4, dtype=torch.long)
    ids[..., 3] = torch.arange(length)
    ids[..., 0] = start
    return ids


def flux(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Flux and of those made after it."""
    ids = {"img_ids": image_ids(), "txt_ids": torch.zeros(WORDS, 3)}
    return {"hidden_states": packed(s, 8), "encoder_hidden_states": text(s), "timestep": times(), **ids}


def latents(
    make_latents: Callable[[Sampler, int], Tensor], channels: int, time: Callable[[], Tensor] = times, **more: Any
) -> Callable[[Sampler], dict[str, Any]]:
    """Return what makes latents, words, times, and whatever more: a value, or what makes it."""

    def inputs(s: Sampler) -> dict[str, Any]:
        made = {"hidden_states": make_latents(s, channels), "encoder_hidden_states": text(s), "timestep": time()}
        return made | {name: value(s) if callable(value) else value for name, value in more.items()}

    return inputs


HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
WIDE_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT}
ROPE = {"axes_dims_rope": (4, 4, 4)}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 8, "ffn_dim": 32, "num_layers": 2}
HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
}
SQUARE = {"original_size": torch.full((BATCH, 2), 80.0), "target_size": torch.full((BATCH, 2), 80.0)}
CROP = {"crop_coords": torch.zeros(BATCH, 2)}


def hidream(s: Sampler) -> dict[str, Any]:
    """Return the inputs of HiDream: images, two texts, one of them of each layer."""
    return {
        "hidden_states": s.normal(BATCH, 4, 10, 10),
        "timesteps": steps(),
        "encoder_hidden_states_t5": text(s),
        "encoder_hidden_states_llama3": torch.stack([text(s) for _ in range(2)]),
        "pooled_embeds": s.normal(BATCH, 8),
    }


def hunyuan_framepack(s: Sampler) -> dict[str, Any]:
    """Return the inputs of FramePack: videos, and what came before them at three scales, with the places of their frames."""
    made = latents(video, 4, steps, encoder_attention_mask=words_mask(), guidance=times())(s)
    made |= {"pooled_projections": s.normal(BATCH, 8), "image_embeds": s.normal(BATCH, 5, 6)}
    made["indices_latents"] = torch.arange(7, 7 + FRAMES)
    for name, first, frames in (("clean", 6, 1), ("history_2x", 4, 2), ("history_4x", 0, 4)):
        made[f"latents_{name}"] = video(s, 4, frames=frames)
        made[f"indices_latents_{name}"] = torch.arange(first, first + frames)
    return made


def ltx2(s: Sampler) -> dict[str, Any]:
    """Return the inputs of LTX-2: a video and its sound."""
    sizes = {"num_frames": FRAMES, "height": ROWS, "width": COLUMNS, "audio_num_frames": 11, "fps": 25.0}
    return {
        "hidden_states": packed(s, 8, FRAMES * ROWS * COLUMNS),
        "audio_hidden_states": packed(s, 8, 11),
        "encoder_hidden_states": text(s),
        "audio_encoder_hidden_states": text(s),
        "timestep": steps(),
        "encoder_attention_mask": words_mask(torch.long),
        "audio_encoder_attention_mask": words_mask(torch.long),
        **sizes,
    }


def ideogram(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Ideogram: words and patches in one sequence, told apart by an indicator."""
    length = WORDS + ROWS * COLUMNS
    indicator = (torch.arange(length) >= WORDS).long().repeat(BATCH, 1)
    return {
        "hidden_states": packed(s, 8, length),
        "timestep": times(),
        "encoder_hidden_states": text(s, TEXT, length),
        "position_ids": torch.arange(length)[None, :, None].repeat(BATCH, 1, 3),
        "segment_ids": torch.ones(BATCH, length, dtype=torch.long),
        "indicator": indicator,
    }


def krea(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Krea: words of several layers before patches."""
    length = WORDS + ROWS * COLUMNS
    return {
        "hidden_states": packed(s, 8),
        "encoder_hidden_states": s.normal(BATCH, WORDS, 2, 24),
        "timestep": times(),
        "position_ids": torch.arange(length)[:, None].repeat(1, 3),
    }


def ace_step(s: Sampler) -> dict[str, Any]:
    """Return the inputs of ACE-Step: sound, and what it is made from."""
    return {
        "hidden_states": packed(s, 4, 37),
        "timestep": times(),
        "timestep_r": times(),
        "encoder_hidden_states": text(s, 24),
        "context_latents": packed(s, 8, 37),
    }


def z_image(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Z-Image: lists of images and texts."""
    return {
        "x": [s.normal(4, 1, 2 * ROWS, 2 * COLUMNS) for _ in range(BATCH)],
        "t": times(),
        "cap_feats": [s.normal(words, TEXT) for words in (WORDS, 6)],
    }


def anyflow_far(s: Sampler) -> dict[str, Any]:
    """Return the inputs of AnyFlow-FAR: videos in chunks of frames, and the mask that is causal over these."""
    import diffusers

    chunks, steps_of_frames = [1, 2, 2], steps()[:, None].repeat(1, FRAMES)
    mask = diffusers.AnyFlowFARTransformer3DModel(**ANYFLOW_FAR).build_attention_mask(
        chunk_partition=chunks, height=2 * ROWS + 2, width=2 * COLUMNS + 2
    )
    return {
        "hidden_states": s.normal(BATCH, FRAMES, 4, 2 * ROWS + 2, 2 * COLUMNS + 2),
        "timestep": steps_of_frames,
        "r_timestep": steps_of_frames - 100,
        "encoder_hidden_states": text(s),
        "chunk_partition": chunks,
        "attention_mask": mask,
    }


def joy_image_edit_plus(s: Sampler) -> dict[str, Any]:
    """Return the inputs of JoyImage Edit Plus: patches of an image to make and of one to look at, the second sample's shorter."""
    shapes = [[(1, ROWS, COLUMNS), (1, 3, 4)], [(1, ROWS, COLUMNS), (1, 3, 3)]]
    return {
        "hidden_states": s.normal(BATCH, ROWS * COLUMNS + 12, 4, 1, 2, 2),
        "timestep": steps(),
        "encoder_hidden_states": text(s),
        "encoder_hidden_states_mask": words_mask(torch.float32),
        "shape_list": shapes,
    }


def minimax_h3(s: Sampler) -> dict[str, Any]:
    """Return the inputs of MiniMax-H3: words, a video and its sound, and their places in one sequence."""
    words, patches, sounds = WORDS, ROWS * COLUMNS, 11
    length = words + patches + sounds
    return {
        "hidden_states": packed(s, 16),
        "audio_hidden_states": packed(s, 4, sounds),
        "encoder_hidden_states": text(s),
        "timestep": torch.tensor([300, 0]),
        "timestep_indices": (torch.arange(length) < words).long(),
        "token_tags": torch.tensor([1] * words + [0] * patches + [2] * sounds),
        "position_ids": torch.arange(length)[:, None].repeat(1, 3),
        "text_indices": torch.arange(words),
        "video_indices": torch.arange(words, words + patches),
        "audio_indices": torch.arange(words + patches, length),
    }


def omnigen(s: Sampler) -> dict[str, Any]:
    """Return the inputs of OmniGen: words with an image among them, and the image to make."""
    places, words = 12, 12 + WORDS  # of the image among the words
    length = words + 1 + ROWS * COLUMNS
    mask = torch.ones(BATCH, length, length)
    mask[:, :words, :words] = torch.ones(words, words).tril()
    mask[:, 2 : 2 + places, 2 : 2 + places] = 1
    mask[:, : words + 1, words + 1 :] = 0
    return {
        "hidden_states": image(s, 4),
        "timestep": times(),
        "input_ids": s.tokens(words) % 50,
        "input_img_latents": [s.normal(1, 4, 6, 8) for _ in range(BATCH)],
        "input_image_sizes": {row: [[2, 2 + places]] for row in range(BATCH)},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(BATCH, 1),
    }


def qwen_image_21(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Qwen-Image 2.1: words with the places of an image among them, and of the image to make behind them."""
    seen, made, words = (1, 4, 6), (1, 4, 10), WORDS
    img_mask = torch.zeros(BATCH, words + 6 + 10, dtype=torch.bool)
    img_mask[:, 3:9] = True
    img_mask[:, words + 6 :] = True
    return {
        "hidden_states": packed(s, 8, 24 + 40),
        "encoder_hidden_states": text(s, TEXT, words + 6),
        "timestep": times(),
        "img_shapes": [[seen, made]] * BATCH,
        "img_mask": img_mask,
    }


def sana_wm(s: Sampler) -> dict[str, Any]:
    """Return the inputs of SANA-WM: a video, and where the camera was in each frame."""
    camera = torch.eye(4).flatten().repeat(BATCH, FRAMES, 1)
    camera[..., 3] = torch.arange(FRAMES) * 0.1
    intrinsics = torch.tensor([4.0, 4.0, 3.5, 2.5]).repeat(BATCH, FRAMES, 1)
    return {
        "hidden_states": video(s, 4, 1),
        "timestep": steps()[:, None, None].repeat(1, 1, FRAMES),
        "encoder_hidden_states": text(s)[:, None],
        "encoder_attention_mask": words_mask(torch.long),
        "camera_conditions": torch.cat([camera, intrinsics], dim=-1),
        "chunk_plucker": video(s, 6, 1),
    }


def sana_wm_refiner(s: Sampler) -> dict[str, Any]:
    """Return the inputs of the refiner of SANA-WM: patches of a video with the rotation of each."""
    length = FRAMES * ROWS * COLUMNS
    angles = s.normal(1, length, 24)
    return {
        "hidden_states": packed(s, 8, length),
        "encoder_hidden_states": text(s),
        "timestep": steps()[:, None].repeat(1, length),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": words_mask(torch.long),
    }


def wan_animate_2(s: Sampler) -> dict[str, Any]:
    """Return the inputs of Wan-Animate-2 where it reads the reference, whose keys and values it keeps."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid_sizes = torch.tensor([[FRAMES, ROWS, COLUMNS]] * BATCH)
    return {
        "hidden_states": [video(s, 4)[0] for _ in range(BATCH)],
        "timestep": times(),
        "encoder_hidden_states": [s.normal(words, TEXT) for words in (WORDS, 6)],
        "condition_latents": [video(s, 2)[0] for _ in range(BATCH)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": FRAMES * ROWS * COLUMNS,
        "offset_grid_sizes": grid_sizes,
    }


def allegro_positions(s: Sampler) -> tuple[Any, Any]:
    """Return cosines and sines of the positions along each dim, and the position of each token along each."""
    tables = [s.normal(size, 4) for size in (FRAMES, ROWS, COLUMNS)]
    return tuple((table.cos(), table.sin()) for table in tables), list(grid(FRAMES, ROWS, COLUMNS).T[:, None])


SHAPES = [(1, ROWS, COLUMNS)] * BATCH
PIXART = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 12, "norm_num_groups": 2}

ANYFLOW_FAR = {**WAN, "full_chunk_limit": 2, "chunk_partition": (1, 2, 2)}

RECIPES: Mapping[str, Recipe] = {
    "AceStepTransformer1DModel": Recipe(
        {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
        },
        ace_step,
        PACKED,
    ),
    "AllegroTransformer3DModel": Recipe(
        {**HEADS, "num_layers": 2, "cross_attention_dim": 24, "caption_channels": TEXT}
        | {"sample_height": 10, "sample_width": 14, "sample_frames": FRAMES},
        latents(
            video,
            4,
            steps,
            attention_mask=torch.ones(BATCH, FRAMES, 2 * ROWS, 2 * COLUMNS),
            encoder_attention_mask=words_mask(torch.float32),
            image_rotary_emb=allegro_positions,
        ),
    ),
    "AnyFlowFARTransformer3DModel": Recipe(ANYFLOW_FAR, anyflow_far),
    "AnyFlowTransformer3DModel": Recipe(
        WAN,
        latents(
            lambda s, c: video(s, c).transpose(1, 2).contiguous(),
            4,
            lambda: steps()[:, None].repeat(1, FRAMES),
            r_timestep=steps()[:, None].repeat(1, FRAMES),
        ),
    ),
    "AuraFlowTransformer2DModel": Recipe(
        {**HEADS, "sample_size": 12, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1}
        | {
            "num_single_dit_layers": 1,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 144,
        },
        latents(image, 4),
    ),
    "BriaFibo2Transformer2DModel": Recipe(
        {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": TEXT}
        | {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "axes_dims": (4, 4, 4), "axes_lens": (32, 16, 16)}
        | {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4}
        | {"gist_max_text_len": 16},
        latents(image, 4, times, encoder_hidden_states=lambda s: s.normal(BATCH, 2, WORDS, TEXT)),
    ),
    "BriaFiboTransformer2DModel": Recipe(
        {**FLUX, **ROPE, "text_encoder_dim": TEXT},
        lambda s: {**flux(s), "text_encoder_layers": [text(s) for _ in range(2)]},
        PACKED,
    ),
    "BriaTransformer2DModel": Recipe({**FLUX, **ROPE}, flux, PACKED),
    "ChromaTransformer2DModel": Recipe(
        {**FLUX, **ROPE, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        flux,
        PACKED,
    ),
    "ChronoEditTransformer3DModel": Recipe({**WAN, "rope_temporal_skip_len": 2}, latents(video, 4, steps)),
    "CogVideoXTransformer3DModel": Recipe(
        {
            **WIDE_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
            "num_layers": 2,
        }
        | {"sample_width": 14, "sample_height": 10, "sample_frames": 4 * FRAMES - 3, "max_text_seq_length": WORDS},
        latents(lambda s, c: video(s, c).transpose(1, 2).contiguous(), 4, steps),
    ),
    "CogView3PlusTransformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT, "time_embed_dim": 8}
        | {"condition_dim": 4, "pos_embed_max_size": 12, "sample_size": 24},
        latents(image, 4, steps, **SQUARE, **CROP),
    ),
    "CogView4Transformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT, "time_embed_dim": 8}
        | {"condition_dim": 4, "pos_embed_max_size": 12, "sample_size": 24, "rope_axes_dim": (16, 16)},
        latents(image, 4, steps, **SQUARE, **CROP),
    ),
    "ConsisIDTransformer3DModel": Recipe(
        {
            **WIDE_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
            "num_layers": 2,
        }
        | {"sample_width": 14, "sample_height": 10, "sample_frames": 4 * FRAMES - 3, "max_text_seq_length": WORDS},
        latents(lambda s, c: video(s, c).transpose(1, 2).contiguous(), 4, steps),
    ),
    "CosmosTransformer3DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT, "adaln_lora_dim": 4}
        | {"max_size": (8, 16, 16), "concat_padding_mask": False},
        latents(video, 4, times, fps=24),
    ),
    "DiTTransformer2DModel": Recipe(
        {**HEADS, "num_layers": 2, "sample_size": 10, "norm_num_groups": 2, "num_embeds_ada_norm": 10},
        lambda s: {
            "hidden_states": s.normal(BATCH, 4, 10, 10),
            "timestep": torch.tensor([3, 8]),
            "class_labels": torch.tensor([1, 7]),
        },
    ),
    "DreamLiteTransformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 2, "cross_attention_dim": TEXT},
        lambda s: {"hidden_states": image(s, 4, 1), "encoder_hidden_states": text(s)},
    ),
    "EasyAnimateTransformer3DModel": Recipe(
        {**WIDE_HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 14, "sample_height": 10}
        | {"num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": TEXT},
        latents(video, 4, steps),
    ),
    "ErnieImageTransformer2DModel": Recipe(
        {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4}
        | {"out_channels": 4, "text_in_dim": TEXT, "rope_axes_dim": (4, 4, 4)},
        lambda s: {
            "hidden_states": image(s, 4, 1),
            "timestep": times(),
            "text_bth": text(s),
            "text_lens": torch.tensor([WORDS, 6]),
        },
    ),
    "Flux2Transformer2DModel": Recipe(
        {**FLUX, "attention_head_dim": 16, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        lambda s: {**flux(s), "img_ids": ids_4(ROWS * COLUMNS), "txt_ids": ids_4(WORDS), "guidance": times()},
        PACKED,
    ),
    "Flux3Transformer2DModel": Recipe(
        {
            **FLUX,
            "attention_head_dim": 16,
            "cond_in_channels": 8,
            "timestep_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda s: {**flux(s), "img_ids": ids_4(ROWS * COLUMNS)[0], "txt_ids": ids_4(WORDS)[0]},
        PACKED,
    ),
    "FluxTransformer2DModel": Recipe(
        {**FLUX, **ROPE, "pooled_projection_dim": 8, "guidance_embeds": True},
        lambda s: {**flux(s), "pooled_projections": s.normal(BATCH, 8), "guidance": times()},
        PACKED,
    ),
    "GlmImageTransformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT, "time_embed_dim": 8}
        | {"condition_dim": 4, "prior_vq_quantizer_codebook_size": 20},
        latents(
            image,
            4,
            steps,
            prior_token_id=lambda s: s.tokens(ROWS * COLUMNS) % 20,
            prior_token_drop=torch.tensor([[False], [True]]).expand(BATCH, ROWS * COLUMNS),
            target_size=torch.full((BATCH, 2), 80.0),
            crop_coords=torch.zeros(BATCH, 2),
        ),
    ),
    "HeliosTransformer3DModel": Recipe(
        {**WAN, "rope_dim": (4, 4, 4), "has_multi_term_memory_patch": False},
        latents(video, 4, steps),
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
        | {"caption_channels": [TEXT, TEXT], "text_emb_dim": 8, "axes_dims_rope": (4, 4, 4), "max_resolution": (10, 10)}
        | {"llama_layers": [0, 1]},
        hidream,
    ),
    "HunyuanImageTransformer2DModel": Recipe(
        {**HUNYUAN, "num_single_layers": 1, "rope_axes_dim": (6, 6)},
        latents(lambda s, c: image(s, c, 1), 4, times, encoder_attention_mask=words_mask()),
    ),
    "HunyuanVideo15Transformer3DModel": Recipe(
        {**HUNYUAN, "num_layers": 2, "text_embed_2_dim": 8, "image_embed_dim": 6, "rope_axes_dim": (4, 4, 4)},
        latents(
            lambda s, c: video(s, c, 1),
            4,
            times,
            encoder_attention_mask=words_mask(),
            encoder_hidden_states_2=lambda s: text(s, 8, 4),
            encoder_attention_mask_2=torch.ones(BATCH, 4, dtype=torch.bool),
            image_embeds=lambda s: s.normal(BATCH, 3, 6),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        {**HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)}
        | {"has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        hunyuan_framepack,
    ),
    "HunyuanVideoTransformer3DModel": Recipe(
        {**HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)},
        latents(
            video,
            4,
            steps,
            encoder_attention_mask=words_mask(),
            pooled_projections=lambda s: s.normal(BATCH, 8),
            guidance=times(),
        ),
    ),
    "Ideogram4Transformer2DModel": Recipe(
        {**HEADS, "in_channels": 8, "num_layers": 2, "intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": TEXT}
        | {"mrope_section": (2, 2, 2)},
        ideogram,
        PACKED,
    ),
    "JoyImageEditPlusTransformer3DModel": Recipe(
        {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": TEXT, "num_layers": 2}
        | {"rope_dim_list": [4, 4, 4]},
        joy_image_edit_plus,
        PACKED,
    ),
    "JoyImageEditTransformer3DModel": Recipe(
        {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": TEXT, "num_layers": 2}
        | {"rope_dim_list": [4, 4, 4]},
        latents(video, 4, steps),
    ),
    "Kandinsky5Transformer3DModel": Recipe(
        {"in_text_dim": TEXT, "in_text_dim2": 8, "time_dim": 8, "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1}
        | {"num_visual_blocks": 2, "axes_dims": (4, 4, 4)},
        lambda s: {
            "hidden_states": s.normal(BATCH, FRAMES, 2 * ROWS, 2 * COLUMNS, 4),
            "encoder_hidden_states": text(s),
            "timestep": steps(),
            "pooled_projections": s.normal(BATCH, 8),
            "visual_rope_pos": (torch.arange(FRAMES), torch.arange(ROWS), torch.arange(COLUMNS)),
            "text_rope_pos": torch.arange(WORDS),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Recipe(
        {"in_visual_dim": 2, "out_visual_dim": 4, "time_dim": 8, "model_dim": 24, "ff_dim": 32, "num_visual_blocks": 2}
        | {"axes_dims": (4, 4, 4), "nabla_window": (3, 3, 3)},
        lambda s: {"hidden_states": s.normal(1, 3, 8, 16, 5), "timestep": torch.tensor([300])},
    ),
    "Kandinsky6Transformer3DModel": Recipe(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 24,
        }
        | {"ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4), "visual_cond": False}
        | {"in_audio_dim": 4, "out_audio_dim": 4, "ca_rope": True, "cross_gates": True, "fix_modulation": True},
        lambda s: {
            "hidden_states": s.normal(BATCH, FRAMES, 2 * ROWS, 2 * COLUMNS, 4),
            "encoder_hidden_states": text(s),
            "pooled_projections": s.normal(BATCH, 8),
            "timestep": steps(),
            "audio_hidden_states": packed(s, 4, 11),
            "encoder_attention_mask": words_mask(),
        },
    ),
    "Krea2Transformer2DModel": Recipe(
        {**HEADS, "in_channels": 8, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 32}
        | {"timestep_embed_dim": 8, "text_hidden_dim": 24, "num_text_layers": 2, "text_num_attention_heads": 2}
        | {"text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1}
        | {"num_refiner_text_blocks": 1, "axes_dims_rope": (4, 4, 4)},
        krea,
        PACKED,
    ),
    "LTX2VideoTransformer3DModel": Recipe(
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 24, "audio_in_channels": 8}
        | {"audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12, "num_layers": 1}
        | {"audio_cross_attention_dim": 24, "caption_channels": TEXT},
        ltx2,
        PACKED,
    ),
    "LTXVideoTransformer3DModel": Recipe(
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": TEXT,
        },
        latents(
            lambda s, c: packed(s, c, FRAMES * ROWS * COLUMNS),
            8,
            steps,
            encoder_attention_mask=words_mask(torch.long),
            num_frames=FRAMES,
            height=ROWS,
            width=COLUMNS,
        ),
        PACKED,
    ),
    "LatteTransformer3DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 24, "sample_size": 10}
        | {"patch_size": 2, "caption_channels": TEXT, "video_length": FRAMES, "attention_bias": True}
        | {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
        | {"num_embeds_ada_norm": 1000},
        latents(lambda s, c: s.normal(BATCH, c, FRAMES, 10, 10), 4, steps),
    ),
    "LongCatImageTransformer2DModel": Recipe(
        {**FLUX, **ROPE, "pooled_projection_dim": 8}, lambda s: {**flux(s), "guidance": None}, PACKED
    ),
    "Lumina2Transformer2DModel": Recipe(
        {"sample_size": 12, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4)}
        | {"axes_lens": (32, 16, 16), "cap_feat_dim": TEXT},
        latents(image, 4, times, encoder_attention_mask=words_mask()),
    ),
    "MiniMaxH3Transformer3DModel": Recipe(
        {**HEADS, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4}
        | {"audio_in_channels": 4, "text_dim": TEXT, "freq_dim": 8, "time_embed_hidden_dim": 8, "time_embed_dim": 8}
        | {"rope_freq_dim": 2},
        minimax_h3,
        PACKED,
    ),
    "MiniMaxMusic3Transformer1DModel": Recipe(
        {**HEADS, "in_channels": 8, "condition_dim": TEXT, "num_layers": 2, "ff_inner_dim": 32, "rotary_dim": 8}
        | {"fourier_embedding_dim": 8},
        latents(lambda s, c: s.normal(BATCH, c, 37), 8, times, encoder_hidden_states=lambda s: text(s, TEXT, 37)),
    ),
    "MochiTransformer3DModel": Recipe(
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 8}
        | {"time_embed_dim": 8, "max_sequence_length": 16},
        latents(video, 4, steps, encoder_hidden_states=lambda s: text(s, 8), encoder_attention_mask=words_mask()),
    ),
    "MotifVideoTransformer3DModel": Recipe(
        {name: value for name, value in HUNYUAN.items() if name != "num_refiner_layers"}
        | {"num_single_layers": 1, "rope_axes_dim": (4, 4, 4)},
        latents(video, 4, steps, encoder_attention_mask=words_mask()),
    ),
    "NucleusMoEImageTransformer2DModel": Recipe(
        {**HEADS, "in_channels": 8, "out_channels": 8, "num_layers": 4, "joint_attention_dim": TEXT, "num_experts": 4}
        | {"moe_intermediate_dim": 16, "patch_size": 1, "capacity_factors": [1.0] * 4, **ROPE},
        latents(packed, 8, times, img_shapes=SHAPES, encoder_hidden_states_mask=words_mask()),
        PACKED,
    ),
    "OmniGenTransformer2DModel": Recipe(
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "num_layers": 2,
        }
        | {"pad_token_id": 0, "vocab_size": 50, "pos_embed_max_size": 12, "time_step_dim": 8}
        | {"rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6}},
        omnigen,
    ),
    "OvisImageTransformer2DModel": Recipe({**FLUX, **ROPE, "out_channels": 8}, flux, PACKED),
    "PRXTransformer2DModel": Recipe(
        {"in_channels": 4, "context_in_dim": TEXT, "hidden_size": 24, "num_heads": 2, "depth": 2, "axes_dim": [6, 6]},
        latents(image, 4, times, attention_mask=words_mask()),
    ),
    "PixArtTransformer2DModel": Recipe(
        {**PIXART, "cross_attention_dim": 24, "caption_channels": TEXT, "use_additional_conditions": False},
        latents(
            image,
            4,
            steps,
            encoder_attention_mask=words_mask(torch.float32),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    "QwenImage21Transformer2DModel": Recipe(
        {**HEADS, "in_channels": 8, "out_channels": 8, "num_layers": 2, "context_in_dim": TEXT}
        | {"axes_dims_rope": (4, 4, 4)},
        qwen_image_21,
        PACKED,
    ),
    "QwenImageTransformer2DModel": Recipe(
        {**HEADS, **ROPE, "in_channels": 8, "out_channels": 2, "num_layers": 2, "joint_attention_dim": TEXT},
        latents(packed, 8, times, encoder_hidden_states_mask=words_mask(), img_shapes=[[shape] for shape in SHAPES]),
        PACKED,
    ),
    "SD3Transformer2DModel": Recipe(
        {**HEADS, "sample_size": 14, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT}
        | {"caption_projection_dim": 24, "pooled_projection_dim": 8, "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
        latents(image, 4, steps, pooled_projections=lambda s: s.normal(BATCH, 8)),
    ),
    "SanaTransformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": TEXT, "sample_size": 8},
        latents(lambda s, c: image(s, c, 1), 4, steps, encoder_attention_mask=words_mask(torch.float32)),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 24, "audio_in_channels": 8}
        | {"audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12, "num_layers": 1}
        | {"audio_cross_attention_dim": 24, "caption_channels": TEXT},
        sana_wm_refiner,
        PACKED,
    ),
    "SanaWMTransformer3DModel": Recipe(
        {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2}
        | {"linear_head_dim": 16, "chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": 1}
        | {"caption_channels": TEXT},
        sana_wm,
    ),
    "SanaVideoTransformer3DModel": Recipe(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": TEXT, "sample_size": 14},
        latents(video, 4, steps, encoder_attention_mask=words_mask(torch.float32)),
    ),
    "SkyReelsV2Transformer3DModel": Recipe(WAN, latents(video, 4, steps)),
    "Transformer2DModel": Recipe(
        {**HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 2, "cross_attention_dim": TEXT},
        lambda s: {"hidden_states": image(s, 4, 1), "encoder_hidden_states": text(s)},
    ),
    "TransformerTemporalModel": Recipe(
        {**HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 2},
        lambda s: {"hidden_states": s.normal(BATCH * 13, 4, 3, 5), "num_frames": 13},
    ),
    "WanAnimate2Transformer3DModel": Recipe(
        {"text_len": 12, "in_dim": 6, "dim": 24, "ffn_dim": 32, "freq_dim": 8, "text_dim": TEXT, "out_dim": 4}
        | {"num_heads": 2, "num_layers": 2, "use_img_emb": False},
        wan_animate_2,
    ),
    "WanAnimateTransformer3DModel": Recipe(
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 6, "added_kv_proj_dim": 24, "motion_dim": 4}
        | {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8}
        | {
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        latents(
            lambda s, c: video(s, c, frames=FRAMES + 1),
            12,
            steps,
            encoder_hidden_states_image=lambda s: s.normal(BATCH, 3, 6),
            pose_hidden_states=lambda s: video(s, 4),
            face_pixel_values=lambda s: s.normal(BATCH, 3, 4 * FRAMES - 3, 16, 16),
        ),
    ),
    "WanTransformer3DModel": Recipe(WAN, latents(video, 4, steps)),
    "WanVACETransformer3DModel": Recipe(
        {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6},
        latents(video, 4, steps, control_hidden_states=lambda s: video(s, 6)),
    ),
    "ZImageTransformer2DModel": Recipe(
        {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": TEXT, "axes_dims": [4, 4, 4], "axes_lens": [64, 16, 16]},
        z_image,
    ),
}

for class_name in RECIPES:
    add_program("diffusion", class_name, make(class_name))
