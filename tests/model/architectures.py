"""The architectures of transformers that are served, each as a tiny model of four layers, and those refused.

tests/ranks/test_architectures.py runs the served ones over grids of ranks, test_refusals.py loads the refused
ones, scripts/coverage_table.py makes docs/models.md of both tests' results.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from tiny_models import ADAPTED, build
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FOUR = {"num_hidden_layers": 4}
WINDOW = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2} | WINDOW
WIDE_HEADS = {"head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 512}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
TEXT = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

# name -> (model_type, what differs from tiny_models.build's configuration)
SERVED: dict[str, tuple[str, dict]] = {
    "afmoe": ("afmoe", WIDE_HEADS | EXPERTS | {"num_shared_experts": 1, "num_dense_layers": 1} | MIXED),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", WIDE_HEADS),
    "aria_text": ("aria_text", WIDE_HEADS | {
        "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1,
    }),
    "axk1": ("axk1", ROUTED | LATENT),
    "beam": ("beam", WIDE_HEADS | EXPERTS | MIXED | {"n_group": 2, "topk_group": 1}),
    "bert": ("bert", {"is_decoder": True}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "bloom": ADAPTED["bloom"],
    "cohere": ("cohere", {}),
    "cohere_qk_norm": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", MIXED),
    "cohere2_moe": ("cohere2_moe", EXPERTS | MIXED),
    "cohere_compass_text": ("cohere_compass_text", MIXED | {
        "rope_parameters": {
            kind: ROPE["rope_parameters"] | {"mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    }),
    "cwm": ("cwm", WIDE_HEADS | MIXED),
    "ctrl": ("ctrl", {"dff": 96}),
    "dbrx": ("dbrx", {
        "d_model": 64, "n_heads": 8, "n_layers": 4, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    }),
    "deepseek_v2": ("deepseek_v2", ROUTED | LATENT | {"topk_method": "greedy"}),
    "deepseek_v2_lite": ("deepseek_v2", ROUTED | LATENT | {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", ROUTED | LATENT | {"n_routed_experts": 8, "n_group": 2}),
    "dots1": ("dots1", WIDE_HEADS | ROUTED | {"layer_types": ["full_attention"] * 4}),
    "electra": ("electra", {"is_decoder": True, "embedding_size": 64}),
    "ernie4_5": ("ernie4_5", WIDE_HEADS),
    "ernie4_5_moe": ("ernie4_5_moe", {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1,
    }),
    "exaone4": ("exaone4", MIXED),
    "exaone_moe": ("exaone_moe", WIDE_HEADS | EXPERTS | ROUTED | MIXED),
    "falcon_7b": ADAPTED["falcon_7b"],
    "falcon_40b": ADAPTED["falcon_40b"],
    "falcon_rw": ADAPTED["falcon_rw"],
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "flint": ("flint", WIDE_HEADS | EXPERTS | MIXED),
    "fuyu": ("fuyu", {"text_config": {"model_type": "persimmon"} | TEXT}),
    "gemma": ("gemma", WIDE_HEADS),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {
        "text_config": TEXT | WIDE_HEADS | {"query_pre_attn_scalar": 24} | MIXED,
        "vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
        "image_token_index": 159, "boi_token_index": 158, "eoi_token_index": 157,
    }),
    "gemma3_text": ("gemma3_text", WIDE_HEADS | {"query_pre_attn_scalar": 24} | MIXED),
    "gemma3n_text": ("gemma3n_text", WIDE_HEADS | MIXED | {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 160,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    }),
    "gemma4": ("gemma4", {
        "text_config": TEXT | WIDE_HEADS | MIXED | {
            "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 160,
        },
        "vision_config": VISION, "audio_config": None,
    }),
    "gemma4_text": ("gemma4_text", WIDE_HEADS | MIXED | {
        "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 160,
    }),
    "gemma4_unified_text": ("gemma4_unified_text", WIDE_HEADS | MIXED | {"global_head_dim": 16}),
    "glm": ("glm", WIDE_HEADS),
    "glm4": ("glm4", WIDE_HEADS),
    "glm4_moe": ("glm4_moe", WIDE_HEADS | ROUTED),
    "glm4_moe_lite": ("glm4_moe_lite", ROUTED | LATENT),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode_multi_head": ("gpt_bigcode", GPT | {"multi_query": False}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "gpt_oss": ("gpt_oss", {}),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "granite": ("granite", {
        "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }),
    "granite_swa": ("granite_swa", MIXED),
    "granitemoe": ("granitemoe", LOCAL_EXPERTS | {"attention_multiplier": 0.2}),
    "granitemoe_swa": ("granitemoe_swa", LOCAL_EXPERTS | MIXED),
    "granitemoeshared": ("granitemoeshared", LOCAL_EXPERTS | {"shared_intermediate_size": 48}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE_HEADS),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", WIDE_HEADS | {"num_experts": 4, "moe_topk": 2}),
    "hy_v3": ("hy_v3", WIDE_HEADS | EXPERTS | {"num_shared_experts": 1, "first_k_dense_replace": 1}),
    "hyperclovax": ("hyperclovax", WIDE_HEADS),
    "jais2": ("jais2", {}),
    "jetmoe": ("jetmoe", LOCAL_EXPERTS | {"kv_channels": 16}),
    "kolibri1": ("kolibri1", WIDE_HEADS | EXPERTS | MIXED),
    "laguna": ("laguna", WIDE_HEADS | EXPERTS | {"shared_expert_intermediate_size": 48} | MIXED),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama4_text": ("llama4_text", WIDE_HEADS | LOCAL_EXPERTS | ROPE | {
        "intermediate_size_mlp": 96, "num_experts_per_tok": 1, "attention_chunk_size": 8,
        "moe_layers": [1, 3],
    }),
    "longcat_flash": ("longcat_flash", ROUTED | LATENT | {
        "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "moe_topk": 2,
        "zero_expert_num": 2, "head_dim": 8,
    }),
    "mellum": ("mellum", WIDE_HEADS | EXPERTS | MIXED),
    "mimo_v2_flash": ("mimo_v2_flash", WIDE_HEADS | EXPERTS | ROUTED | MIXED),
    "minicpm3": ("minicpm3", LATENT),
    "minimax_m2": ("minimax_m2", WIDE_HEADS | LOCAL_EXPERTS),
    "minimax_m3_vl_text": ("minimax_m3_vl_text", WIDE_HEADS | LOCAL_EXPERTS | {
        "layer_types": ["full_attention"] * 4, "dense_intermediate_size": 96,
    }),
    "ministral": ("ministral", WIDE_HEADS | MIXED),
    "ministral3": ("ministral3", WIDE_HEADS),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", LOCAL_EXPERTS | WINDOW),
    "modernbert-decoder": ("modernbert-decoder", MIXED),
    "moshi": ("moshi", {"ffn_dim": 96}),
    "moss_transcribe_diarize": ("moss_transcribe_diarize", {
        "text_config": TEXT | WIDE_HEADS | {"model_type": "qwen3"},
        "audio_config": {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
        },
    }),
    "mpt": ("mpt", ADAPTED["mpt"][1] | {"n_layers": 4}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", WINDOW),
    "phi4_multimodal": ("phi4_multimodal", {
        "vision_config": VISION,
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2,
        },
    }),
    "phimoe": ("phimoe", LOCAL_EXPERTS | WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen2_mixed": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2} | WINDOW),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3": ("qwen3", WIDE_HEADS),
    "qwen3_moe": ("qwen3_moe", WIDE_HEADS | EXPERTS),
    "seed_oss": ("seed_oss", WIDE_HEADS),
    "smollm3": ("smollm3", {}),
    "solar_open": ("solar_open", WIDE_HEADS | ROUTED),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", WINDOW),
    "vaultgemma": ("vaultgemma", WIDE_HEADS | MIXED),
    "whisper": ("whisper", {
        "d_model": 64, "decoder_layers": 4, "decoder_attention_heads": 8, "decoder_ffn_dim": 96,
        "encoder_layers": 1, "encoder_attention_heads": 8, "encoder_ffn_dim": 96,
    }),
    "youtu": ("youtu", LATENT),
}  # fmt: skip

# What of SERVED is refused over shards or stages -> a word of the sentence.
TOO_WHOLE_FOR_SHARDS = {
    "afmoe": "self_attn.gate_proj",
    "beam": "self_attn.gate_proj",
    "bert": "attention.self.query",
    "bitnet": "attn_sub_norm",
    "ctrl": "multi_head_attention.Wq",
    "electra": "attention.self.query",
    "ernie4_5_moe": "e_score_correction_bias",
    "granitemoeshared": "shared_mlp.input_linear",
    "hunyuan_v1_moe": "mlp.gate.wg",
    "jetmoe": "self_attention.kv_proj",
    "laguna": "self_attn.g_proj",
    "longcat_flash": "no list of 4 decoder layers",
    "modernbert-decoder": "no list of 4 decoder layers",
    "moshi": "self_attn.q_proj.linear",
    "whisper": "encoder_attn.k_proj",
}
TOO_WHOLE_FOR_STAGES = {
    "ctrl": "hidden states alone",
    "gemma3n_text": "per_layer_model_projection",
    "gemma4": "per_layer_model_projection",
    "gemma4_text": "per_layer_model_projection",
    "longcat_flash": "no list of 4 decoder layers",
    "modernbert-decoder": "no list of 4 decoder layers",
    "phi4_multimodal": "embed_tokens_extend",
}

LINEAR = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
INDEXED = ROUTED | LATENT | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "head_dim": 8}
BART = {
    "d_model": 64, "decoder_layers": 4, "decoder_attention_heads": 8, "decoder_ffn_dim": 96,
    "encoder_layers": 4, "encoder_attention_heads": 8, "encoder_ffn_dim": 96,
}  # fmt: skip
MAMBA = {"state_size": 8, "expand": 2}
STATE, INTERFACE, BOTH_WAYS = "recurrent state", "AttentionInterface", "bidirectional"

# name -> (model_type, what differs, words of the sentence)
REFUSED: dict[str, tuple[str, dict, str]] = {
    "axk2": ("axk2", INDEXED, "layers of type"),
    "bailing_hybrid": ("bailing_hybrid", WIDE_HEADS | EXPERTS | {"n_group": 1, "topk_group": 1}, STATE),
    "bamba": ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}, STATE),
    "bart": ("bart", BART, BOTH_WAYS),
    "bert_encoder": ("bert", {}, "causal"),
    "big_bird": ("big_bird", {"is_decoder": True}, INTERFACE),
    "bigbird_pegasus": ("bigbird_pegasus", BART, BOTH_WAYS),
    "blenderbot": ("blenderbot", BART, BOTH_WAYS),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}, INTERFACE),
    "cpmant": ("cpmant", {"dim_head": 8, "dim_ff": 96}, INTERFACE),
    "deepseek_v32": ("deepseek_v32", INDEXED, "layers of type"),
    "deepseek_v4": ("deepseek_v4", WIDE_HEADS | ROUTED | LATENT, STATE),
    "diffllama": ("diffllama", {}, "must call attention once"),
    "doge": ("doge", WINDOW, "makes no mask"),
    "falcon_mamba": ("falcon_mamba", MAMBA, STATE),
    "git": ("git", {"vision_config": VISION}, "must call attention once"),
    "glm_moe_dsa": ("glm_moe_dsa", INDEXED, "layers of type"),
    "got_ocr2": ("got_ocr2", {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "mlp_dim": 32, "global_attn_indexes": [1],
        },
    }, INTERFACE),
    "gpt_neo": ("gpt_neo", {
        "num_layers": 4, "num_heads": 8, "attention_types": [[["global", "local"], 2]], "window_size": 8,
    }, INTERFACE),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}, INTERFACE),
    "granitemoehybrid": ("granitemoehybrid", LOCAL_EXPERTS | {
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
    }, STATE),
    "hrm_text": ("hrm_text", {}, "must call attention once"),
    "hy_v4": ("hy_v4", WIDE_HEADS | EXPERTS | ROUTED | LATENT, "layers of type"),
    "inkling_text": ("inkling_text", WIDE_HEADS, "hybrid_sliding"),
    "jamba": ("jamba", {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8}, STATE),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "conv"),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention"] * 2}, "conv"),
    "mamba": ("mamba", MAMBA, STATE),
    "mamba2": ("mamba2", MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 1}, STATE),
    "marian": ("marian", BART, BOTH_WAYS),
    "mbart": ("mbart", BART, BOTH_WAYS),
    "megatron-bert": ("megatron-bert", {"is_decoder": True}, INTERFACE),
    "minimax": ("minimax", WIDE_HEADS | LOCAL_EXPERTS | LINEAR, "linear_attention"),
    "mvp": ("mvp", BART, INTERFACE),
    "nemotron_h": ("nemotron_h", {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8}, STATE),
    "olmo_hybrid": ("olmo_hybrid", LINEAR, STATE),
    "openai-gpt": ("openai-gpt", GPT, INTERFACE),
    "pegasus": ("pegasus", BART, BOTH_WAYS),
    "plbart": ("plbart", BART, BOTH_WAYS),
    "qwen3_5_text": ("qwen3_5_text", WIDE_HEADS | LINEAR, STATE),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", WIDE_HEADS | EXPERTS | LINEAR, STATE),
    "qwen3_next": ("qwen3_next", WIDE_HEADS | EXPERTS | LINEAR, STATE),
    "recurrent_gemma": ("recurrent_gemma", {}, STATE),
    "rembert": ("rembert", {"is_decoder": True}, INTERFACE),
    "roformer": ("roformer", {"is_decoder": True}, INTERFACE),
    "rwkv": ("rwkv", {}, INTERFACE),
    "t5": ("t5", {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_heads": 8}, "encoder-decoder"),
    "trocr": ("trocr", BART, INTERFACE),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 4, "attention_heads": 8, "ffn_dim": 96}, INTERFACE),
    "xlm": ("xlm", {"emb_dim": 64, "n_layers": 4, "n_heads": 8}, INTERFACE),
    "zaya": ("zaya", WIDE_HEADS | {"num_experts": 4, "num_experts_per_tok": 1}, STATE),
}  # fmt: skip
ONE_OF_EACH = [
    "bart", "bert_encoder", "deepseek_v32", "diffllama", "doge", "gpt_neo", "lfm2", "mamba", "qwen3_next",
    "t5",
]  # fmt: skip


def is_known(name: str) -> bool:
    """Whether the installed transformers has the architecture of SERVED or REFUSED by that name.

    5.17's Moshi is left out: where it is given no mask it lets tokens see later ones, and is refused at load.
    """
    if name == "moshi" and Version(transformers.__version__) < Version("5.23"):
        return False
    return (SERVED.get(name) or REFUSED[name])[0] in CONFIG_MAPPING


def tiny(name: str):
    """The model of SERVED or REFUSED by that name, in fp32."""
    model_type, overrides, *_ = SERVED.get(name) or REFUSED[name]
    if name == "t5":
        return T5ForConditionalGeneration(T5Config(vocab_size=160, **overrides))
    return build(model_type, **FOUR | overrides)


def refused_on(name: str, tp: int, pp: int) -> str | None:
    """A word of the sentence that refuses SERVED's name on a grid of tp x pp; None where it runs."""
    shards = TOO_WHOLE_FOR_SHARDS.get(name) if tp > 1 else None
    return shards or (TOO_WHOLE_FOR_STAGES.get(name) if pp > 1 else None)
