"""Why models of timm that are no plain Vision Transformers have no tokens to merge."""

from __future__ import annotations

# Of each kind the classes in timm.models, from the kind's most particular trait.
KINDS = {
    "its attention looks at windows or blocks of the grid, which needs every token in its place":
        "SwinTransformer SwinTransformerV2 SwinTransformerV2Cr VisionTransformerSAM DaVit GlobalContextVit MaxxVit "
        "Nest TinyVit Twins VOLO Hiera HieraDet",
    "its tokens are pooled between stages, which needs the grid":
        "MultiScaleVit PoolingVisionTransformer PyramidVisionTransformerV2 Levit LevitDistilled Visformer CoaT",
    "its attention is over channels, and convolutions between its tokens need the grid":
        "Xcit",
    "it has several sequences of tokens, which exchange theirs":
        "CrossVit TNT",
    "its attention reads the distance between any two places of the grid":
        "ConVit",
    "its layers mix the tokens by their places, and are made for a number of them":
        "MlpMixer Sequencer2d",
    "it is convolutional in most of its stages, which need the grid":
        "EdgeNeXt NextViT EfficientFormer EfficientFormerV2 EfficientVit EfficientVitLarge EfficientVitMsra "
        "FastVit MetaFormer MobileNetV5 MobileNetV5Encoder SHViT SwiftFormer LowFormer CPUBone CSATv2 EfficientViM "
        "EfficientViMDistilled IFormer",
    "it is convolutional":
        "ByobNet ConvMixer ConvNeXt CspNet CspNext DenseNet DLA DPN EfficientNet FasterNet FocalNet GhostNet "
        "HighPerfGpuNet HighResolutionNet MetaNeXt InceptionResnetV2 InceptionV3 InceptionV4 LCNetV2 MambaOut "
        "MobileNetV3 NASNetALarge NormFreeNet PNASNet5Large RDNet RegNet RepGhostNet RepVit ResNet ResNetV2 RexNet "
        "SelecSls SENet StarNet TResNet VGG VovNet Xception XceptionAligned",
}  # fmt: skip
REASONS = {name: kind for kind, names in KINDS.items() for name in names.split()}


def reason(model: type) -> str | None:
    """Why a class of timm's models, or the one that it is derived from, cannot be patched, where that is known."""
    names = (kind.__name__ for kind in model.__mro__ if kind.__module__.startswith("timm.models."))
    return next((REASONS[name] for name in names if name in REASONS), None)
