"""What the peers share: command line, clock, reading, preprocessing, scorers, check and report."""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    {"id": pa.string(), "label": pa.int32(), "top1": pa.int32(), "prob": pa.float32()})
SIDE = 224  # pixels: the model's input is [batch, 3, 224, 224]
MICRO_BATCH = 8  # fits the cache: faster than 32 with both runtimes on the CPUs tried
os.environ.update(  # import this module first: no telemetry; PYTHONPATH lets workers import it
    DO_NOT_TRACK="1", DAFT_ANALYTICS_ENABLED="0", DAFT_PROGRESS_BAR="0", HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1",
    PYTHONPATH=str(Path(__file__).resolve().parent))


def elapsed_s() -> float:
    """Seconds since the kernel started this process: interpreter start and imports count."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def parse_args(*variants: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=Path, required=True, help="folder of Parquet files")
    parser.add_argument("--model", type=os.path.abspath, default="", help="ONNX file")
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--rows", type=int, default=0, help="only the first N rows (0: all)")
    parser.add_argument("--variant", choices=variants, required=True)
    args = parser.parse_args()
    args.files = sorted(str(path.resolve()) for path in args.input.glob("*.parquet"))
    if not args.files:
        parser.error(f"--input {args.input}: no *.parquet; expected rows made by make_data.py")
    args.output = args.output.resolve()
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"--output {args.output}: not empty; expected a new or empty folder")
    if args.output.exists():
        args.output.rmdir()  # Spark wants to make the folder itself
    return args


def read_batches(args: argparse.Namespace, columns: list[str], batch_rows: int, use_threads=False):
    """Record batches of the input, in order, `args.rows` rows in all (0: every row)."""
    left = args.rows or 1 << 60
    for path in args.files:
        file = pq.ParquetFile(path, pre_buffer=False)
        for batch in file.iter_batches(batch_rows, columns=columns, use_threads=use_threads):
            if left <= 0:
                return
            yield batch.slice(0, left)
            left -= batch.num_rows


def write_pictures(args: argparse.Namespace, scored, part: int = 0):
    """Write pairs of a record batch and its (top1, prob) as one file."""
    batches = [pa.record_batch([batch["id"], batch["label"], *map(pa.array, scores)], schema=SCHEMA)
               for batch, scores in scored]
    args.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_batches(batches), args.output / f"part-{part}.parquet")


def read_output(folder: Path, schema: pa.Schema) -> pa.Table:
    """What a peer wrote, each framework's types cast to `schema`."""
    files = sorted(folder.glob("**/*.parquet"))
    return pa.concat_tables(
        pq.read_table(path, columns=schema.names, partitioning=None).cast(schema) for path in files)


def accuracy(table: pa.Table) -> dict[str, float]:
    assert len(set(table["id"].to_pylist())) == table.num_rows, "an id was written twice"
    correct = np.mean(table["top1"].to_numpy() == table["label"].to_numpy())
    return {"top1_accuracy": round(float(correct), 4)}


def report(peer: str, args: argparse.Namespace, schema: pa.Schema = SCHEMA, check=accuracy):
    """Stop the clock, then check the written output and print the one JSON line.

    PEERS_CHECK=0 leaves the check to the driver, whose own time counts for nobody: here it would
    add to a peer's CPU seconds and memory what the other commands do not do.
    """
    seconds_total = elapsed_s()
    if os.environ.get("PEERS_CHECK") == "0":
        files = args.output.glob("**/*.parquet")
        num_rows, checked = sum(pq.read_metadata(path).num_rows for path in files), {}
    else:
        table = read_output(args.output, schema)
        num_rows, checked = table.num_rows, check(table)
    print(json.dumps({
        "peer": peer, "variant": args.variant, "model": Path(args.model).name,
        "rows": num_rows, "seconds_total": round(seconds_total, 3),
        "examples_per_sec": round(num_rows / seconds_total, 1), **checked}), flush=True)


def center_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the central square with 87.5 % of the shorter side."""
    side = round(min(width, height) * 0.875)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 224, 224, 3] -> float32 [..., 3, 224, 224], as EfficientNet-Lite was trained."""
    return np.moveaxis((pixels.astype(np.float32) - 127.0) / 128.0, -1, -3)


def preprocess(jpeg: bytes) -> np.ndarray:
    """JPEG -> float32 [3, 224, 224] with Pillow, antialiased bicubic."""
    from PIL import Image

    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    box = center_crop(*image.size)
    return normalize(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)))


def top1(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, classes] -> class int32 [n], its softmax probability float32 [n]."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return logits.argmax(1).astype(np.int32), (1.0 / exponentials.sum(1)).astype(np.float32)


def open_session(model: str, num_threads: int | None = None):
    """ONNX Runtime session: defaults, or `num_threads` that sleep when idle instead of spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    if num_threads:
        options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compile_openvino(model: str, num_threads: int, num_streams: int):
    """OpenVINO model that takes uint8 [8, 224, 224, 3] and normalises in its graph."""
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    core = ov.Core()
    steps = PrePostProcessor(core.read_model(model))
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(127.0).scale(128.0)
    graph = steps.build()
    graph.reshape([MICRO_BATCH, SIDE, SIDE, 3])
    # Pinning off: two processes of one stream each would both pin to core 0.
    return core.compile_model(graph, "CPU", {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_streams, "ENABLE_CPU_PINNING": False})


class DocsScorer:
    """JPEGs -> (top1, prob), as the documentations show it: Pillow, then a default session."""

    def __init__(self, model: str):
        self.session = open_session(model)

    def __call__(self, jpegs):
        images = np.stack([preprocess(jpeg) for jpeg in jpegs])
        return top1(self.session.run(None, {"input": images})[0])


class TunedScorer(DocsScorer):
    """The same with one thread that does not spin, in micro-batches."""

    def __init__(self, model: str):
        self.session = open_session(model, num_threads=1)

    def __call__(self, jpegs):
        return in_micro_batches(super().__call__, jpegs)


class FastScorer:
    """JPEGs -> (top1, prob) with the kernels of expert_script.py: one request, one thread."""

    def __init__(self, model: str, compiled=None):
        import openvino as ov

        from fastjpeg import decode_window

        self.decode = decode_window
        compiled = compiled or compile_openvino(model, num_threads=1, num_streams=1)
        self.request = compiled.create_infer_request()
        self.pixels = np.zeros((MICRO_BATCH, SIDE, SIDE, 3), np.uint8)
        self.request.set_input_tensor(ov.Tensor(self.pixels, shared_memory=True))

    def __call__(self, jpegs):
        return in_micro_batches(self.score_micro_batch, jpegs)

    def score_micro_batch(self, jpegs):
        for row, jpeg in enumerate(jpegs):
            self.pixels[row] = self.decode(jpeg)
        self.request.infer()
        return top1(self.request.get_output_tensor(0).data[:len(jpegs)])


def in_micro_batches(score, jpegs):
    scored = [score(jpegs[i:i + MICRO_BATCH]) for i in range(0, len(jpegs), MICRO_BATCH)]
    return tuple(map(np.concatenate, zip(*scored, strict=True)))


SCORERS = {"docs": DocsScorer, "tuned": TunedScorer, "fast": FastScorer}


def start_ray():
    """Ray on two cores, without dashboard and progress bars."""
    import logging

    import ray.data

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
             object_store_memory=4 << 30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def start_spark(config: dict[str, str]):
    """Spark on two cores, without web page and progress bars."""
    from pyspark.sql import SparkSession

    config = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false",
              "spark.driver.memory": "4g", "spark.driver.host": "127.0.0.1",
              "spark.driver.bindAddress": "127.0.0.1", **config}
    session = SparkSession.builder.master("local[2]").config(map=config).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session
