"""A small seeded torch model for pictures."""

from __future__ import annotations

import torch

from engines.model import ModelSpec
from tests.engines.small_models import IMAGES


def pictures_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    )


PICTURES = ModelSpec(source=f"{__name__}:pictures_model", input=IMAGES, head="classes", top_k=2)
