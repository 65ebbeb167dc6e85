"""The networks of the comparison: images to 128-dimensional embeddings, as they come (no unit length)."""

from __future__ import annotations

import copy

import torch

WIDTH = 128


def conv(inputs: int, outputs: int, stride: int, size: int = 3) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), torch.nn.BatchNorm2d(outputs)
    )


class Block(torch.nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, stride), conv(outputs, outputs, 1)
        self.halves = stride > 1
        same = stride == 1 and inputs == outputs
        self.skip = torch.nn.Identity() if same else conv(inputs, outputs, stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(N, outputs, H, W)`` for ``(N, inputs, H, W)``."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x))


def residual(width: int, blocks: tuple[int, ...], stride: int = 1) -> torch.nn.Module:
    """A residual network for 32 x 32 images; a stage doubles the channels and, after the first, halves the size."""
    layers: list[torch.nn.Module] = [conv(3, width, stride), torch.nn.ReLU()]
    channels = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            outputs = width * 2**stage
            layers.append(Block(channels, outputs, 2 if stage and number == 0 else 1))
            channels = outputs
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    if channels != WIDTH:
        layers.append(torch.nn.Linear(channels, WIDTH))
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


class WithBranch(torch.nn.Module):
    """A network with its last stage there twice over what comes before: ``[second copy ; network]``, each ``WIDTH``.

    A compatible part that is made of both reads more than what the free part keeps, and takes less from it.
    """

    def __init__(self, network: torch.nn.Sequential) -> None:
        super().__init__()
        blocks = [number for number, layer in enumerate(network) if isinstance(layer, Block) and layer.halves]
        start = blocks[-1] if blocks else len(network) - 1
        self.shared, self.last = network[:start], network[start:]
        self.branch = copy.deepcopy(self.last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(N, 2 WIDTH)``."""
        shared = self.shared(x)
        return torch.cat([self.branch(shared), self.last(shared)], dim=1)


class SecondHalf(torch.nn.Module):
    """The network's own embedding, of what :class:`WithBranch` gives."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the last ``WIDTH`` columns."""
        return features[:, WIDTH:]


def resnet8() -> torch.nn.Module:
    """For CPUs: it works at 16 x 16 from the first convolution on."""
    return residual(32, (1, 1, 1), stride=2)


def resnet18() -> torch.nn.Module:
    return residual(64, (2, 2, 2, 2))


def resnet50() -> torch.nn.Module:
    """ImageNet's ResNet-50 with a linear map to the embedding, for 224 x 224 images; needs timm."""
    import timm

    trunk = timm.create_model("resnet50", pretrained=False, num_classes=0)
    return torch.nn.Sequential(trunk, torch.nn.Linear(trunk.num_features, WIDTH))
