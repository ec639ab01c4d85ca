"""Gaussian noise as augmentation: the network sees noisy images, and all around it knows the images without noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class WithNoise(nn.Module):
    """A network that adds the noise of a batch to its images.

    Attacks and losses ask it at x and at x_adv, and the noise is the same at both. Bounds reach the network through
    ``module``, as they reach that of a process group, and are around the images without noise.

    Args:
        network: the network; a child, so that its parameters can be frozen. Its attributes are reached through this.
        noise: (N, C, H, W), of the batch that it will be asked about.
    """

    def __init__(self, network: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        network: nn.Module = getattr(self.network, "module", self.network)
        return network

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) -> what the network returns for the noisy images."""
        return self.network(x + self.noise)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)
