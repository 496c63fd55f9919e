"""Overrides: what the tiny config of one entry needs besides the shared sizes (None: the config's own default)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpcompile.zoo.sizes import HEAD_DIM, HIDDEN, VOCABULARY, WIDE, WINDOW

_HYBRID = ["sliding_attention", "full_attention"]
_SPEECH = {
    "conv_dim": [32, 32],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "feat_extract_norm": "layer",
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
_GROUPS = ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups")

_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        "layer_types": _HYBRID,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "doge": {"keep_window_size": 16},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _HYBRID * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "intermediate_size": [WIDE] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 8, "n_groups": 1, "expand": 2},
    "minimax_m3_sparse": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "nemotron_h": {
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen2_sw": {"use_sliding_window": True, "layer_types": _HYBRID},
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
    },
    "recurrent_gemma": {"attention_window_size": WINDOW},
    "reformer": {
        "attention_head_size": HEAD_DIM,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": WIDE,
        "local_attn_chunk_length": 13,
        "lsh_attn_chunk_length": 13,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlnet": {"d_head": HEAD_DIM, "d_inner": None, "use_mems_train": False},
    "xlstm": {"mode": "train", "chunk_size": 8, "return_last_states": True},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
        "n_mamba_heads": 2,
    },
    "zamba2": {"chunk_size": 8, "mamba_headdim": 16, "head_dim": None, "attention_head_dim": None},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "albert": {"embedding_size": 32},
    "big_bird": {"attention_type": "original_full"},
    "big_bird_sparse": {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    "deberta": {"type_vocab_size": None},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "block_repeats": None, "num_decoder_layers": 1, "d_head": HEAD_DIM},
    "longformer": {"attention_window": [8, 8], "max_position_embeddings": 130},
    "mobilebert": {"intra_bottleneck_size": 32, "num_feedforward_networks": 1, "embedding_size": 32},
    "modernbert": {"local_attention": WINDOW, "global_attn_every_n_layers": 2},
    "roberta": {"max_position_embeddings": 130},
    "squeezebert": dict.fromkeys(_GROUPS, 1),
    "xlm-roberta": {"max_position_embeddings": 130},
}

_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "audio-spectrogram-transformer": {
        "max_length": 72,
        "num_mel_bins": 16,
        "frequency_stride": 8,
        "time_stride": 8,
    },
    "bigbird_pegasus": {"attention_type": "original_full"},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "hubert": _SPEECH,
    "led": {
        "attention_window": [8, 8],
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 128,
    },
    "parakeet_encoder": {
        "num_mel_bins": 16,
        "subsampling_conv_channels": 16,
        "conv_kernel_size": 5,
        "max_position_embeddings": 256,
    },
    "siglip2_vision_model": {"num_patches": 25},
    "swin": {
        "depths": [1, 1],
        "num_heads": [2, 4],
        "embed_dim": 32,
        "window_size": 4,
        "patch_size": 4,
        "image_size": 32,
    },
    "videomae": {"num_frames": 4, "tubelet_size": 2},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "wav2vec2": _SPEECH,
    "whisper": {
        "max_source_positions": 37,
        "max_target_positions": 128,
        "num_mel_bins": 16,
        "max_position_embeddings": None,
    },
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {**_DECODERS, **_ENCODERS, **_OTHERS}
