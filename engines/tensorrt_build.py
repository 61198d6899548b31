"""TensorRT: compile a graph into a plan on a GPU, or ahead of time with TensorRT-RTX on a CPU.

Both toolkits have one API with few differences, which `Toolkit` names. TensorRT-RTX serves as the
gate for graphs where there is no GPU: it has TensorRT's parser, but other kernels, and its plans
are not for TensorRT. What is executed in tests: everything with TensorRT-RTX 1.7 on a CPU. Never
executed: TensorRT 11 itself, its timing cache and `_inspect`; every name used was looked up in
the bindings of tensorrt 11.4.0.106.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from engines.cuda import device_problem
from engines.errors import BuildError, EngineError, OutOfDeviceMemoryError

MAJOR = 11
"""Of TensorRT: since 11 networks are strongly typed, plans of another major are no use."""
PROGRESS_EVERY_S = 5.0
NUM_MESSAGES = 200
"""Of the log, the last of which are kept."""
OUT_OF_MEMORY = ("out of memory", "outofmemory", "could not be allocated", "insufficient memory")
"""What TensorRT's messages say when memory ran out; it has no error code for it."""
NO_KERNEL = "could not find any implementation"
"""What the builder says of a layer whose kernels it has all passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuilderSettings:
    """What may be asked of the builder: part of an engine's key.

    The rest is in `_configure`, or the library's default, which its full version fixes: plans run
    on this model of GPU only, and fastest there.
    """

    optimization_level: int = 3
    """0 to 5: higher takes longer to build, and may run faster."""
    workspace_bytes: int | None = None
    """Most scratch memory of a layer; None: all of the device's memory."""
    tf32: bool = True
    """May multiply float32 with 10 bits of mantissa; float16 and int8 layers are not touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltPlan:
    """What a build gave."""

    plan: bytes
    inspector: str | None
    """JSON that describes every layer; None where there is no GPU to ask."""
    timing_cache: bytes
    """To be given to the next build on this kind of device; it may be empty."""
    build_s: float
    warnings: tuple[str, ...]


class Log:
    """The last warnings and errors of one toolkit, which takes one logger per process.

    Attributes:
        logger: The toolkit's own kind of logger, for its constructors.
        warnings: Oldest first.
        errors: Oldest first.
    """

    def __init__(self, trt: Any) -> None:
        self.warnings: deque[str] = deque(maxlen=NUM_MESSAGES)
        self.errors: deque[str] = deque(maxlen=NUM_MESSAGES)
        log, severities = self, trt.ILogger.Severity

        class Logger(trt.ILogger):  # type: ignore[misc]  # known at run time only
            def log(self, severity: Any, message: str) -> None:
                if severity == severities.WARNING:
                    log.warnings.append(message)
                elif int(severity) < int(severities.WARNING):
                    log.errors.append(message)

        self.logger = Logger()

    def clear(self) -> None:
        """Forget all; before a call whose messages are wanted."""
        self.warnings.clear()
        self.errors.clear()

    def failure(self, what: str) -> EngineError | None:
        """OutOfDeviceMemoryError if that is what the messages say; for `what`, such as a build.

        Warnings tell of kernels that were passed over, which is usual: they count where the errors
        say no more than that a layer was left without any.
        """
        messages = list(self.errors)
        if all(NO_KERNEL in error.lower() for error in self.errors):
            messages += self.warnings
        for message in messages:
            if any(sign in message.lower() for sign in OUT_OF_MEMORY):
                return OutOfDeviceMemoryError(
                    f"{what}: out of device memory ({_first_line(message)}); expected enough for "
                    "this batch size. Use a smaller batch, or fewer lanes per device."
                )
        return None

    def last_error(self) -> str:
        """The last error in one line."""
        return _first_line(self.errors[-1]) if self.errors else "no message"


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolkit:
    """TensorRT or TensorRT-RTX, and how they differ."""

    name: str
    trt: Any
    """The module."""
    log: Log
    targets: tuple[str, ...] = ()
    """Compute capabilities to compile for, such as `SM80`; none: the GPU at hand."""


def unavailable() -> str | None:
    """One sentence why TensorRT cannot be used here, None where it can.

    To be asked before anything else of TensorRT: without a driver, a plan that is deserialised
    ends the process with a segmentation fault.
    """
    if importlib.util.find_spec("tensorrt") is None:
        return (
            f"TensorRT: the package tensorrt is not installed; expected version {MAJOR}. Install "
            "nightscore[gpu] on a machine with an NVIDIA GPU."
        )
    problem = device_problem()
    if problem is not None:
        return problem
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except (ImportError, OSError) as error:
        version = f"{type(error).__name__}: {error}"
    if version.partition(".")[0] != str(MAJOR):
        return f"TensorRT: {version}; expected version {MAJOR}. Install nightscore[gpu] again."
    return None


def tensorrt_toolkit() -> Toolkit:
    """TensorRT for the GPU at hand; EngineError where it is unavailable."""
    problem = unavailable()
    if problem is not None:
        raise EngineError(problem)
    return Toolkit(name="tensorrt", trt=importlib.import_module("tensorrt"), log=_log("tensorrt"))


def rtx_toolkit(targets: tuple[str, ...] = ("SM80",)) -> Toolkit:
    """TensorRT-RTX, compiling ahead of time on a CPU.

    Args:
        targets: Of SM80, SM86, SM89, SM120 and SM121; 1.7 knows no SM90 and no SM100.
    """
    name = "tensorrt_rtx"
    module = importlib.import_module(name)
    return Toolkit(name=name, trt=module, log=_log(name), targets=targets)


@cache
def _log(module: str) -> Log:
    return Log(importlib.import_module(module))


def build_plan(
    graph: bytes,
    settings: BuilderSettings,
    *,
    timing_cache: bytes | None,
    say: Callable[[str], None],
    toolkit: Toolkit | None = None,
) -> BuiltPlan:
    """Compile an ONNX graph; minutes on a GPU.

    Args:
        graph: Serialised ONNX model with all its weights inside and every shape fixed; its types
            decide the precision of each layer.
        settings: What is asked of the builder.
        timing_cache: Of an earlier build. One that does not fit this device is a warning.
        say: Told what the builder is at, every few seconds, possibly from another thread.
        toolkit: TensorRT by default.

    Raises:
        EngineError: TensorRT is unavailable.
        BuildError: The parser refuses the graph, or the builder gives it up.
        OutOfDeviceMemoryError: The device's memory does not suffice.
    """
    toolkit = toolkit or tensorrt_toolkit()
    toolkit.log.clear()
    started = time.monotonic()
    builder = toolkit.trt.Builder(toolkit.log.logger)
    network = _parse(toolkit, builder, graph)
    config = _configure(toolkit, builder, settings)
    remarks = _attach_timing_cache(toolkit, config, timing_cache)
    toolkit.log.clear()
    plan = _run_builder(toolkit, builder, network, config, say)
    build_s = time.monotonic() - started
    remarks += toolkit.log.warnings
    kept = _timings(config)
    del network, config, builder  # and with them device memory that the inspection may need
    return BuiltPlan(
        plan=plan,
        inspector=None if toolkit.targets else _inspect(toolkit, plan),
        timing_cache=kept,
        build_s=build_s,
        warnings=tuple(dict.fromkeys(remarks)),
    )


def _parse(toolkit: Toolkit, builder: Any, graph: bytes) -> Any:
    """The network; BuildError in the parser's own words, all of them."""
    network = builder.create_network(0)  # no flags: always strongly typed
    parser = toolkit.trt.OnnxParser(network, toolkit.log.logger)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        texts = [f"{error.node_name() or 'model'}: {error.desc()}" for error in errors]
        found = "; ".join(" ".join(text.split()) for text in texts)
        raise BuildError(
            f"{toolkit.name} parser: {found or toolkit.log.last_error()}; expected symmetric int8 "
            "with float biases, or plain float layers. Quantise the graph for TensorRT."
        )
    for position in range(network.num_inputs):
        tensor = network.get_input(position)
        if min(tensor.shape, default=1) < 1:
            raise BuildError(
                f"{toolkit.name} input {tensor.name}: shape {tuple(tensor.shape)}; expected fixed "
                "sizes. Fix the batch before building."
            )
    return network


def _configure(toolkit: Toolkit, builder: Any, settings: BuilderSettings) -> Any:
    trt, config = toolkit.trt, builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    # More would run branches side by side, at the cost of memory; large batches fill a GPU.
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # kernels too, see `_inspect`
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    if toolkit.targets:
        config.num_compute_capabilities = len(toolkit.targets)
    for position, target in enumerate(toolkit.targets):
        known = getattr(trt.ComputeCapability, target, None)
        if known is None or not config.set_compute_capability(known, position):
            raise BuildError(f"{toolkit.name} target {target}: not known; expected such as SM80.")
    return config


def _attach_timing_cache(toolkit: Toolkit, config: Any, timing_cache: bytes | None) -> list[str]:
    """Give the builder its earlier timings, or an empty cache; warnings where they do not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TensorRT-RTX, which has its own
        if timing_cache and _accepts(toolkit, config, timing_cache):
            return []
        remarks = []
        if timing_cache:
            reasons = [*toolkit.log.errors, *toolkit.log.warnings] or ["made on another device"]
            remarks.append(
                f"timing cache: {_first_line(reasons[-1])}; expected one of this device and "
                f"version. {len(timing_cache)} bytes are left out and a new one is begun."
            )
        config.set_timing_cache(config.create_timing_cache(b""), False)
        return remarks


def _accepts(toolkit: Toolkit, config: Any, timing_cache: bytes) -> bool:
    """Whether it is the builder's now: TensorRT-RTX takes any, says so, and uses an empty one."""
    toolkit.log.clear()
    cache = config.create_timing_cache(timing_cache)
    taken = cache is not None and config.set_timing_cache(cache, False)  # ignore_mismatch
    return bool(taken) and not toolkit.log.errors and not toolkit.log.warnings


def _timings(config: Any) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.get_timing_cache()
        return b"" if cache is None else bytes(cache.serialize())


def _run_builder(
    toolkit: Toolkit, builder: Any, network: Any, config: Any, say: Callable[[str], None]
) -> bytes:
    monitor = _new_monitor(toolkit, say)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is not None:
        return bytes(plan)
    what = f"{toolkit.name} build"
    raise toolkit.log.failure(what) or BuildError(
        f"{what}: no plan ({toolkit.log.last_error()}); expected one. Another precision may build."
    )


def _new_monitor(toolkit: Toolkit, say: Callable[[str], None]) -> Any:
    """What TensorRT tells its progress to; it cancels the build when `say` raises."""

    class Monitor(toolkit.trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stopped: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._started = self._told = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            del parent
            self._steps[phase] = num_steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            # TensorRT would swallow what is raised in here, an interruption by the user included.
            try:
                self._tell(phase, step)
            except BaseException as error:
                self.stopped = self.stopped or error
            return self.stopped is None

        def _tell(self, phase: str, step: int) -> None:
            now = time.monotonic()
            if now - self._told >= PROGRESS_EVERY_S:
                self._told = now
                share = f"{step + 1} of {self._steps.get(phase, step + 1)}"
                say(f"{toolkit.name}: {phase}, {share}, after {now - self._started:.0f} s")

    return Monitor()


def _inspect(toolkit: Toolkit, plan: bytes) -> str | None:
    """JSON of the layers; needs a GPU."""
    runtime = toolkit.trt.Runtime(toolkit.log.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    json_format = toolkit.trt.LayerInformationFormat.JSON
    return str(engine.create_engine_inspector().get_engine_information(json_format))


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]
