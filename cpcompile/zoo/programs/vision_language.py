"""Vision-language models of transformers: pictures among words, of several sizes, some across the edges of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpcompile.zoo.build import NotAvailable, import_transformers, instantiate, silence
from cpcompile.zoo.inputs import BATCH, LENGTH, Sampler
from cpcompile.zoo.programs.registry import Program, add_program

IMAGE, START, END, VIDEO = 125, 123, 122, 124
TEXT: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PATCH, SIDE = 4, 12  # 9 patches for each picture
VIT: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# Of each row, where pictures begin: with 9 tokens each, they lie across the edges of chunks.
PLACES = ((14,), (2, 25))


def words(sampler: Sampler, places: Sequence[Sequence[int]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return ids and labels with the tokens of pictures; the n-th picture has `sizes[n]` tokens, none of which is a label."""
    ids, labels = sampler.tokens(), sampler.labels()
    remaining = iter(sizes)
    for row, starts in enumerate(places):
        for start in starts:
            span = slice(start, start + next(remaining))
            ids[row, span], labels[row, span] = IMAGE, -100
    return {"input_ids": ids, "labels": labels}


def kinds(ids: Tensor) -> Tensor:
    """Return 1 for the tokens of pictures and 0 for words."""
    return (ids == IMAGE).long()


Config = Callable[[Any], Any]
Inputs = Callable[[Sampler], dict[str, Any]]


def square(sampler: Sampler) -> dict[str, Any]:
    """Three pictures of one size."""
    return {**words(sampler, PLACES, [9] * 3), "pixel_values": sampler.normal(3, 3, SIDE, SIDE)}


def llava(t: Any) -> Any:
    vision = t.CLIPVisionConfig(**VIT, projection_dim=16)
    return t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE
    )


def paligemma(t: Any) -> Any:
    return t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**TEXT),
        vision_config=t.SiglipVisionConfig(**VIT),
        projection_dim=32,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def prefixed(sampler: Sampler) -> dict[str, Any]:
    """Pictures and a question, which see each other both ways, before the answer."""
    inputs = {**words(sampler, ((1,), (1, 10)), [9] * 3), "pixel_values": sampler.normal(3, 3, SIDE, SIDE)}
    answer = torch.arange(LENGTH) >= torch.tensor([[17], [24]])
    return {**inputs, "token_type_ids": answer.long()}


def gemma3(t: Any) -> Any:
    text = t.Gemma3TextConfig(**TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    return t.Gemma3Config(
        text_config=text,
        vision_config=t.SiglipVisionConfig(**VIT),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def typed(sampler: Sampler) -> dict[str, Any]:
    """Pictures whose tokens see each other both ways."""
    inputs = square(sampler)
    return {**inputs, "token_type_ids": kinds(inputs["input_ids"])}


def internvl(t: Any) -> Any:
    vision = t.InternVLVisionConfig(**{**VIT, "image_size": [16, 16], "patch_size": [4, 4]})
    return t.InternVLConfig(
        text_config=t.Qwen2Config(**TEXT),
        vision_config=vision,
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=4,
    )


def small(sampler: Sampler) -> dict[str, Any]:
    """Three pictures of four tokens."""
    return {**words(sampler, ((17,), (8, 27)), [4] * 3), "pixel_values": sampler.normal(3, 3, 16, 16)}


def idefics3(t: Any) -> Any:
    return t.Idefics3Config(
        text_config=t.LlamaConfig(**TEXT),
        vision_config=t.Idefics3VisionConfig(**{**VIT, "image_size": 16}),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def smolvlm(t: Any) -> Any:
    return t.SmolVLMConfig(
        text_config=t.LlamaConfig(**TEXT),
        vision_config=t.SmolVLMVisionConfig(**{**VIT, "image_size": 16}),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def padded_pictures(sampler: Sampler) -> dict[str, Any]:
    """Two pictures for each row, of which one is padding, all zeros."""
    pixels = sampler.normal(BATCH, 2, 3, 16, 16)
    pixels[0, 1] = 0
    mask = torch.ones(BATCH, 2, 16, 16, dtype=torch.bool)
    mask[1, 1, :, 12:] = False
    return {**words(sampler, ((17,), (8, 27)), [4] * 3), "pixel_values": pixels, "pixel_attention_mask": mask}


def llava_next(t: Any) -> Any:
    vision = t.CLIPVisionConfig(**{**VIT, "image_size": 8}, projection_dim=16)
    return t.LlavaNextConfig(
        text_config=t.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [8, 8]],
    )


def tiles(sampler: Sampler) -> dict[str, Any]:
    """Pictures of several sizes, each a small one of its whole and its tiles."""
    sizes = torch.tensor([[8, 16], [16, 8], [8, 8]])
    lengths = [4 + 2 * (4 + 1), 4 + 4 * (2 + 1), 4 + 2 * (2 + 1)]
    return {
        **words(sampler, ((12,), (1, 22)), lengths),
        "pixel_values": sampler.normal(3, 3, 3, 8, 8),
        "image_sizes": sizes,
    }


def llava_onevision(t: Any) -> Any:
    vision = t.SiglipVisionConfig(**{**VIT, "image_size": 8})
    return t.LlavaOnevisionConfig(
        text_config=t.Qwen2Config(**TEXT),
        vision_config=vision,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8], [8, 8]],
    )


def mllama(t: Any) -> Any:
    """Words attend to pictures, which are no part of the sequence."""
    text = t.MllamaTextConfig(
        **TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, cross_attention_layers=[1]
    )
    vision = t.MllamaVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=8,
        patch_size=4,
        max_num_tiles=2,
        intermediate_layers_indices=[0],
        vision_output_dim=32,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    return t.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)


def beside_words(sampler: Sampler) -> dict[str, Any]:
    """Two pictures a row of up to two tiles; of a row, words see those that came before them, and one has no second picture."""
    starts = torch.tensor([[3, 50], [5, 20]])
    sees = torch.arange(LENGTH)[None, :, None] >= starts[:, None]
    tiles = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 1]]])
    return {
        "input_ids": sampler.tokens(),
        "labels": sampler.labels(),
        "pixel_values": sampler.normal(BATCH, 2, 2, 3, 8, 8),
        "aspect_ratio_ids": torch.tensor([[2, 0], [1, 3]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": sees[..., None] * tiles[:, None],
    }


def aya_vision(t: Any) -> Any:
    return t.AyaVisionConfig(
        text_config=t.Cohere2Config(**TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        vision_config=t.SiglipVisionConfig(**{**VIT, "image_size": 16}),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def llama4(t: Any) -> Any:
    text = t.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8, interleave_moe_layer_step=2
    )
    vision = {**VIT, "image_size": 16, "intermediate_size": 64, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    return t.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)


def mistral3(t: Any) -> Any:
    return t.Mistral3Config(
        text_config=t.MistralConfig(**TEXT),
        vision_config=t.PixtralVisionConfig(**{**VIT, "image_size": 24}),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def ragged(sampler: Sampler) -> dict[str, Any]:
    """Pictures of several sizes, each padded to the largest."""
    sizes = ((16, 24), (24, 16), (16, 16))
    return {
        **words(sampler, ((16,), (7, 26)), [h * w // 64 for h, w in sizes]),
        "pixel_values": sampler.normal(3, 3, 24, 24),
        "image_sizes": torch.tensor(sizes),
    }


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION: Mapping[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN: Mapping[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_vl(t: Any) -> Any:
    text = {**TEXT, "rope_parameters": ROPE}
    return t.Qwen2VLConfig(text_config=text, vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 32}, **QWEN)


def qwen2_5_vl(t: Any) -> Any:
    text = {**TEXT, "rope_parameters": ROPE}
    vision = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN)


def qwen3_vl(t: Any) -> Any:
    text = {**TEXT, "rope_parameters": ROPE}
    vision = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN)


def glm4v(t: Any) -> Any:
    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
    vision = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "image_size": 16}
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
    }
    return t.Glm4vConfig(text_config=text, vision_config=vision, **tokens)


GRIDS = ((1, 4, 6), (1, 6, 4), (1, 4, 4))  # of patches: 6, 6 and 4 tokens


def grids(sampler: Sampler) -> dict[str, Any]:
    """Pictures of several sizes, as patches in one row."""
    inputs = words(sampler, ((16,), (7, 26)), [t * h * w // 4 for t, h, w in GRIDS])
    return {
        **inputs,
        "pixel_values": sampler.normal(sum(t * h * w for t, h, w in GRIDS), 3 * 2 * PATCH**2),
        "image_grid_thw": torch.tensor(GRIDS),
        "mm_token_type_ids": kinds(inputs["input_ids"]),
    }


ROPE_INPUTS = ("input_ids", "mm_token_type_ids", "image_grid_thw")
MODELS: Mapping[str, tuple[Config, Inputs]] = {
    "LlavaForConditionalGeneration": (llava, square),
    "PaliGemmaForConditionalGeneration": (paligemma, prefixed),
    "Gemma3ForConditionalGeneration": (gemma3, typed),
    "InternVLForConditionalGeneration": (internvl, small),
    "Idefics3ForConditionalGeneration": (idefics3, padded_pictures),
    "SmolVLMForConditionalGeneration": (smolvlm, padded_pictures),
    "LlavaNextForConditionalGeneration": (llava_next, tiles),
    "LlavaOnevisionForConditionalGeneration": (llava_onevision, tiles),
    "MllamaForConditionalGeneration": (mllama, beside_words),
    "AyaVisionForConditionalGeneration": (aya_vision, small),
    "Llama4ForConditionalGeneration": (llama4, small),
    "Mistral3ForConditionalGeneration": (mistral3, ragged),
    "Glm4vForConditionalGeneration": (glm4v, grids),
    "Qwen2VLForConditionalGeneration": (qwen2_vl, grids),
    "Qwen2_5_VLForConditionalGeneration": (qwen2_5_vl, grids),
    "Qwen3VLForConditionalGeneration": (qwen3_vl, grids),
}


def make(name: str) -> Callable[[Sampler], Program]:
    """Return what makes the program of a class of transformers."""
    make_config, make_inputs = MODELS[name]

    def made(sampler: Sampler) -> Program:
        try:
            transformers = import_transformers()
        except ImportError:
            raise NotAvailable("transformers is not installed") from None
        if not hasattr(transformers, name):
            raise NotAvailable(f"transformers {transformers.__version__} has no {name}")
        config = make_config(transformers)
        silence(config)
        model: Any = instantiate(getattr(transformers, name), config, "sdpa")
        inputs = make_inputs(sampler)
        if "image_grid_thw" in inputs:  # as trainers do: the model would count from lists, which no graph holds
            inputs["position_ids"] = model.model.get_rope_index(
                **{k: x for k, x in inputs.items() if k in ROPE_INPUTS}
            )[0]
        constants = [name for name in ("image_grid_thw", "image_sizes") if name in inputs]
        return Program(model, inputs, {"constants": constants})

    return made


for model_name in MODELS:
    add_program("vision_language", model_name, make(model_name))
