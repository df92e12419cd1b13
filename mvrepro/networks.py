"""Networks that turn images into embeddings. Each is built by name: build(name, ...).

| name | network | defined by |
| --- | --- | --- |
| toy | two hidden layers | here |
| iresnet-tiny, -small | ArcFace's residual network, narrow | here |
| iresnet-18, -50, -100 | ArcFace's residual network | InsightFace, arcface_torch/backbones/iresnet.py |
| iresnet-18-fixed, … | the same, the scale of its last batch norm kept at 1 as there | the same |
| resnet-ir-50 | the same, no batch norm between a unit's convolutions | FaceX-Zoo, backbone/ResNets.py |
| mobilefacenet | MobileFaceNet (arXiv 1804.07573) | FaceX-Zoo, backbone/MobileFaceNets.py |
| attention-56, -92 | residual attention (arXiv 1704.06904) | FaceX-Zoo, backbone/AttentionNets.py |
| attention-irse-56, -92 | the same with IR-SE units | cavaface, backbone/resattnet.py |

The last three are for colour images of 112×112 alone. The paper's network has no published definition: its authors say
that it joins residual attention with ArcFace's units. All of these are written anew here; only what a definition needs
was read there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvrepro.errors import UserError

SIDE = 112  # of aligned faces
Unit = Callable[[int, int, int], nn.Module]  # (width in, width out, stride)


def conv(
    in_width: int,
    width: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    linear: bool = False,
    padding: int | None = None,
) -> list[nn.Module]:
    """Convolution-BN-PReLU, or without the PReLU."""
    padding = kernel // 2 if padding is None else padding
    layers: list[nn.Module] = [nn.Conv2d(in_width, width, kernel, stride, padding, groups=groups, bias=False)]
    return [*layers, nn.BatchNorm2d(width), *([] if linear else [nn.PReLU(width)])]


class StridedPoints(nn.Conv2d):
    """A 1×1 convolution with a stride that takes its pixels first where it runs on a CPU.

    oneDNN's own way dies in the backward pass, or is wrong there, with channels last and fewer channels than a register
    of the processor holds: 15 with AVX-512, 7 with AVX2 (torch 2.13).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return F.conv2d(F.max_pool2d(x, 1, self.stride), self.weight, self.bias)


class SqueezeExcite(nn.Module):
    """Each channel times a number in (0, 1) that follows from all channels' means (arXiv 1709.01507), reduction 16."""

    def __init__(self, width: int, reduction: int = 16) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // reduction, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width // reduction, width, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(x)
        return x * gate


class Block(nn.Module):
    """The improved residual unit of ArcFace (arXiv 1801.07698, section 3.2.2): BN-conv-BN-PReLU-conv-BN, and a 1×1
    convolution with BN as the shortcut of a unit that strides or widens.

    inner_norm  False: the unit of FaceX-Zoo and cavaface, which has no BN between the convolutions; the shortcut of one
                that only strides picks every second pixel
    squeeze     squeeze-and-excitation at the end of the residual branch
    """

    def __init__(
        self, in_width: int, width: int, stride: int = 1, *, inner_norm: bool = True, squeeze: bool = False
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_width),
            nn.Conv2d(in_width, width, 3, padding=1, bias=False),
            *([nn.BatchNorm2d(width)] if inner_norm else []),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            *([SqueezeExcite(width)] if squeeze else []),
        )
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else nn.MaxPool2d(1, stride)
        if in_width != width or (inner_norm and stride > 1):
            self.shortcut = nn.Sequential(StridedPoints(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


ir, irse = partial(Block, inner_norm=False), partial(Block, inner_norm=False, squeeze=True)


class IResNet(nn.Module):
    """ArcFace's residual network: stem, four stages that halve the image, BN-linear-BN to the embedding.

    blocks, widths   of the four stages;  in_channels, image_size  of the (square) input
    stem_stride      of the first convolution: 2 quarters the cost of everything behind it
    unit             what a stage consists of
    fixed_scale      the scale of the last batch norm stays 1
    (B, C, H, W) floats -> (B, embedding_dim)
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        stem_stride: int = 1,
        unit: Unit = Block,
        *,
        fixed_scale: bool = False,
        in_channels: int,
        image_size: int,
        embedding_dim: int,
    ) -> None:
        super().__init__()
        layers, width = conv(in_channels, widths[0], 3, stem_stride), widths[0]
        for count, new_width in zip(blocks, widths, strict=True):
            for i in range(count):
                layers.append(unit(width, new_width, 2 if i == 0 else 1))
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
        self.neck[-1].weight.requires_grad_(not fixed_scale)

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


class Bottleneck(nn.Module):
    """BN-ReLU before each of a 1×1, a 3×3 and a 1×1 convolution, a quarter of the width inside (pre-activation)."""

    def __init__(self, in_width: int, width: int, stride: int = 1) -> None:
        super().__init__()
        inner = width // 4
        self.start = nn.Sequential(nn.BatchNorm2d(in_width), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(in_width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
        )
        same = stride == 1 and in_width == width
        self.shortcut = None if same else nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x)
        out: Tensor = self.residual(start) + (x if self.shortcut is None else self.shortcut(start))
        return out


class Mask(nn.Module):
    """Down by half `levels` times and up again, with a skip at each level: (B, width, H, W) -> the same shape."""

    def __init__(self, width: int, levels: int, unit: Unit) -> None:
        super().__init__()
        self.inner: Mask | None = None
        if levels == 1:
            self.down: nn.Module = nn.Sequential(unit(width, width, 1), unit(width, width, 1))
        else:
            self.down, self.skip, self.up = (unit(width, width, 1) for _ in range(3))
            self.inner = Mask(width, levels - 1, unit)

    def forward(self, x: Tensor) -> Tensor:
        small = self.down(F.max_pool2d(x, 3, 2, padding=1))
        if self.inner is not None:
            small = self.up(self.inner(small) + small + self.skip(small))
        return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=True)


class Attention(nn.Module):
    """An attention module: the trunk of two units, T, times 1 + a mask in (0, 1) (arXiv 1704.06904, eq. 3).

    cavaface adds T in its first stage where the paper's equation multiplies with it; here it is multiplied everywhere.
    """

    def __init__(self, width: int, levels: int, unit: Unit) -> None:
        super().__init__()
        self.first = unit(width, width, 1)
        self.trunk = nn.Sequential(unit(width, width, 1), unit(width, width, 1))
        self.mask = Mask(width, levels, unit)
        self.gate = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.Sigmoid(),
        )
        self.last = unit(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        trunk = self.trunk(x)
        mask = self.gate(self.mask(x) + trunk)
        out: Tensor = self.last((1 + mask) * trunk)
        return out


def attention_body(
    start: list[nn.Module],
    modules: tuple[int, int, int],
    widths: tuple[int, int, int, int],
    first_stride: int,
    unit: Unit,
) -> nn.Sequential:
    """The start (to 64 channels), three stages of attention modules at 56, 28 and 14 pixels, three units at 7."""
    layers, width = list(start), 64
    for stage, (count, new_width) in enumerate(zip(modules, widths[:3], strict=True)):
        layers.append(unit(width, new_width, 2 if stage else first_stride))
        width = new_width
        layers += [Attention(width, 3 - stage, unit) for _ in range(count)]
    layers += [unit(width, widths[3], 2), unit(widths[3], widths[3], 1), unit(widths[3], widths[3], 1)]
    return nn.Sequential(*layers)


def attention(modules: tuple[int, int, int], embedding_dim: int) -> nn.Sequential:
    """FaceX-Zoo's: a 7×7 start with stride 2, bottlenecks 256 … 2048 wide, linear-BN."""
    start = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(
        attention_body(start, modules, (256, 512, 1024, 2048), 1, Bottleneck),
        nn.Flatten(),
        nn.Linear(2048 * 7 * 7, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
    )


def attention_irse(modules: tuple[int, int, int], embedding_dim: int) -> nn.Sequential:
    """cavaface's: ArcFace's start, IR-SE units 64 … 512 wide, BN-dropout-linear-BN without a scale."""
    return nn.Sequential(
        attention_body(conv(3, 64, 3), modules, (64, 128, 256, 512), 2, irse),
        nn.BatchNorm2d(512),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(512 * 7 * 7, embedding_dim),
        nn.BatchNorm1d(embedding_dim, affine=False),
    )


class Inverted(nn.Module):
    """MobileFaceNet's unit: 1×1 up to `inner` channels, 3×3 by channel, 1×1 down without activation."""

    def __init__(self, in_width: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv(in_width, inner, 1),
            *conv(inner, inner, 3, stride, groups=inner),
            *conv(inner, width, 1, linear=True),
        )
        self.same = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.same else out


def mobilefacenet(embedding_dim: int) -> nn.Sequential:
    """Table 1 of arXiv 1804.07573, with a linear-BN to any number of dimensions at its end."""
    return nn.Sequential(
        *conv(3, 64, 3, 2),
        *conv(64, 64, 3, groups=64),
        Inverted(64, 128, 64, 2),
        *(Inverted(64, 128, 64, 1) for _ in range(4)),
        Inverted(64, 256, 128, 2),
        *(Inverted(128, 256, 128, 1) for _ in range(6)),
        Inverted(128, 512, 128, 2),
        *(Inverted(128, 256, 128, 1) for _ in range(2)),
        *conv(128, 512, 1),
        *conv(512, 512, 7, groups=512, linear=True, padding=0),
        nn.Flatten(),
        nn.Linear(512, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
    )


# For images of any size: what build() calls with all that it knows of them.
ANY_SIZE: dict[str, Callable[..., nn.Module]] = {
    "toy": ToyNet,
    "iresnet-tiny": partial(IResNet, (1, 1, 1, 1), (8, 24, 48, 96)),
    "iresnet-small": partial(IResNet, (1, 1, 1, 1), (24, 48, 96, 192), 2),
    "iresnet-18": partial(IResNet, (2, 2, 2, 2)),
    "iresnet-50": partial(IResNet, (3, 4, 14, 3)),
    "iresnet-100": partial(IResNet, (3, 13, 30, 3)),
    "iresnet-18-fixed": partial(IResNet, (2, 2, 2, 2), fixed_scale=True),
    "iresnet-50-fixed": partial(IResNet, (3, 4, 14, 3), fixed_scale=True),
    "iresnet-100-fixed": partial(IResNet, (3, 13, 30, 3), fixed_scale=True),
    "resnet-ir-50": partial(IResNet, (3, 4, 14, 3), unit=ir),
}
# For aligned faces: what it calls with the embedding's dimensions.
FACES: dict[str, Callable[[int], nn.Module]] = {
    "mobilefacenet": mobilefacenet,
    "attention-56": partial(attention, (1, 1, 1)),
    "attention-92": partial(attention, (1, 2, 3)),
    "attention-irse-56": partial(attention_irse, (1, 1, 1)),
    "attention-irse-92": partial(attention_irse, (1, 2, 3)),
}
NETWORKS = (*ANY_SIZE, *FACES)


def check_name(name: str) -> None:
    """Raises UserError with the known names for an unknown one."""
    if name not in NETWORKS:  # a tuple: what can't be hashed is looked for, too
        raise UserError(f"unknown backbone {name!r}; known are: {', '.join(NETWORKS)}")


def build(name: str, *, in_channels: int = 3, image_size: int, embedding_dim: int) -> nn.Module:
    """A network by name, with random weights: (B, in_channels, image_size, image_size) floats -> (B, embedding_dim).

    Raises UserError, with the known names for an unknown one.
    """
    check_name(name)
    if name in ANY_SIZE:
        return ANY_SIZE[name](in_channels=in_channels, image_size=image_size, embedding_dim=embedding_dim)
    if (in_channels, image_size) != (3, SIDE):
        size = f"{image_size}×{image_size} pixels in {in_channels} channels"
        raise UserError(f"{name} takes images of {SIDE}×{SIDE} pixels in 3 channels, got {size}")
    return FACES[name](embedding_dim)


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
