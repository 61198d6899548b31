"""TensorRT: runs a plan on the GPU, several batches at once.

Never executed: it needs a GPU (`tests/gpu/test_tensorrt.py`). Every name was looked up in the
bindings of tensorrt 11.4.0.106; the slots it feeds run in tests over streams of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from math import ceil, prod
from pathlib import Path
from typing import Any

from engines.cuda import CudaStreams
from engines.devices import Gpu
from engines.errors import EngineCorruptError, EngineError
from engines.runner import Array, DeviceRows, Outputs, TensorSpec
from engines.slots import Addresses, Compute, Slots
from engines.tensorrt_build import Toolkit, tensorrt_toolkit

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"} | {
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's names of data types -> NumPy's."""


class TensorRtRunner:
    """Runs a plan; batches may lie in host memory or in the device's.

    Args:
        plan: File that `engines.tensorrt_build.build_plan` made on this kind of GPU.
        input: The engine's one input.
        outputs: What is copied out, in order; the engine may have more outputs than these.
        device: The GPU of the process: the first one that CUDA_VISIBLE_DEVICES shows.
        use_graphs: Capture each slot's work as a CUDA graph.
    """

    def __init__(
        self,
        plan: Path,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        device: Gpu,
        *,
        use_graphs: bool = True,
    ) -> None:
        self.batch_size = input.shape[0]
        self.input = input
        self.outputs = outputs
        self._plan = plan
        self._device = device
        self._use_graphs = use_graphs
        self._slots: Slots | None = None
        self._runtime: Any = None

    def __enter__(self) -> TensorRtRunner:
        """Load the plan, allocate all slots, and run each once.

        Raises:
            EngineError: TensorRT is unavailable, or the process sees another kind of GPU.
            EngineCorruptError: TensorRT does not read the plan, or it is of another model.
            OutOfDeviceMemoryError: Weights, slots or scratch memory do not fit.
            CudaError: Any other call failed.
        """
        plan = self._plan.read_bytes()
        toolkit = tensorrt_toolkit()  # asks for the driver: without one the next call would crash
        with ExitStack() as undo:
            streams = undo.enter_context(CudaStreams())
            undo.callback(self._forget)
            self._check_device(streams.compute_capability)
            self._runtime = toolkit.trt.Runtime(toolkit.log.logger)  # outlives its engine
            engine = self._deserialize(toolkit, plan)
            others = self._check_tensors(toolkit.trt, engine)
            binder = _Binder(toolkit, engine, streams, others, self)
            self._slots = Slots(
                streams, self.input, self.outputs, binder.bind, use_graphs=self._use_graphs
            )
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error:
            self._undo.__exit__(*error)
        else:
            self._undo.close()

    @property
    def graph_refusal(self) -> str | None:
        """Why no CUDA graphs are used; None where they are. Only while entered."""
        return self._entered.graph_refusal

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `engines.slots.Slots.infer`."""
        return self._entered.infer(batches)

    @property
    def _entered(self) -> Slots:
        if self._slots is None:
            raise EngineError(f"engine plan {self._plan.name}: not open; expected `with runner:`.")
        return self._slots

    def _forget(self) -> None:
        """Let contexts and engine go before the memory that they use; TensorRT frees by count."""
        if self._slots is not None:
            self._slots.close()
        self._slots = None
        self._runtime = None

    def _check_device(self, found: tuple[int, int]) -> None:
        if found != self._device.compute_capability:
            raise EngineError(
                f"device of engine plan {self._plan.name}: compute capability {found}; expected "
                f"{self._device.compute_capability}, that of {self._device.name}. Set "
                f"CUDA_VISIBLE_DEVICES={self._device.uuid}."
            )

    def _deserialize(self, toolkit: Toolkit, plan: bytes) -> Any:
        toolkit.log.clear()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return engine
        what = f"engine plan {self._plan.name}"
        raise toolkit.log.failure(what) or EngineCorruptError(
            f"{what}: TensorRT {toolkit.trt.__version__} cannot read it "
            f"({toolkit.log.last_error()}); expected a plan made by this version on "
            f"{self._device.name}. Build it again with `score engine build --force`."
        )

    def _check_tensors(self, trt: Any, engine: Any) -> dict[str, int]:
        """Compare inputs and outputs with what is expected of them.

        Returns:
            Outputs that are not copied out -> their bytes.
        """
        named = {spec.name: spec for spec in (self.input, *self.outputs)}
        others: dict[str, int] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype, shape = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            spec = named.pop(name, None)
            if spec is None and not is_input:
                others[name] = ceil(prod(shape) * dtype.itemsize)
                continue
            found = (is_input, DTYPES.get(dtype.name, dtype.name), shape)
            if spec is None or found != (spec is self.input, spec.dtype, spec.shape):
                raise self._mismatch(f"{name} {found[1:]}", str(spec))
        if named:
            raise self._mismatch("no tensor", f"{', '.join(named)} too")
        return others

    def _mismatch(self, found: str, expected: str) -> EngineCorruptError:
        return EngineCorruptError(
            f"engine plan {self._plan.name}: has {found}; expected {expected}. Build it "
            "again with `score engine build --force`."
        )


class _Binder:
    """Makes an execution context for each slot.

    All contexts compute on one stream, one after the other: then one block of scratch memory may
    serve them all, and so may the memory of outputs that nobody reads.
    """

    def __init__(
        self,
        toolkit: Toolkit,
        engine: Any,
        streams: CudaStreams,
        others: dict[str, int],
        runner: TensorRtRunner,
    ) -> None:
        self._toolkit = toolkit
        self._engine = engine
        self._names = (runner.input.name, *(spec.name for spec in runner.outputs))
        self._others = {name: streams.device(size) for name, size in others.items()}
        self._scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = streams.device(max(self._scratch_bytes, 1))

    def bind(self, addresses: Addresses) -> Compute:
        """See `engines.slots.Bind`."""
        trt, log = self._toolkit.trt, self._toolkit.log
        log.clear()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._refused("create_execution_context")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        pointers = zip(self._names, (addresses.input, *addresses.outputs), strict=True)
        for name, pointer in (*pointers, *self._others.items()):
            if not context.set_tensor_address(name, pointer):
                raise self._refused(f"set_tensor_address of {name}")

        def compute(stream: int) -> None:
            if not context.execute_async_v3(stream):
                raise self._refused("execute_async_v3")

        return compute

    def _refused(self, call: str) -> EngineError:
        log = self._toolkit.log
        return log.failure(f"TensorRT, {call}") or EngineError(
            f"TensorRT, {call}: refused ({log.last_error()}); expected success. Build the engine "
            "again, or run it in a new process."
        )
