"""Small transformers: a vision transformer, and one that reads characters.

Queries, keys and values are linear layers of their own, so that a regular expression such as ``attn`` or ``attn.query``
names them, and attention is written out, so that it can be differentiated twice and mapped over samples.
"""

# B = batch, T = tokens, D = width, A = attention heads, E = D / A, C = channels, H, W = height, width, L = characters
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcl.models.networks import Dropout, Network, Output


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1): softmax(Q K^T / sqrt(E)) V; all tokens see each other."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to tokens of the same shape."""
        q_BATE, k_BATE, v_BATE = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        weights_BATT = torch.softmax(q_BATE @ k_BATE.transpose(-1, -2) / q_BATE.shape[-1] ** 0.5, dim=-1)
        out: Tensor = self.out((weights_BATT @ v_BATE).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and a two-layer perceptron of four times the width, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to tokens of the same shape."""
        x = x + self.dropout1(self.attn(self.norm1(x)))
        out: Tensor = x + self.dropout2(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))
        return out


class Transformer(Network):
    """What both networks share: learned positions, blocks, and a layer norm at the end."""

    def build(self, *, tokens: int, dim: int, depth: int, attention_heads: int, dropout: float) -> None:
        """Create the layers for ``tokens`` tokens.

        Raises
        ------
        ValueError
            The attention heads do not divide the width.
        """
        if dim % attention_heads:
            raise ValueError(f"model.attention_heads={attention_heads}: must divide model.dim={dim}")
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, attention_heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def encode(self, x: Tensor) -> Tensor:
        """Map embedded tokens (B, T, D) to what the last block makes of them, (B, T, D)."""
        x = self.dropout(x + self.positions)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class ViT(Transformer):
    """Vision transformer (Dosovitskiy et al., ICLR 2021) with pre-norm blocks; the class token is the feature.

    Parameters
    ----------
    input_shape
        (C, H, W) of one sample.
    heads
        Logit columns of each classification head.
    patch
        Side of a patch in pixels; must divide H and W.
    dim, depth, attention_heads
        Width of a token, number of blocks, attention heads in each.
    dropout
        Drop probability after the embedding, attention and perceptron.
    head, head_scale, head_width, pretrained, freeze
        As in `Network.attach_heads` and `Network.prepare`.

    Raises
    ------
    ValueError
        The samples are no images that the patches tile, or a parameter is out of range.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        attention_heads: int = 4,
        dropout: float = 0.0,
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model=vit: samples of shape {tuple(input_shape)} do not fit; needs images (C, H, W)")
        channels, height, width = input_shape
        if height % patch or width % patch:
            raise ValueError(f"model.patch={patch}: must divide the image's height {height} and width {width}")
        tokens = (height // patch) * (width // patch)
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(dim))
        self.build(tokens=tokens + 1, dim=dim, depth=depth, attention_heads=attention_heads, dropout=dropout)
        self.attach_heads(dim, heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=pretrained, freeze=freeze)

    def forward(self, x: Tensor) -> Output:
        """Map images (B, C, H, W) to logits (B, L) and the class token (B, D)."""
        tokens_BTD = self.patches(x).flatten(2).transpose(1, 2)
        first_B1D = self.token.expand(len(x), 1, -1)
        return self.classify(self.encode(torch.cat([first_B1D, tokens_BTD], dim=1))[:, 0])


class CodeEmbedding(nn.Module):
    """A vector for each character code, which comes as a float like every sample.

    Between two whole codes it interpolates linearly, and beyond the alphabet it stays at the end. No text holds such
    codes; they matter to methods that differentiate with respect to samples or add noise to them.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map codes (B, L) to vectors (B, L, D)."""
        last = len(self.weight) - 1
        x = x.clamp(0, last)
        low = x.detach().floor().long()
        share = (x - low).unsqueeze(-1)
        return (1 - share) * self.weight[low] + share * self.weight[(low + 1).clamp(max=last)]


class CharTransformer(Transformer):
    """Reads L characters and tells the next one: embedding, blocks, and the last character's token as the feature.

    Parameters
    ----------
    input_shape
        (L,): codes 0..vocabulary - 1, as ``data=text`` gives them.
    heads
        Logit columns of each classification head.
    vocabulary
        How many codes there are; None takes the number of columns, which is right where classes are characters.
    dim, depth, attention_heads, dropout, head, head_scale, head_width, pretrained, freeze
        As in `ViT`.

    Raises
    ------
    ValueError
        The samples are no sequences, or a parameter is out of range.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        vocabulary: int | None = None,
        dim: int = 64,
        depth: int = 2,
        attention_heads: int = 4,
        dropout: float = 0.0,
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(
                f"model=char_transformer: samples of shape {tuple(input_shape)} do not fit; needs sequences (L,), as "
                "data=text has them"
            )
        codes = sum(heads) if vocabulary is None else vocabulary
        if codes < max(heads):
            raise ValueError(f"model.vocabulary={vocabulary}: must be null or at least the {max(heads)} classes")
        self.embedding = CodeEmbedding(codes, dim)
        self.build(tokens=input_shape[0], dim=dim, depth=depth, attention_heads=attention_heads, dropout=dropout)
        self.attach_heads(dim, heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=pretrained, freeze=freeze)

    def forward(self, x: Tensor) -> Output:
        """Map codes (B, L) to logits over the next character and the last token (B, D)."""
        return self.classify(self.encode(self.embedding(x))[:, -1])
