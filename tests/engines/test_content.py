"""Fingerprints of torch models: what changes the answers is noticed, another process is not."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.content import MAX_DEPTH, Contents
from engines.errors import ModelError
from engines.model import FeatureInput, ModelSpec, fingerprint_model

ROOT = Path(__file__).parents[2]
KEPT = """
import functools, types
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
import numpy as np
import torch

NUMBER = float(Path(__file__).with_name("number.txt").read_text())

@dataclass
class Config: t: float
@dataclass(frozen=True, slots=True)
class Slotted: t: float
class Plain:
    def __init__(self, t): self.t = t
class Mode(Enum):
    COLD, HOT = 1.0, 4.0
class Called(Plain):
    def __call__(self, x): return x / self.t
class Number(float): pass

class Net(torch.nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.linear = torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.linear(x)
def layer(t):
    made = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(made.weight, t)
    torch.nn.init.constant_(made.bias, 0.0)
    return made
class Stateful(Net):
    def get_extra_state(self): return {"t": NUMBER}

def made(kept):
    torch.manual_seed(0)
    return Net(kept)
def a_list(): return made([NUMBER])
def a_dict(): return made({"t": {"of": NUMBER}})
def an_ordered_dict(): return made(OrderedDict(t=NUMBER))
def a_proxy(): return made(types.MappingProxyType({"t": NUMBER}))
def a_set(): return made({"cold" if NUMBER == 1 else "hot", "other"})
def a_deque(): return made(deque([NUMBER]))
def a_tuple_of_lists(): return made(([NUMBER], 2))
def a_numpy_number(): return made(np.float32(NUMBER))
def an_array(): return made([np.full((2, 2), NUMBER)])
def objects_in_an_array(): return made(np.array([[NUMBER], None], dtype=object))
def a_tensor(): return made({"scale": torch.tensor(NUMBER, dtype=torch.bfloat16)})
def a_dataclass(): return made(Config(NUMBER))
def a_class_with_slots(): return made(Slotted(NUMBER))
def a_namespace(): return made(types.SimpleNamespace(inner=Plain([NUMBER])))
def an_enum(): return made(Mode(NUMBER))
def a_partial(): return made(functools.partial(torch.clamp, min=NUMBER))
def a_callable_object(): return made(Called(NUMBER))
def a_number_of_ones_own(): return made(Number(NUMBER))
def a_function(): return made(torch.relu if NUMBER == 1 else torch.tanh)
def a_path(): return made(Path(str(NUMBER)))
def a_dtype(): return made([torch.float32 if NUMBER == 1 else torch.float16])
def a_layer_in_a_list(): return made([layer(NUMBER)])
def extra_state():
    torch.manual_seed(0)
    return Stateful(None)
"""
KINDS = [
    line[4:].split("(")[0] for line in KEPT.splitlines() if line.startswith(("def a", "def ob"))
]
STRANGE = """
import logging, random, tempfile, threading, weakref
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 2)
        self.names = {"red", "green", "blue", "yellow"}
        self.by_name = {name: len(name) for name in self.names}
        self.something = object()
        self.itself = [self]
        self.parent = weakref.ref(self)
        self.lock = {"of": threading.RLock()}
        self.ready = threading.Event()
        self.workers = ThreadPoolExecutor(1)
        self.workers.submit(int).result()
        self.log = logging.getLogger(__name__)
        self.draws = [random.Random(), np.random.default_rng(), torch.Generator()]
        self.rows = (row for row in [])
        self.temporary = tempfile.TemporaryFile()
        for _ in range(random.randrange(1, 9)):
            self.hook = self.linear.register_forward_hook(print)
            self.hook.remove()
        self.method = self.linear.forward
        self.made = lambda x: x
    def forward(self, x):
        return self.linear(x)

def strange():
    return Net()
def seeded(make):
    torch.manual_seed(0)
    return make()
def encoder():
    layer = lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return seeded(lambda: torch.nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))
def lstm(): return seeded(lambda: torch.nn.LSTM(8, 4, num_layers=2))
def sequential():
    return seeded(lambda: torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)))
def parametrised():
    norm = torch.nn.utils.parametrizations
    return seeded(lambda: norm.weight_norm(norm.spectral_norm(torch.nn.Linear(8, 4))))
def half(): return sequential().bfloat16()
def exported():
    batch = {0: torch.export.Dim("batch")}
    example = (torch.zeros(2, 8),)
    return torch.export.export(sequential().eval(), example, dynamic_shapes=(batch,)).module()
def graph(): return torch.fx.symbolic_trace(seeded(lambda: torch.nn.Linear(8, 4)))
"""
MODELS = ["strange", "encoder", "lstm", "sequential", "parametrised", "half", "exported", "graph"]
PRINT_ALL = """
import sys
from engines.model import FeatureInput, ModelSpec, fingerprint_model
for source in sys.argv[1:]:
    spec = ModelSpec(source=source, input=FeatureInput(num_features=4), head="scores")
    print(fingerprint_model(spec))
"""


def spec_of(source: str) -> ModelSpec:
    return ModelSpec(source=source, input=FeatureInput(num_features=4), head="scores")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def fingerprint_with(code: Path, kind: str, number: float) -> str:
    (code / "kept.py").write_text(KEPT)
    (code / "number.txt").write_text(str(number))
    sys.modules.pop("kept", None)
    importlib.invalidate_caches()
    return fingerprint_model(spec_of(f"kept:{kind}"))


@pytest.mark.parametrize("kind", [*KINDS, "extra_state"])
def test_a_number_is_noticed_wherever_a_layer_keeps_it(code: Path, kind: str) -> None:
    first = fingerprint_with(code, kind, 1.0)
    assert fingerprint_with(code, kind, 1.0) == first
    assert fingerprint_with(code, kind, 4.0) != first


def test_another_process_finds_the_same_fingerprints(code: Path) -> None:
    (code / "strange.py").write_text(STRANGE)
    sources = [f"strange:{name}" for name in MODELS]
    sources += ["engines.demo_models:efficientnet_lite0", "engines.demo_models:ranking_mlp"]
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-c", PRINT_ALL, *sources]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{code}:{ROOT}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        found.append(dict(zip(sources, done.stdout.split(), strict=True)))
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(sources)


@pytest.mark.parametrize(
    ("name", "said"),
    [("meta", "weight: .*no data"), ("lazy", "weight: "), ("sparse", "extra: ")],
)
def test_a_model_without_values_to_hash_is_refused_in_one_line(name: str, said: str) -> None:
    source = f"{__name__}:{name}_model"
    with pytest.raises(ModelError, match=rf"{source}: {said}.*expected dense tensors") as caught:
        fingerprint_model(spec_of(source))
    assert "\n" not in str(caught.value)


def meta_model() -> torch.nn.Module:
    return torch.nn.Linear(4, 2, device="meta")


def lazy_model() -> torch.nn.Module:
    return torch.nn.LazyLinear(2)


def sparse_model() -> torch.nn.Module:
    model = torch.nn.Linear(4, 2)
    model.register_buffer("extra", torch.eye(3).to_sparse())
    return model


def test_values_that_hold_each_other_come_to_an_end() -> None:
    first: list[object] = [1]
    first.append({"back": first})
    deep: list[object] = []
    for _ in range(20 * MAX_DEPTH):
        deep = [deep]
    assert Contents().digest(first) == Contents().digest(first)
    assert Contents().digest(first) != Contents().digest([1])
    assert Contents().digest(deep) == Contents().digest(deep)


def test_equal_values_have_equal_digests_whether_they_are_one_object_or_two() -> None:
    shared = [1, 2]
    contents = Contents()
    assert contents.digest([shared, shared]) == contents.digest([[1, 2], [1, 2]])
    assert contents.digest({"a": 1, "b": 2}) == contents.digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        ([1, 2], [2, 1]),
        (["ab"], ["a", "b"]),
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (torch.zeros(4), torch.zeros(2, 2)),
        ({"a": None}, {"a": ()}),
    ],
    ids=str,
)
def test_values_that_differ_have_other_digests(first: object, second: object) -> None:
    assert Contents().digest(first) != Contents().digest(second)


def test_what_is_at_work_enters_by_its_type_alone() -> None:
    digests = [Contents().digest(value) for value in (threading.Lock(), threading.Lock())]
    assert digests[0] == digests[1] != Contents().digest(threading.RLock())
    loggers = [Contents().digest(logging.getLogger(name)) for name in ("one", "two")]
    assert loggers[0] == loggers[1]
