"""Networks that turn images into embeddings. Each is built by name: build(name, ...)."""

import torch
from torch import Tensor, nn

from mvrepro.errors import UserError


class Block(nn.Module):
    """The improved residual unit of ArcFace (arXiv 1801.07698, section 3.2.2): BN-conv-BN-PReLU-conv-BN."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_width),
            nn.Conv2d(in_width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and in_width == width
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


class IResNet(nn.Module):
    """ArcFace's residual network: stem, four stages that halve the image, BN-linear-BN to the embedding.

    blocks, widths   of the four stages;  in_channels, image_size  of the (square) input
    stem_stride      of the first convolution: 2 quarters the cost of everything behind it
    (B, C, H, W) floats -> (B, embedding_dim)
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        stem_stride: int = 1,
        *,
        in_channels: int,
        image_size: int,
        embedding_dim: int,
    ) -> None:
        super().__init__()
        width = widths[0]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
        ]
        for count, new_width in zip(blocks, widths, strict=True):
            for i in range(count):
                layers.append(Block(width, new_width, stride=2 if i == 0 else 1))
                width = new_width
        self.body = nn.Sequential(*layers)
        side = -(-image_size // stem_stride)
        for _ in range(4):
            side = (side + 1) // 2
        self.neck = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Flatten(),
            nn.Linear(width * side * side, embedding_dim),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.neck(self.body(images))
        return embeddings


class ToyNet(nn.Module):
    """Two hidden layers for the geometry of notebook 02: few dimensions, so that features can be drawn."""

    def __init__(self, *, in_channels: int, image_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.PReLU(),
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.PReLU(),
            nn.Linear(128, embedding_dim),
            nn.BatchNorm1d(embedding_dim),  # centred features: without it all of them fall on one direction
        )

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(images)
        return embeddings


def build(name: str, *, in_channels: int, image_size: int, embedding_dim: int) -> nn.Module:
    """A backbone by name, with random weights. Raises UserError with the known names."""
    if name == "toy":
        return ToyNet(in_channels=in_channels, image_size=image_size, embedding_dim=embedding_dim)
    if name in IRESNETS:
        return IResNet(*IRESNETS[name], in_channels=in_channels, image_size=image_size, embedding_dim=embedding_dim)
    raise UserError(f"unknown backbone {name!r}; known are: toy, {', '.join(IRESNETS)}")


# name: blocks, widths, stride of the stem
IRESNETS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int], int]] = {
    "iresnet-tiny": ((1, 1, 1, 1), (8, 24, 48, 96), 1),
    "iresnet-small": ((1, 1, 1, 1), (24, 48, 96, 192), 2),
}


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def embed(model: nn.Module, images: Tensor, *, mirror: bool, batch_size: int = 256) -> Tensor:
    """Embeddings (N, D) float32 on the CPU of normalised images (N, C, H, W); with `mirror` each is
    summed with that of its mirror image, as face protocols do."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        embeddings = model(batch) + model(batch.flip(-1)) if mirror else model(batch)
        parts.append(embeddings.float().cpu())
    return torch.cat(parts)
