"""What merging cannot do to some of transformers' vision models, by the layer that makes it so."""

from __future__ import annotations

from torch import nn

from tome.patch.swap import name_of

WINDOWS = "attends within windows of a grid, from which no token can be missing"
STAGES = "stands in stages, between which neighbouring tokens are pooled"
PACKED = "takes the tokens of several images as one sequence, and groups of neighbours are joined behind it"
BIAS = "adds a bias for each pair of places to its scores"
CONVOLUTIONS = "convolves, and has no tokens that attend to each other"
AXES = "attends along space and time in turn"

REFUSED = {
    "sam.modeling_sam.SamVisionLayer": WINDOWS,
    "sam_hq.modeling_sam_hq.SamHQVisionLayer": WINDOWS,
    "sam2.modeling_sam2.Sam2MultiScaleBlock": f"{WINDOWS}, and {STAGES}",
    "sam3.modeling_sam3.Sam3ViTLayer": WINDOWS,
    "vitdet.modeling_vitdet.VitDetLayer": WINDOWS,
    "swin.modeling_swin.SwinLayer": f"{WINDOWS}, and {STAGES}",
    "swinv2.modeling_swinv2.Swinv2Layer": f"{WINDOWS}, and {STAGES}",
    "donut.modeling_donut_swin.DonutSwinLayer": f"{WINDOWS}, and {STAGES}",
    "maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": f"{WINDOWS}, and {STAGES}",
    "hiera.modeling_hiera.HieraLayer": STAGES,
    "pvt.modeling_pvt.PvtLayer": STAGES,
    "segformer.modeling_segformer.SegformerLayer": STAGES,
    "cvt.modeling_cvt.CvtLayer": STAGES,
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLVisionBlock": PACKED,
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock": f"{WINDOWS}, and {PACKED}",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionBlock": PACKED,
    "pixtral.modeling_pixtral.PixtralAttentionLayer": "takes the tokens of several images as one sequence",
    "beit.modeling_beit.BeitLayer": BIAS,
    "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": BIAS,
    "timesformer.modeling_timesformer.TimesformerLayer": AXES,
    "convnext.modeling_convnext.ConvNextLayer": CONVOLUTIONS,
    "convnextv2.modeling_convnextv2.ConvNextV2Layer": CONVOLUTIONS,
    "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayer": CONVOLUTIONS,
}


def why_refused(model: nn.Module) -> str | None:
    """The first layer of the model that merging cannot work with, and the reason; None where none is known."""
    for path, module in model.named_modules():
        kind = type(module)
        reason = REFUSED.get(name_of(kind, "transformers.models."))
        if reason is not None:
            return f"{path}: {kind.__name__} {reason}"
    return None
