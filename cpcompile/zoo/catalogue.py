"""Catalogue: the architectures of the zoo, by category, and what their tiny configs need besides the shared sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Model types of transformers, or entries of `MODEL_TYPES`.
CAUSAL = """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom codegen cohere cohere2
cohere2_moe cohere_compass_text cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge
dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text
gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo
gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text
jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba mamba2 mellum
mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_sparse minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi
phi3 phimoe qwen2 qwen2_moe qwen2_sw qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text
recurrent_gemma reformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm xlnet xlstm youtu
zamba zamba2 zaya
"""

MASKED = """
albert bert big_bird big_bird_sparse convbert deberta deberta-v2 distilbert electra ernie esm esmc eurobert fnet
funnel gte ibert jina_embeddings_v3 longformer megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer
rembert roberta roformer squeezebert ultrabert xlm-roberta
"""

SEQ2SEQ = """
bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 nllb-moe pegasus pegasus_x plbart prophetnet
switch_transformers t5 t5gemma umt5 whisper
"""

TEXT_ENCODERS = {
    "bert_model": "BertModel",
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
}

VISION = {
    "beit": "BeitForImageClassification",
    "clip_vision_model": "CLIPVisionModel",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
    "ijepa": "IJepaModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "swin": "SwinModel",
    "videomae": "VideoMAEModel",
    "vit": "ViTForImageClassification",
    "vit_mae": "ViTMAEModel",
    "vivit": "VivitModel",
}

AUDIO = {
    "audio-spectrogram-transformer": "ASTModel",
    "hubert": "HubertModel",
    "parakeet_encoder": "ParakeetEncoder",
    "wav2vec2": "Wav2Vec2Model",
}

# Vision-language models, whose configs have parts: `composite.py` builds them. With `_img` an image comes with the text.
VISION_LANGUAGE = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4_vlm": "Gemma4ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "llama4_vlm": "Llama4ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_img": "LlavaForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_img": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_5_vlm": "Qwen3_5ForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}

# Entries that are another configuration of a model type.
MODEL_TYPES = {
    "qwen2_sw": "qwen2",
    "minimax_m3_sparse": "minimax_m3_vl_text",
    "big_bird_sparse": "big_bird",
    "bert_model": "bert",
}

CATEGORIES: Mapping[str, Mapping[str, str | None]] = {
    "causal": dict.fromkeys(CAUSAL.split()),
    "vlm": VISION_LANGUAGE,
    "mlm": dict.fromkeys(MASKED.split()),
    "textenc": TEXT_ENCODERS,
    "s2s": dict.fromkeys(SEQ2SEQ.split())
    | {"whisper": "WhisperForConditionalGeneration", "t5gemma": "T5GemmaForConditionalGeneration"},
    "vision": VISION,
    "audio": AUDIO,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture of the zoo.

    Attributes:
        category: causal, vlm, mlm, textenc, s2s, vision or audio.
        name: of the configuration, mostly the model type.
        class_name: the transformers class, or None for that of the category's auto class.
    """

    category: str
    name: str
    class_name: str | None

    @property
    def key(self) -> str:
        """The name that is unique over all categories."""
        return f"{self.category}:{self.name}"

    @property
    def model_type(self) -> str:
        """The name of the config class in transformers."""
        return MODEL_TYPES.get(self.name, self.name)

    @property
    def changes(self) -> Mapping[str, Any]:
        """The settings apart from the shared sizes."""
        from cpcompile.zoo.overrides import OVERRIDES

        return OVERRIDES.get(self.name, {})


ENTRIES: Mapping[str, Entry] = {
    entry.key: entry
    for category, names in CATEGORIES.items()
    for entry in (Entry(category, name, class_name) for name, class_name in names.items())
}


def find_entries(wanted: list[str]) -> list[Entry]:
    """Return the entries of these keys, names or categories; all of them when `wanted` is empty.

    Raises:
        KeyError: one of them is unknown; its argument is a message for users.
    """
    if not wanted:
        return list(ENTRIES.values())
    found: dict[str, Entry] = {}
    for text in wanted:
        matches = {e.key: e for e in ENTRIES.values() if text in (e.key, e.name, e.category)}
        if not matches:
            raise KeyError(
                f"{text}: no such entry; categories are {', '.join(CATEGORIES)}, an entry is e.g. causal:llama."
            )
        found |= matches
    return list(found.values())
