"""Vision transformer for small images (Dosovitskiy et al., 2021; sizes of DeiT-Tiny, Touvron et al., 2021).

Parameter names are timm's: ``cls_token``, ``pos_embed``, ``patch_embed.proj``, ``blocks.0.attn.qkv``,
``blocks.0.mlp.fc1``, ``norm``, ``head``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defense_core.config import require


class PatchEmbedding(nn.Module):
    """Image N×C×H×W to tokens N×T×D by one strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention in plain matrix products.

    The fused kernels have no second derivative, which curvature-based methods need.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = self.softmax(query @ key.transpose(-2, -1) * self.scale)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, count, dim)
        out: Tensor = self.proj(mixed)
        return out


class Perceptron(nn.Module):
    """Linear → GELU → linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return out


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class SmallViT(nn.Module):
    """Patches, class token, learned positions, ``depth`` blocks, linear head on the class token."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(patch_size, in_channels, dim)
        tokens = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×S×S, S = ``image_size``."""
        patches = self.patch_embed(inputs)
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat((first, patches), dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit_tiny(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    num_classes: int = 10,
    in_channels: int = 3,
) -> nn.Module:
    """Vision transformer of DeiT-Tiny's size with small patches."""
    require(1 <= image_size <= 1024, "image_size", "1 to 1024", image_size)
    divides = 1 <= patch_size <= image_size and image_size % patch_size == 0
    require(divides, "patch_size", f"a divisor of image_size {image_size}", patch_size)
    require(1 <= dim <= 4096, "dim", "1 to 4096", dim)
    require(1 <= depth <= 64, "depth", "1 to 64", depth)
    require(1 <= heads <= dim and dim % heads == 0, "heads", f"a divisor of dim {dim}", heads)
    require(0.0 < mlp_ratio <= 16.0 and int(dim * mlp_ratio) >= 1, "mlp_ratio", "above 0, at most 16", mlp_ratio)
    return SmallViT(
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=num_classes,
        in_channels=in_channels,
    )
