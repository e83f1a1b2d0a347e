"""Every architecture that transformers has a causal language model for, built tiny: a few layers, one of each kind, with small windows."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 61
MOST_PARAMETERS = 20_000_000

_WIDTH, _INNER, _LAYERS, _HEADS = 32, 48, 2, 4
# Whatever of these an architecture has
_SMALL = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), _INNER),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "ssm_state_size", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "moe_shared_expert_intermediate_size": 16,
    "num_key_value_heads": 2,
    "sliding_window": 5,
    "attention_chunk_size": 6,
}  # fmt: skip
_ALL_HEADS = {"num_key_value_heads": _HEADS}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_BY_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4,
             "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
_DECODER = {"is_decoder": True, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_OWN: dict[str, dict[str, object]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), _ALL_HEADS),
    **dict.fromkeys(("dots3_note_text", "kimi_linear"), _ALL_HEADS),
    **dict.fromkeys(("bamba", "granitemoehybrid"), _MAMBA),
    **dict.fromkeys(("bert", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer"), _DECODER),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod", "bert-generation"), _DECODER),
    "dory": {"layer_types": ["sliding_attention", "full_attention"] * 2, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "codegen": {"rotary_dim": 4},
    "emu3_text_model": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "mllama_text_model": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "cross_attention_layers": [1]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 6, "num_key_value_heads": 4, "attn_layer_period": 3, "attn_layer_offset": 2,
              "layer_types": ["mamba", "mamba", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16,
              "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 5, "num_key_value_heads": 4, "num_mem_blocks": 1, "attention_hidden_size": 64,
               "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1, 3], "attention_head_dim": 16,
               "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "use_mamba_kernels": False},
    "gptj": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8},
    "xlstm": {"mlstm_round_up_to_multiple_of": 8, "ffn_round_up_to_multiple_of": 8},
    "cwm": {"bos_token_id": 0, "eos_token_id": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "prophetnet": {"pad_token_id": 0, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 5, "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "zaya": {"num_experts_per_tok": 1},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0,
                           "local_attention": 10},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3n_text": {**_BY_LAYER, "intermediate_size": [48] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_BY_LAYER, "global_head_dim": 8, "num_global_key_value_heads": 2, "pad_token_id": 0},
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
# What an architecture's configuration can make of it
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "llama, llama3": ("llama", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, another activation": ("llama", {"hidden_act": "gelu"}),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3, windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mixtral, window": ("mixtral", {"sliding_window": 5}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 5}),
    "phi3, window": ("phi3", {"sliding_window": 5}),
    "phimoe, window": ("phimoe", {"sliding_window": 5}),
    "smollm3, layers without rotary positions": ("smollm3", {"no_rope_layers": [0, 1]}),
    "ministral3, scaled queries": ("ministral3", {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.4}}),
    "gpt2, by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2, upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm, normalised heads": ("stablelm", {"qk_layernorm": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "phi, normalised heads": ("phi", {"qk_layernorm": True}),
    "cohere, normalised heads": ("cohere", {"use_qk_norm": True}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "bloom, norms after": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "granite, factors": (
        "granite",
        {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
    "minimax_m3_vl_text, sparse": (
        "minimax_m3_vl_text",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "index_head_dim": 8,
            "index_n_heads": 2,
        },
    ),
    "deepseek_v32, few keys": ("deepseek_v32", {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}),
    "glm_moe_dsa, few keys": ("glm_moe_dsa", {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}),
    "llama4_text, scaled queries": (
        "llama4_text",
        {"attn_temperature_tuning": True, "floor_scale": 8, "no_rope_layers": [1, 0]},
    ),
    "bert, no decoder": ("bert", {"is_decoder": False}),
    "falcon, alibi and new": ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom, six heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "mpt, six heads": ("mpt", {"n_heads": 6, "d_model": 48, "no_bias": False, "attn_config": {"clip_qkv": 0.5}}),
    "gpt_oss, no windows": ("gpt_oss", {"layer_types": ["full_attention"] * 2}),
    "gemma3_text, full first": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3_text, both ways": ("gemma3_text", {"use_bidirectional_attention": True}),
    "cohere, scaled": ("cohere", {"logit_scale": 3.0}),
    "cohere2, scaled": ("cohere2", {"logit_scale": 3.0, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite, scaled": ("granite", {"logits_scaling": 3.0}),
    "llama, yarn with its own factor": (
        "llama",
        {"rope_parameters": {**_YARN, "factor": 16.0, "attention_factor": 1.3}},
    ),
    "llama, wide heads": ("llama", {"head_dim": 520, "hidden_size": 64}),
    "gpt2, short": ("gpt2", {"n_positions": 23}),
    "opt, short": ("opt", {"max_position_embeddings": 23}),
    "llama4_text, small chunks": ("llama4_text", {"attention_chunk_size": 4}),
}
NOT_ON_THE_STREAM = {
    **dict.fromkeys(("falcon, alibi", "falcon, new", "falcon, alibi and new"), "padded"),
    **dict.fromkeys(("minimax_m3_vl_text, sparse", "deepseek_v32, few keys", "glm_moe_dsa, few keys"), "padded"),
    **dict.fromkeys(("llama4_text, scaled queries", "llama4_text, small chunks"), "padded"),
    **dict.fromkeys(("bert, no decoder", "gemma3_text, both ways"), "refused"),
}


def tiny_config(architecture: str, **settings: object) -> PretrainedConfig:
    """A small configuration, with those inside it; `settings` go before what is chosen here."""
    return _tiny(CONFIG_MAPPING[architecture], architecture, settings)


def _tiny(kind: type[PretrainedConfig], architecture: str, settings: dict[str, object]) -> PretrainedConfig:
    default = kind()
    stated = default.to_dict()
    known = {*stated, *default.attribute_map}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    chosen = {name: value for name, value in _SMALL.items() if name in known or name in ids}
    if stated.get("sliding_window") is None and not stated.get("layer_types"):
        chosen.pop("sliding_window", None)
    if kinds := stated.get("layer_types"):
        kinds = list(dict.fromkeys(kinds))
        chosen["layer_types"] = kinds if len(kinds) > 1 else kinds * _LAYERS
    for name in getattr(kind, "sub_configs", {}):
        if isinstance(inner := getattr(default, name, None), PretrainedConfig):
            chosen[name] = _tiny(type(inner), inner.model_type, {}).to_dict()
    chosen |= _OWN.get(architecture, {}) | settings
    if "layer_types" in chosen and "layer_types" in known:
        count = len(chosen["layer_types"])
        chosen |= {name: count for name in ("num_hidden_layers", "num_layers", "n_layer") if name in chosen}
    return kind(**chosen)


def tiny_model(architecture: str, *, grown: bool = False, **settings: object) -> PreTrainedModel:
    """A model with fresh weights, the same each time, or with weights so large that everything in it matters."""
    config = tiny_config(architecture, **settings)
    with torch.device("meta"), torch.random.fork_rng():
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{architecture} is not tiny: {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float()
        if grown:
            with torch.no_grad():
                for parameter in model.parameters():
                    scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                    parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()
