"""What a value of any kind holds, as a digest that is the same in every process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections import deque
from collections.abc import Iterator
from pathlib import PurePath
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 50
"""What lies deeper in containers and objects is not looked at."""
_AT_WORK = re.compile(
    r"(_?(thread|weakref|contextvars|io|random)|threading|logging|concurrent|multiprocessing|asyncio"
    r"|socket|queue|numpy\.random|torch\.(_\w+|fx|export|distributed|utils\.hooks))(\.|$)"
)
"""Modules of types whose objects are at work in one process, such as locks, hooks, loggers and
generators: their state is another in the next process. The code of torch's graphs is their layer's
too."""
_WRITTEN_OUT = (int, float, complex, str, bytes, np.generic, PurePath)
"""Their representation says all; a path's attributes are a cache besides."""


def without_addresses(text: str) -> str:
    """A representation without what would be another in the next process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class Contents:
    """Digests of values by what they hold: numbers, texts, arrays, containers, objects.

    Neither identity nor the order of dicts and sets counts. Objects enter by their attributes,
    functions and classes by their names, and what is at work in this process by its type.
    """

    def __init__(self) -> None:
        # With the values themselves: the id of one that is gone may become another's.
        self._known: dict[int, tuple[Any, str]] = {}

    def digest(self, value: Any, depth: int = 0) -> str:
        """sha256, hexadecimal.

        Raises:
            Exception: Whatever torch raises for a tensor that does not hold its values densely.
        """
        if id(value) not in self._known:
            self._known[id(value)] = value, "itself"  # met again inside of it
            hasher = hashlib.sha256(_name(type(value)).encode())
            for part in self._parts(value, depth) if depth < MAX_DEPTH else ():
                hasher.update(b"\0")
                hasher.update(part)
            self._known[id(value)] = value, hasher.hexdigest()
        return self._known[id(value)][1]

    def _parts(self, value: Any, depth: int) -> Iterator[bytes | memoryview]:
        def inner(item: Any) -> bytes:
            return self.digest(item, depth + 1).encode()

        if (numbers := _numbers(value)) is not None:
            yield f"{value.dtype}{tuple(value.shape)}".encode()
            yield numbers
        elif isinstance(value, (dict, MappingProxyType)):
            yield from sorted(inner(key) + inner(item) for key, item in value.items())
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(inner, value))
        elif isinstance(value, (list, tuple, deque)):
            yield from map(inner, value)
        elif isinstance(value, (type, ModuleType)) or inspect.isroutine(value):
            yield _name(value).encode()
        elif (state := _state(value)) is not None:
            yield inner(state)
        else:
            yield without_addresses(repr(value)).encode()


def own_attributes(layer: torch.nn.Module) -> dict[str, Any]:
    """What a layer keeps besides all that `torch.nn.Module` keeps for every layer."""
    return {name: value for name, value in vars(layer).items() if name not in _kept_by_torch()}


@functools.cache
def _kept_by_torch() -> frozenset[str]:
    import torch

    return frozenset(vars(torch.nn.Module()))


def _numbers(value: Any) -> memoryview | None:
    """The bytes of a tensor or array."""
    import torch

    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        return dense.flatten().view(torch.uint8).numpy().data
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return memoryview(np.ascontiguousarray(value).tobytes())
    return None


def _state(value: Any) -> Any:
    """What decides what an object does; None where only its representation can say it."""
    import torch

    if isinstance(value, torch.nn.Module):  # in a list, where torch does not look for layers
        return own_attributes(value), value._parameters, value._buffers, value._modules
    modules = [kind.__module__ for kind in type(value).__mro__]
    if any(map(_AT_WORK.match, modules)):
        return ()
    # Symbols, such as the batch of an exported program, keep a hash that no other process has.
    if isinstance(value, _WRITTEN_OUT) or any(name.startswith("sympy.") for name in modules):
        return None
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, np.ndarray):
        return value.tolist()
    return object.__getstate__(value)  # not what its class makes of it


def _name(value: Any) -> str:
    """Of a type, function or module."""
    name = getattr(value, "__qualname__", None) or value.__name__
    return f"{getattr(value, '__module__', None)}.{name}"
