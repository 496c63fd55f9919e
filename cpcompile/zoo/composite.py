"""Composite: the configs that have parts (an image encoder beside a language model, an encoder beside a decoder)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

IMAGE, START, END, VIDEO, AUDIO, AUDIO_START, AUDIO_END = 125, 123, 122, 124, 120, 119, 118

_TEXT: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SIGLIP: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_VISION: Mapping[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_vl(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Qwen2-VL: 3-D rotary positions, images by patches of any grid."""
    text = {**_TEXT, "rope_parameters": _ROPE_3D, "rope_scaling": _ROPE_3D}
    vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64}
    return t.Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)


def qwen2_5_vl(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Qwen2.5-VL: windows in the image encoder."""
    text = {**_TEXT, "rope_parameters": _ROPE_3D, "rope_scaling": _ROPE_3D}
    vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)


def qwen3_vl(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Qwen3-VL: image features are added to the first layers too."""
    text = {**_TEXT, "head_dim": 16, "rope_parameters": _ROPE_3D}
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return t.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)


def qwen3_5_vlm(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Qwen3.5: linear attention beside full attention."""
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16}
    return t.Qwen3_5Config(text_config=tiny("qwen3_5_text"), vision_config=vision, **_QWEN_TOKENS)


def gemma3(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Gemma 3: image tokens see each other both ways."""
    tokens = {"image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return t.Gemma3Config(text_config=tiny("gemma3_text"), vision_config=dict(_SIGLIP), mm_tokens_per_image=4, **tokens)


def gemma4_vlm(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Gemma 4, without its audio part."""
    vision = {**_SIGLIP, "num_key_value_heads": 2, "head_dim": 16}
    del vision["image_size"]
    tokens = {"image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END, "video_token_id": VIDEO}
    tokens |= {"audio_token_id": AUDIO, "boa_token_id": AUDIO_START, "eoa_token_id": AUDIO_END}
    return t.Gemma4Config(text_config=tiny("gemma4_text"), vision_config=vision, audio_config=None, **tokens)


def llava(t: Any, tiny: Callable[[str], Any]) -> Any:
    """LLaVA: a CLIP image encoder before a Llama."""
    vision = t.CLIPVisionConfig(**{**_SIGLIP, "num_hidden_layers": 2, "projection_dim": 32})
    tokens = {"image_token_id": IMAGE, "image_token_index": IMAGE, "vision_feature_layer": -1}
    return t.LlavaConfig(text_config=t.LlamaConfig(**_TEXT), vision_config=vision, **tokens)


def paligemma(t: Any, tiny: Callable[[str], Any]) -> Any:
    """PaliGemma: the prefix sees itself both ways."""
    text = t.GemmaConfig(**{**_TEXT, "head_dim": 16})
    tokens = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    return t.PaliGemmaConfig(
        text_config=text, vision_config=t.SiglipVisionConfig(**_SIGLIP), projection_dim=64, **tokens
    )


def llama4_vlm(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Llama 4: chunked attention, experts."""
    vision = {**_SIGLIP, "intermediate_size": 128, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return t.Llama4Config(text_config=tiny("llama4_text"), vision_config=vision, **tokens)


def idefics3(t: Any, tiny: Callable[[str], Any]) -> Any:
    """Idefics 3: SigLIP before a Llama."""
    text = t.LlamaConfig(**_TEXT)
    return t.Idefics3Config(
        text_config=text, vision_config=dict(_SIGLIP), image_token_id=IMAGE, pad_token_id=0, scale_factor=2
    )


def t5gemma(t: Any, tiny: Callable[[str], Any]) -> Any:
    """T5Gemma: two Gemma 2 stacks."""
    part = {**_TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    parts = {side: t.T5GemmaModuleConfig(**part) for side in ("encoder", "decoder")}
    return t.T5GemmaConfig(**parts, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)


# The transformers module, and a function from a model type to tiny settings, make a config.
COMPOSITES: Mapping[str, Callable[[Any, Callable[[str], Any]], Any]] = {
    "gemma3": gemma3,
    "gemma4_vlm": gemma4_vlm,
    "idefics3": idefics3,
    "llama4_vlm": llama4_vlm,
    "llava": llava,
    "llava_img": llava,
    "paligemma": paligemma,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_5_vl_img": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_5_vlm": qwen3_5_vlm,
    "qwen3_vl": qwen3_vl,
    "t5gemma": t5gemma,
}
