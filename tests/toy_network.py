"""A network that knows nothing of fedcl, for `model=module`."""

from __future__ import annotations

from torch import Tensor, nn


class Cnn(nn.Module):
    """Convolution, batch norm, pooling, dropout and a classifier of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(16 * width, 16)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W), or rows (B, N), to logits (B, 1000)."""
        x = x.mean(1, keepdim=True) if x.dim() == 4 else x[:, None, None]
        x = self.pool(self.norm(self.conv(x)).relu()).flatten(1)
        out: Tensor = self.fc(self.dropout(self.hidden(x).relu()))
        return out
