"""Small random-weight models of the transformers library, each built from its configuration."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.types import Inputs
from tests.zoo.case import Case, randomise_

__all__ = ["CASES"]

VOCAB = 80


def _awake_(model: nn.Module) -> nn.Module:
    """Give all weights of two and more dimensions a scale at which every part matters.

    The usual initialisation (0.02, or zeros for position tables) leaves attention uniform and
    positions without effect: mistakes there would not show.
    """
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and p.is_floating_point():
                gain = 2.0 if p.dim() == 4 else 1.0  # convolutions are followed by a ReLU
                p.normal_(0.0, (gain / p[0].numel()) ** 0.5)
    return model


def _case(
    name: str,
    model: str,
    inputs: Callable[[], dict[str, Tensor]],
    settings: dict[str, Any],
    *,
    config: str | None = None,
    outputs: tuple[str, ...] = ("logits",),
) -> Case:
    """A case that builds class `model` of transformers; `config` is derived from its name."""

    def build() -> tuple[nn.Module, Inputs]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        transformers = importlib.import_module("transformers")
        torch.manual_seed(0)
        config_class = getattr(transformers, config or model.split("For")[0] + "Config")
        net = getattr(transformers, model)(config_class(**settings))
        return randomise_(_awake_(net)), inputs()

    return Case(name, build, outputs)


def _ids(length: int = 7, seed: int = 1) -> Tensor:
    """Two rows of tokens, clear of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (2, length), generator=generator)


def _tokens() -> dict[str, Tensor]:
    """Tokens of two sentences, the second one padded."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _tokens_only() -> dict[str, Tensor]:
    return {"input_ids": _ids(6)}


def _two_sides() -> dict[str, Tensor]:
    """What an encoder and a decoder read."""
    return {**_tokens(), "decoder_input_ids": _ids(5, seed=2)}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 32, 32)}


def _big_image() -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 64, 64)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": _normal(2, 400)}


def _spectrogram() -> dict[str, Tensor]:
    return {"input_features": _normal(2, 16, 32), "decoder_input_ids": _ids(5)}


def _image_and_text() -> dict[str, Tensor]:
    return {**_tokens(), **_image()}


BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "num_labels": 5,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
EXPERTS: dict[str, Any] = {**GQA, "num_experts_per_tok": 2, "output_router_logits": False}
MIXTRAL: dict[str, Any] = {**EXPERTS, "num_local_experts": 4}
QWEN_MOE: dict[str, Any] = {
    **EXPERTS,
    "num_experts": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}

ENCODERS = [
    _case("hf_bert", "BertForSequenceClassification", _tokens, BERT),
    _case(
        "hf_bert_eager",
        "BertForSequenceClassification",
        _tokens,
        {**BERT, "attn_implementation": "eager"},
    ),
    _case("hf_bert_masked_lm", "BertForMaskedLM", _tokens, BERT),
    _case(
        "hf_distilbert",
        "DistilBertForSequenceClassification",
        _tokens,
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 16,
            "num_labels": 5,
        },
    ),
    _case("hf_roberta", "RobertaForSequenceClassification", _tokens, BERT),
    _case(
        "hf_albert",
        "AlbertForSequenceClassification",
        _tokens,
        {**BERT, "embedding_size": 24},
    ),
]

DECODERS = [
    _case(
        "hf_gpt2",
        "GPT2LMHeadModel",
        _tokens,
        {
            "vocab_size": VOCAB,
            "n_positions": 16,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        config="GPT2Config",
    ),
    _case(
        "hf_opt",
        "OPTForCausalLM",
        _tokens,
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 24,
            "use_cache": False,
        },
    ),
    _case(
        "hf_bloom",
        "BloomForCausalLM",
        _tokens,
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
        },
    ),
    _case("hf_llama", "LlamaForCausalLM", _tokens, LLAMA),
    _case("hf_llama_eager", "LlamaForCausalLM", _tokens, {**LLAMA, "attn_implementation": "eager"}),
    _case("hf_llama_gqa", "LlamaForCausalLM", _tokens, GQA),
    _case(
        "hf_llama_gqa_eager", "LlamaForCausalLM", _tokens, {**GQA, "attn_implementation": "eager"}
    ),
    _case("hf_llama_tied", "LlamaForCausalLM", _tokens, {**LLAMA, "tie_word_embeddings": True}),
    _case("hf_llama_no_mask", "LlamaForCausalLM", _tokens_only, GQA),
    _case("hf_mistral", "MistralForCausalLM", _tokens, {**GQA, "sliding_window": 4}),
    _case("hf_qwen2", "Qwen2ForCausalLM", _tokens, {**GQA, "hidden_size": 64}),
    _case("hf_qwen3", "Qwen3ForCausalLM", _tokens, GQA),
    _case(
        "hf_gemma2",
        "Gemma2ForCausalLM",
        _tokens,
        {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
    _case("hf_phi", "PhiForCausalLM", _tokens, {**LLAMA, "partial_rotary_factor": 0.5}),
    _case("hf_mixtral", "MixtralForCausalLM", _tokens, MIXTRAL),
    _case(
        "hf_mixtral_batched",
        "MixtralForCausalLM",
        _tokens,
        {**MIXTRAL, "experts_implementation": "batched_mm"},
    ),
    _case("hf_qwen2_moe", "Qwen2MoeForCausalLM", _tokens, QWEN_MOE),
    _case(
        "hf_qwen2_moe_batched",
        "Qwen2MoeForCausalLM",
        _tokens,
        {**QWEN_MOE, "experts_implementation": "batched_mm"},
    ),
    _case(
        "hf_mamba",
        "MambaForCausalLM",
        _tokens_only,
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
            "use_cache": False,
        },
    ),
]

ENCODER_DECODERS = [
    _case("hf_t5", "T5ForConditionalGeneration", _two_sides, T5),
    _case(
        "hf_t5_gated",
        "T5ForConditionalGeneration",
        _two_sides,
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    _case(
        "hf_bart",
        "BartForConditionalGeneration",
        _two_sides,
        {**SEQ2SEQ, "max_position_embeddings": 16},
    ),
    _case(
        "hf_whisper",
        "WhisperForConditionalGeneration",
        _spectrogram,
        {
            **SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "begin_suppress_tokens": None,
        },
    ),
]

IMAGES = [
    _case("hf_vit", "ViTForImageClassification", _image, VIT),
    _case("hf_deit", "DeiTForImageClassification", _image, VIT),
    _case(
        "hf_swin",
        "SwinForImageClassification",
        _image,
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [4, 8],
            "window_size": 4,
            "mlp_ratio": 2.0,
            "num_labels": 5,
        },
    ),
    _case(
        "hf_convnext",
        "ConvNextForImageClassification",
        _image,
        {
            "patch_size": 2,
            "hidden_sizes": [16, 24, 32, 48],
            "depths": [2, 1, 2, 1],
            "num_labels": 5,
        },
    ),
    _case(
        "hf_resnet",
        "ResNetForImageClassification",
        _image,
        {
            "embedding_size": 16,
            "hidden_sizes": [32, 64],
            "depths": [2, 2],
            "layer_type": "bottleneck",
            "num_labels": 5,
        },
    ),
    _case(
        "hf_resnet_basic",
        "ResNetForImageClassification",
        _image,
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [2, 2],
            "layer_type": "basic",
            "num_labels": 5,
        },
    ),
    _case(
        "hf_mobilenet_v2",
        "MobileNetV2ForImageClassification",
        _image,
        {"image_size": 32, "depth_multiplier": 0.25, "num_labels": 5},
    ),
    _case(
        "hf_regnet",
        "RegNetForImageClassification",
        _image,
        {
            "embedding_size": 16,
            "hidden_sizes": [32, 64],
            "depths": [2, 2],
            "groups_width": 8,
            "layer_type": "y",
            "num_labels": 5,
        },
    ),
    _case(
        "hf_segformer",
        "SegformerForSemanticSegmentation",
        _big_image,
        {
            "num_encoder_blocks": 4,
            "depths": [1, 1, 1, 1],
            "sr_ratios": [4, 2, 2, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [2, 4, 4, 8],
            "mlp_ratios": [2, 2, 2, 2],
            "decoder_hidden_size": 32,
            "num_labels": 5,
        },
    ),
]

AUDIO: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 24, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
    "num_labels": 5,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
OTHERS = [
    _case("hf_wav2vec2", "Wav2Vec2ForSequenceClassification", _wave, AUDIO),
    _case(
        "hf_wav2vec2_stable",
        "Wav2Vec2ForCTC",
        _wave,
        {**AUDIO, "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
    ),
    _case(
        "hf_clip",
        "CLIPModel",
        _image_and_text,
        {
            "text_config": {**BERT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": VIT,
            "projection_dim": 24,
        },
        config="CLIPConfig",
        outputs=("logits_per_image",),
    ),
]

CASES: list[Case] = [*ENCODERS, *DECODERS, *ENCODER_DECODERS, *IMAGES, *OTHERS]
