"""Networks for training at scale, on 112×112 faces: build(name). PUBLISHED has their published sizes, with sources.

| name | network | defined by |
| --- | --- | --- |
| iresnet-18, -50, -100 | ArcFace's residual network | InsightFace, arcface_torch/backbones/iresnet.py |
| resnet-ir-50 | the same, no batch norm between a unit's convolutions | FaceX-Zoo, backbone/ResNets.py |
| mobilefacenet | MobileFaceNet (arXiv 1804.07573) | FaceX-Zoo, backbone/MobileFaceNets.py |
| attention-56, -92 | residual attention (arXiv 1704.06904) | FaceX-Zoo, backbone/AttentionNets.py |
| attention-irse-56, -92 | the same with IR-SE units | cavaface, backbone/resattnet.py |

The paper's network has no published definition: its authors say that it joins residual attention with ArcFace's units.
All of them are written anew here; only what a definition needs was read there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mvrepro.errors import UserError
from mvrepro.networks import IResNet, parameter_count

SIDE = 112
Unit = Callable[[int, int, int], nn.Module]  # (width in, width out, stride)


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


class IRUnit(nn.Module):
    """BN-conv-PReLU-conv-BN, with squeeze-and-excitation on request; the shortcut of a unit that only strides picks
    every second pixel, that of one that widens is a 1×1 convolution with BN (FaceX-Zoo's and cavaface's unit)."""

    def __init__(self, in_width: int, width: int, stride: int, *, squeeze: bool) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_width),
            nn.Conv2d(in_width, width, 3, padding=1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            *([SqueezeExcite(width)] if squeeze else []),
        )
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else nn.MaxPool2d(1, stride)
        if in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


def ir(in_width: int, width: int, stride: int = 1) -> nn.Module:
    return IRUnit(in_width, width, stride, squeeze=False)


def irse(in_width: int, width: int, stride: int = 1) -> nn.Module:
    return IRUnit(in_width, width, stride, squeeze=True)


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
    stem: list[nn.Module],
    modules: tuple[int, int, int],
    widths: tuple[int, int, int, int],
    first_stride: int,
    unit: Unit,
) -> nn.Sequential:
    """Stem (to 64 channels), three stages of attention modules at 56, 28 and 14 pixels, three units at 7."""
    layers, width = list(stem), 64
    for stage, (count, new_width) in enumerate(zip(modules, widths[:3], strict=True)):
        layers.append(unit(width, new_width, 2 if stage else first_stride))
        width = new_width
        layers += [Attention(width, 3 - stage, unit) for _ in range(count)]
    layers += [unit(width, widths[3], 2), unit(widths[3], widths[3], 1), unit(widths[3], widths[3], 1)]
    return nn.Sequential(*layers)


def attention(modules: tuple[int, int, int], embedding_dim: int) -> nn.Sequential:
    """FaceX-Zoo's: a 7×7 stem with stride 2, bottlenecks 256 … 2048 wide, linear-BN."""
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(
        attention_body(stem, modules, (256, 512, 1024, 2048), 1, Bottleneck),
        nn.Flatten(),
        nn.Linear(2048 * 7 * 7, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
    )


def attention_irse(modules: tuple[int, int, int], embedding_dim: int) -> nn.Sequential:
    """cavaface's: ArcFace's stem, IR-SE units 64 … 512 wide, BN-dropout-linear-BN without a scale."""
    return nn.Sequential(
        attention_body(_ir_stem(), modules, (64, 128, 256, 512), 2, irse),
        *_ir_neck(nn.BatchNorm1d(embedding_dim, affine=False), 0.4),
    )


def resnet_ir(blocks: tuple[int, ...], embedding_dim: int) -> nn.Sequential:
    """FaceX-Zoo's ResNet-IR (its embeddings are of length 1 there, and of any length here: heads normalise them)."""
    layers, width = _ir_stem(), 64
    for count, new_width in zip(blocks, (64, 128, 256, 512), strict=True):
        layers += [ir(width, new_width, 2), *(ir(new_width, new_width) for _ in range(count - 1))]
        width = new_width
    return nn.Sequential(nn.Sequential(*layers), *_ir_neck(nn.BatchNorm1d(embedding_dim), 0.0))


def _ir_stem() -> list[nn.Module]:
    return [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)]


def _ir_neck(last: nn.BatchNorm1d, dropout: float) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(512),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(512 * 7 * 7, last.num_features),
        last,
    ]


class Inverted(nn.Module):
    """MobileFaceNet's unit: 1×1 up to `inner` channels, 3×3 by channel, 1×1 down without activation."""

    def __init__(self, in_width: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv(in_width, inner, 1),
            *_conv(inner, inner, 3, stride, groups=inner),
            *_conv(inner, width, 1, linear=True),
        )
        self.same = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.same else out


def _conv(
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


def mobilefacenet(embedding_dim: int) -> nn.Sequential:
    """Table 1 of arXiv 1804.07573, with a linear-BN to any number of dimensions at its end."""
    return nn.Sequential(
        *_conv(3, 64, 3, 2),
        *_conv(64, 64, 3, groups=64),
        Inverted(64, 128, 64, 2),
        *(Inverted(64, 128, 64, 1) for _ in range(4)),
        Inverted(64, 256, 128, 2),
        *(Inverted(128, 256, 128, 1) for _ in range(6)),
        Inverted(128, 512, 128, 2),
        *(Inverted(128, 256, 128, 1) for _ in range(2)),
        *_conv(128, 512, 1),
        *_conv(512, 512, 7, groups=512, linear=True, padding=0),
        nn.Flatten(),
        nn.Linear(512, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
    )


def iresnet(blocks: tuple[int, int, int, int], embedding_dim: int) -> nn.Module:
    """arcface_torch's, out of mvrepro.networks."""
    return IResNet(blocks, (64, 128, 256, 512), in_channels=3, image_size=SIDE, embedding_dim=embedding_dim)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "iresnet-18": lambda d: iresnet((2, 2, 2, 2), d),
    "iresnet-50": lambda d: iresnet((3, 4, 14, 3), d),
    "iresnet-100": lambda d: iresnet((3, 13, 30, 3), d),
    "resnet-ir-50": lambda d: resnet_ir((3, 4, 14, 3), d),
    "mobilefacenet": mobilefacenet,
    "attention-56": lambda d: attention((1, 1, 1), d),
    "attention-92": lambda d: attention((1, 2, 3), d),
    "attention-irse-56": lambda d: attention_irse((1, 1, 1), d),
    "attention-irse-92": lambda d: attention_irse((1, 2, 3), d),
}


def build(name: str, embedding_dim: int = 512) -> nn.Module:
    """A network by name, with random weights: (B, 3, 112, 112) floats -> (B, embedding_dim). Raises UserError with the
    known names."""
    if name not in BUILDERS:
        raise UserError(f"unknown backbone {name!r}; known are: {', '.join(BUILDERS)}")
    return BUILDERS[name](embedding_dim)


@dataclass(frozen=True)
class Published:
    """Multiply-adds in 10^9 and parameters in 10^6, as `source` prints them (but see CAVAFACE)."""

    source: str
    multiply_adds: float
    parameters: float | None = None


# THOP counts more than size() does: twice the numbers that batch norms see and 11 times those that are interpolated,
# among multiply-adds; and among parameters the 1×1 shortcut that each bottleneck of FaceX-Zoo owns, also where it is
# never used, but no PReLU. With that its figures are those of these networks (tests/test_backbones_large.py), but for
# 0.05·10^9 multiply-adds in both attention networks, which is what their last linear layer takes.
FACEX = "FaceX-Zoo, training_mode/README.md, section 3.1 (counted with THOP)"
ARCFACE = "InsightFace, recognition/arcface_torch/README.md, “ViT For Face Recognition”, FLOPs"
CAVAFACE = "cavaface, README.md, Benchmark: 17.63 GFLOPs, which are twice the multiply-adds"
PUBLISHED = {
    "iresnet-18": Published(ARCFACE, 2.6),
    "iresnet-50": Published(ARCFACE, 6.3),
    "iresnet-100": Published(ARCFACE, 12.1),
    "resnet-ir-50": Published(FACEX, 6.31, 43.57),
    "mobilefacenet": Published(FACEX, 0.22757, 1.19),
    "attention-56": Published(FACEX, 6.34, 98.96),
    "attention-92": Published(FACEX, 10.62, 134.56),
    "attention-irse-92": Published(CAVAFACE, 17.63 / 2),
}


def size(name: str, embedding_dim: int = 512) -> tuple[int, int]:
    """(parameters, multiply-adds for one image), counted without computing: those of convolutions and products."""
    with torch.device("meta"):
        model = build(name, embedding_dim).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, SIDE, SIDE))
    return parameter_count(model), counter.get_total_flops() // 2
