"""What the names of a configuration's fields mean: the rules by which `shrink` makes it small."""

from __future__ import annotations

import re

__all__ = [
    "COUNTS",
    "DEPTH",
    "DEPTHS",
    "DROPOUT",
    "EXPERT",
    "HEADS",
    "HEAD_DIM",
    "INDICES",
    "LEFT_OUT",
    "MODEL_DIM",
    "TOKEN",
    "WIDTH",
]


def _named(*names: str) -> re.Pattern[str]:
    """Names as a whole; each may be a pattern."""
    return re.compile(rf"({'|'.join(names)})$")


# Fields that say nothing about the size, or that others follow from.
LEFT_OUT = {"architectures", "id2label", "label2id", "transformers_version", "dtype", "problem_type", "per_layer_config"}

# How many layers there are.
DEPTH = _named(
    r"num_(hidden_|encoder_|decoder_|block_|attention_|transformer_|conformer_|text_|cross_|shared_|resampler_)?layers",
    r"n_layers?|[ed]_layers|depth|depth_encoder|depth_decoder",
    r".*num_hidden_layers|num_.*_hidden_layers|.*_num_layers",
    r"(.*_)?(encoder|decoder)_layers",
    r"(vision|audio|text|speech|t2u|predictor|detector|resampler|perceiver|conf|[xlr])_(layers|depth)",
    r"(predictor|detector|decoder|encoder|resampler)_depth",
)
# The same as a list, one number for each stage.
DEPTHS = _named(
    r".*depths|depth|blocks_per_stage|layers_per_stage|encoder_blocks",
    r"num_blocks|stage_num_blocks|stage_numb_of_layers",
)
# Numbers of layers, in a list.
INDICES = re.compile(
    r"(out_indices|_indexes|_indices|_layer_ids|extract_layers|hook_ids|_idxs|_index_list|^out_layers|fusion_layers)$"
)

# How many heads there are, how wide one is, and how wide all are together.
HEADS = re.compile(r"(^|_)(n_heads?|num_heads|attention_heads|num_key_value_heads)(_|$)")
HEAD_DIM = re.compile(r"^(?!mamba).*?(head_dim|d_kv|d_head|dim_head|attention_head_size|kv_channels)$")
MODEL_DIM = _named(
    r"hidden_sizes?|d_model|n_embd|embed_dims?|embed_dim_per_stage|emb_dim|dim|hidden_dim",
    r"(encoder|decoder)_hidden_(size|dim)|decoder_embed_dim",
)
# Everything that is divided: what is no width (patches, vocabularies, groups) is named in the lookahead.
WIDTH = re.compile(
    r"^(?!.*(vocab|patch_size|image_size|codebook_size|base_channels|latent_channels|num_|quantiz|n_group))"
    r"(?!(in|num|input|image)_channels$)"
    r"(.*_)?((d_model|n_embd|d_ff|d_kv|n_inner|d_head|d_inner|d_embed|emb_dim|d_latents|dims?|dim_head|channels?|features?|width|rank|units"
    r"|(hidden|embedding|intermediate|ffn|inner|output|latent|channel)_sizes?|hidden_size_global|embed_dims|channel_list"
    r"|embed_dim_per_stage|query_pre_attn_scalar)$"
    r"|(hidden|embed|embedding|ffn|proj|projection|inner|intermediate|model|attention|entity_emb|bottleneck|d)_(size|dim)s?(_|$))"
)
# Widths inside a feed-forward network: products of groups want rows of 16 bytes.
EXPERT = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size")

# What is counted, and how much of it is enough.
COUNTS: dict[re.Pattern[str], int] = {
    _named(r"(num|n)_(local_|routed_|shared_)?experts|moe_num_experts"): 4,
    _named(r"(num_)?experts_per_tok(en)?|moe_(k|topk|top_k)|(moe_)?top_?k|num_selected_experts"): 2,
    _named(r"n_shared_experts|n_group|topk_group|num_expert_group|first_k_dense_replace"): 1,
    _named(r"num_kv_shared_layers|zero_expert_num"): 2,
    _named(r"n_filters|num_filters"): 8,
    _named(r"(mamba_)?chunk_size"): 16,
    _named(r"encoder_hash_byte_group_vocab"): 500,
    _named(r"max_position_embeddings|n_positions|max_seq_len(gth)?|max_sequence_length|seq_length|max_length"): 512,
    _named(r"max_(source|target)_positions"): 128,
    _named(r"num_queries|num_query_tokens|num_object_queries|num_latents|resampler_n_latents"): 7,
    _named(r"sliding_window|local_attention|attention_window_size|attention_chunk_size|window_attention_size"): 16,
}

# Chance, by whatever name: what is compared may not be drawn twice.
DROPOUT = re.compile(r"drop|mask_time_prob|mask_feature_prob|apply_spec_augment|router_jitter|mask_ratio")

# Numbers of special tokens.
TOKEN = re.compile(r"(token_id|token_index|tokens_id|_index|_token)$")
