"""Mistakes that the state machine of `night_machine.py` must find, or it shows nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pipeline.run
from pipeline import lane_child
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage


def write_in_place() -> None:
    """What most scripts do: files appear while they are written, folders while they are filled."""

    def create(self: LocalStorage, path: str, data: bytes) -> bool:
        final = Path(self.uri) / path
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            return False
        with final.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])
        return True

    def publish(self: LocalStorage, files: dict[str, str], manifest: bytes, target: str) -> bool:
        for name, source in files.items():
            final = Path(self.uri) / target / name
            final.parent.mkdir(parents=True, exist_ok=True)
            os.link(Path(self.uri) / source, final)
        return LocalStorage.create(self, f"{target}/_MANIFEST.json", manifest)

    storage: Any = LocalStorage
    storage.create, storage.publish = create, publish


def let_the_last_win() -> None:
    """Publish in the place of whatever is published."""
    storage: Any = LocalStorage
    publish = storage.publish

    def replace(self: LocalStorage, files: dict[str, str], manifest: bytes, target: str) -> bool:
        shutil.rmtree(Path(self.uri) / target, ignore_errors=True)
        return bool(publish(self, files, manifest, target))

    storage.publish = replace


def forget_commits() -> None:
    """Score everything, committed or not."""
    run, lane, ledger = (_changed(each) for each in (pipeline.run, lane_child, Ledger))
    sound, prepare = ledger.sound_records, run.prepare_run

    def forgetful(*arguments: Any, **options: Any) -> Any:
        ledger.sound_records = lambda _: {}
        try:
            return prepare(*arguments, **options)
        finally:
            ledger.sound_records = sound

    run.prepare_run = forgetful
    lane.pass_over_committed = lambda shards, *_: shards


def mix_inputs() -> None:
    """One run for a date, whatever its input is."""
    _changed(pipeline.run).run_id_of = lambda plan, *_: f"{plan.date}-run"


def _changed(what: Any) -> Any:
    return what


MUTANTS: Mapping[str, Callable[[], None]] = {
    each.__name__: each for each in (write_in_place, let_the_last_win, forget_commits, mix_inputs)
}
