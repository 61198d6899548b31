"""What a command wrote, read back: every row is there once, and how good the answers are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.process_tree import CommandError

LABELS = "labels"
WEIGHTS_PERIOD = 1009


def read_answers(folder: Path, columns: tuple[str, ...]) -> pa.Table:
    """Columns id, answer and, where it is asked for, label of all Parquet files below a folder.

    Args:
        folder: What was written; files whose path has a `_` first are not the output itself.
        columns: Their names there. Whatever type a framework wrote an id as is kept.

    Raises:
        CommandError: There is nothing, or an id is there twice.
    """
    files = [
        path
        for path in sorted(folder.glob("**/*.parquet"))
        if not any(part.startswith("_") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise CommandError(f"{folder}: no Parquet file; expected the scored rows")
    tables = [pq.read_table(path, columns=list(columns), partitioning=None) for path in files]
    table = pa.concat_tables(tables, promote_options="permissive")
    table = table.select(columns).rename_columns(["id", "answer", "label"][: len(columns)])
    num_ids = pc.count_distinct(table["id"]).as_py()
    if num_ids != table.num_rows:
        raise CommandError(f"{table.num_rows:,} rows with {num_ids:,} ids; expected each id once")
    return table


class Marker:
    """Marks answers: the share of right classes, or the weighted mean of scores.

    Without labels (all are negative) the share is that of classes which the first output to be
    marked has too.
    """

    def __init__(self) -> None:
        self._reference: tuple[str, dict[object, int]] | None = None

    def mark(self, name: str, table: pa.Table) -> tuple[float, str]:
        """The mark, and what it is measured against.

        Args:
            name: Whose answers they are.
            table: As `read_answers` returns it; with labels: classes.
        """
        if "label" not in table.column_names:
            # Moves when scores and users are paired wrongly; equal for all on the same model.
            weights = table["id"].to_numpy() % WEIGHTS_PERIOD
            return float(np.average(table["answer"].to_numpy(), weights=weights)), "all users"
        answers, labels = table["answer"].to_numpy(), table["label"].to_numpy()
        if labels.max() >= 0:
            return float(np.mean(answers == labels)), LABELS
        given = dict(zip(table["id"].to_pylist(), answers.tolist(), strict=True))
        self._reference = self._reference or (name, given)
        against, expected = self._reference
        shared = given.keys() & expected.keys()
        return sum(given[row] == expected[row] for row in shared) / len(shared), against
