"""Small models of transformers: every class that can be patched, and every class that is refused for a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import transformers

SIZE = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32}
SMALL = SIZE | {"image_size": 48, "patch_size": 8}
WIDE = SMALL | {"intermediate_size": 64}
TEXT = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
MARKED_TEXT = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REGISTERS = SMALL | {"num_register_tokens": 3, "layerscale_value": 0.5}
ROTARY = WIDE | {"num_register_tokens": 3, "layerscale_value": 0.5, "pos_embed_rescale": None}  # none drawn at random
VIDEO = SIZE | {
    "image_size": 24, "patch_size": 8, "num_frames": 8, "tubelet_size": 2, "intermediate_size": 64, "qkv_bias": True,
    "decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_intermediate_size": 64,
    "decoder_num_attention_heads": 2,
}  # fmt: skip
NAFLEX = SIZE | {"intermediate_size": 64, "patch_size": 4, "num_patches": 16}
LLAVA = {
    "text_config": {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64} | TEXT,
    "vision_config": {"model_type": "clip_vision_model"} | WIDE,
    "image_token_index": 49, "image_seq_length": 36, "vision_feature_layer": -2,
}  # fmt: skip
TIMM = {
    "architecture": "vit_tiny_patch16_224", "num_labels": 3,
    "model_args": {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}  # fmt: skip
PADDING = 32  # of 64 patches of the second image


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))}


def masked_images() -> dict[str, torch.Tensor]:
    """Which patches are hidden is drawn, unless the noise is given."""
    return images() | {"noise": torch.rand(2, 36, generator=torch.Generator().manual_seed(3))}


def video() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 8, 3, 24, 24, generator=torch.Generator().manual_seed(2))}


def masked_video() -> dict[str, torch.Tensor]:
    hidden = torch.zeros(2, 36, dtype=torch.bool)
    hidden[0, ::3] = hidden[1, 1::3] = True
    return video() | {"bool_masked_pos": hidden}


def patches() -> dict[str, torch.Tensor]:
    """Of an image of 8 x 8 patches and one of 4 x 8."""
    pixels = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 64 - PADDING :] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[8, 8], [4, 8]])}


def words() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 9, 2], [1, 7, 2, 0]])}


def placeholders() -> dict[str, torch.Tensor]:
    return images() | {"input_ids": torch.tensor([[1, *[49] * 36, 5, 6]] * 2)}


class Case(NamedTuple):
    """A class of models, by its name in transformers, and how to make and call a small one."""

    kind: str
    config: str
    settings: dict[str, Any]
    prefix: int  # protected tokens
    inputs: Callable[[], dict[str, torch.Tensor]] = images


# Vision towers, alone or with a head, whose last layer gives what a test can compute by hand.
HOSTS = {
    "vit": Case("ViTForImageClassification", "ViTConfig", WIDE, 1),
    "deit": Case("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE, 2),
    "ijepa": Case("IJepaForImageClassification", "IJepaConfig", WIDE, 0),
    "dinov2": Case("Dinov2ForImageClassification", "Dinov2Config", SMALL | {"layerscale_value": 0.5}, 1),
    "dinov2 swiglu": Case("Dinov2Model", "Dinov2Config", SMALL | {"use_swiglu_ffn": True}, 1),
    "dinov2 registers": Case("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", REGISTERS, 4),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", ROTARY, 4),
    "dinov3 swiglu": Case(
        "DINOv3ViTModel", "DINOv3ViTConfig", ROTARY | {"use_gated_mlp": True, "hidden_act": "silu"}, 4
    ),
    "clip": Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE | {"projection_dim": 16}, 1),
    "clip gelu": Case("CLIPVisionModel", "CLIPVisionConfig", WIDE | {"hidden_act": "gelu"}, 1),
    "siglip": Case("SiglipVisionModel", "SiglipVisionConfig", WIDE, 0),
    "siglip2": Case("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX, 0, patches),
    "siglip2 mean": Case(
        "Siglip2ForImageClassification", "Siglip2Config", {"text_config": TEXT, "vision_config": NAFLEX}, 0, patches
    ),
    "mae": Case("ViTMAEModel", "ViTMAEConfig", WIDE | {"mask_ratio": 0.25}, 1, masked_images),
    "videomae": Case("VideoMAEForVideoClassification", "VideoMAEConfig", VIDEO, 0, video),
    "videomae masked": Case("VideoMAEModel", "VideoMAEConfig", VIDEO, 0, masked_video),
}
PAIR = {"text_config": MARKED_TEXT, "vision_config": WIDE}
# Models around such a tower.
AROUND = {
    "mae decoder": Case("ViTMAEForPreTraining", "ViTMAEConfig", WIDE, 1, masked_images),
    "videomae decoder": Case("VideoMAEForPreTraining", "VideoMAEConfig", VIDEO, 0, masked_video),
    "dinov2 grids": Case("Dinov2Backbone", "Dinov2Config", SMALL | {"out_indices": [2, 4]}, 1),
    "dinov2 registers grids": Case(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", REGISTERS | {"out_indices": [2, 4]}, 4
    ),
    "dinov3 grids": Case("DINOv3ViTBackbone", "DINOv3ViTConfig", ROTARY | {"out_indices": [2, 4]}, 4),
    "clip pair": Case("CLIPModel", "CLIPConfig", PAIR, 1, lambda: images() | words()),
    "siglip pair": Case("SiglipModel", "SiglipConfig", PAIR, 0, lambda: images() | words()),
    "siglip2 pair": Case(
        "Siglip2Model", "Siglip2Config", PAIR | {"vision_config": NAFLEX}, 0, lambda: patches() | words()
    ),
    "llava": Case("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, 1, placeholders),
    "timm": Case("TimmWrapperModel", "TimmWrapperConfig", TIMM, 1),
    "timm classifier": Case("TimmWrapperForImageClassification", "TimmWrapperConfig", TIMM, 1),
}
SUPPORTED = HOSTS | AROUND

STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
PYRAMID = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 4}
# name -> (class, configuration, settings, what the refusal says)
REFUSED = {
    "sam": (
        "SamVisionModel",
        "SamVisionConfig",
        SMALL | {"global_attn_indexes": [1], "mlp_dim": 64},
        "SamVisionLayer attends within windows",
    ),
    "sam 2": (
        "Sam2HieraDetModel",
        "Sam2HieraDetConfig",
        {
            "hidden_size": 8,
            "num_attention_heads": 1,
            "blocks_per_stage": [1, 1, 1, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 1, 1],
            "image_size": [64, 64],
            "global_attention_blocks": [3],
        },
        "Sam2MultiScaleBlock attends within windows.*stages",
    ),
    "swin": ("SwinModel", "SwinConfig", STAGES, "SwinLayer attends within windows.*stages"),
    "swin v2": ("Swinv2ForImageClassification", "Swinv2Config", STAGES, "Swinv2Layer attends within windows.*stages"),
    "donut": ("DonutSwinModel", "DonutSwinConfig", STAGES, "DonutSwinLayer attends within windows.*stages"),
    "vitdet": (
        "VitDetModel",
        "VitDetConfig",
        SMALL | {"window_block_indices": [0], "window_size": 3},
        "VitDetLayer attends within windows",
    ),
    "hiera": (
        "HieraModel",
        "HieraConfig",
        {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1},
        "HieraLayer stands in stages",
    ),
    "pvt": (
        "PvtModel",
        "PvtConfig",
        {
            "image_size": 32,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "PvtLayer stands in stages",
    ),
    "segformer": (
        "SegformerModel",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "SegformerLayer stands in stages",
    ),
    "cvt": (
        "CvtModel",
        "CvtConfig",
        {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 1, 1]},
        "CvtLayer stands in stages",
    ),
    "qwen 2 vl": (
        "Qwen2VisionTransformerPretrainedModel",
        "qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        "Qwen2VLVisionBlock takes the tokens of several images as one sequence",
    ),
    "qwen 2.5 vl": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        "qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
        QWEN,
        "Qwen2_5_VLVisionBlock attends within windows.*one sequence",
    ),
    "qwen 3 vl": (
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        "Qwen3VLVisionBlock takes the tokens of several images as one sequence",
    ),
    "pixtral": (
        "PixtralVisionModel",
        "PixtralVisionConfig",
        WIDE,
        "PixtralAttentionLayer takes the tokens of several images as one sequence",
    ),
    "beit": ("BeitModel", "BeitConfig", WIDE, "BeitLayer adds a bias"),
    "data2vec": ("Data2VecVisionModel", "Data2VecVisionConfig", WIDE, "Data2VecVisionLayer adds a bias"),
    "timesformer": ("TimesformerModel", "TimesformerConfig", WIDE, "TimesformerLayer attends along space and time"),
    "convnext": ("ConvNextModel", "ConvNextConfig", PYRAMID, "ConvNextLayer convolves"),
    "convnext v2": ("ConvNextV2Model", "ConvNextV2Config", PYRAMID, "ConvNextV2Layer convolves"),
    "dinov3 convnext": (
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
        "DINOv3ConvNextLayer convolves",
    ),
    "bert": ("BertModel", "BertConfig", TEXT, "BertModel must hold one of .*CLIPVisionModel.*found 0$"),
}


def build(kind: str, config: str, settings: dict[str, Any], attn: str = "eager") -> Any:
    """The model of that class, with the weights that it begins with; a config that is not public with its module."""
    module, _, name = config.rpartition(".")
    home = import_module(f"transformers.models.{module}") if module else transformers
    made = getattr(home, name)(**copy.deepcopy(settings), attn_implementation=attn)
    home = transformers if hasattr(transformers, kind) else import_module(modeling(made))
    return getattr(home, kind)(made)


def modeling(config: Any) -> str:
    """The module of the models that a configuration is for."""
    return type(config).__module__.replace("configuration", "modeling")


def make(name: str, attn: str = "sdpa", **changed: Any) -> Any:
    """A supported model in eval mode, with weights that make its tokens differ."""
    kind, config, settings, *_ = SUPPORTED[name]
    torch.manual_seed(0)
    return shaken(build(kind, config, settings | changed, attn))


def make_refused(name: str) -> tuple[Any, str]:
    """A model that is refused, and what the refusal says, as a regular expression."""
    *made_of, reason = REFUSED[name]
    return build(*made_of).eval(), reason


def shaken(model: Any) -> Any:
    """In eval mode, with weights that make its tokens differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What a supported model is called with."""
    kind = type(getattr(model, "_orig_mod", model)).__name__
    return next(case.inputs for case in SUPPORTED.values() if case.kind == kind)()


def run(model: Any, **kwargs: Any) -> Any:
    """What a supported model makes of its inputs."""
    return model(**inputs_of(model) | kwargs)
