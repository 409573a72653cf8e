"""Small stand-ins for models whose code may not be read here: the names and shapes that are known of them, no more."""

import torch
from timm.models import vision_transformer
from torch import nn


class EncoderBlock(nn.Module):
    """Of tokens [N, B, C]."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.dropout(self.self_attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, length, depth, width, heads, dropout):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(length, 1, width))
        self.layers = nn.Sequential(*(EncoderBlock(width, heads, dropout) for _ in range(depth)))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.ln(self.layers(x + self.pos_embedding))


class Swag(nn.Module):
    def __init__(self, classifier="token", depth=4, width=32, heads=2, dropout=0.0):
        super().__init__()
        self.image_size, self.classifier = 48, classifier
        self.conv_proj = nn.Conv2d(3, width, 8, 8)
        if classifier == "token":
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(36 + (classifier == "token"), depth, width, heads, dropout)
        self.head = nn.Linear(width, 7)

    def forward(self, images):
        x = self.conv_proj(images).flatten(2).permute(2, 0, 1)
        if self.classifier == "token":
            x = torch.cat([self.class_token.expand(-1, x.shape[1], -1), x])
        x = self.encoder(x)
        return self.head(x[0] if self.classifier == "token" else x.mean(0))


class Mae(vision_transformer.VisionTransformer):
    """With a loop of its own over the blocks, and a pooling that timm knows nothing of."""

    def __init__(self, global_pool=False, **kwargs):
        super().__init__(**kwargs)
        self.global_pool = global_pool
        if global_pool:
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
            del self.norm

    def forward_features(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]

    def forward(self, x):
        return self.head(self.forward_features(x))


for _kind in (Swag, Mae):
    _kind.__name__ = "VisionTransformer"  # both are called so, wherever they were loaded from
