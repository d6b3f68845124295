"""The parquet side of a dataset: schema with Hugging Face's feature types, task and episode tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spatial_forcing.data.info import TASKS_FILE, DatasetInfo, Feature
from spatial_forcing.errors import DataError
from spatial_forcing.storage import replace_file

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def frame_schema(info: DatasetInfo) -> pa.Schema:
    """The schema of `data/`: one row a frame; `datasets` reads the types from the schema's metadata."""
    stored = {key: f for key, f in info.features.items() if f["dtype"] != "video"}
    columns = [pa.field(key, _arrow_type(feature)) for key, feature in stored.items()]
    features = {key: _hugging_face_type(feature) for key, feature in stored.items()}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def frame_table(info: DatasetInfo, columns: Mapping[str, Any]) -> pa.Table:
    """An Arrow table from numpy arrays (N, ...) and, for images, lists of N encoded files."""
    schema = frame_schema(info)
    return pa.table([_arrow_array(columns[f.name], f.type) for f in schema], schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    """Write one parquet file beside `path` and rename."""
    replace_file(path, lambda beside: pq.write_table(table, beside, compression="snappy"))


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one parquet file. Raises `DataError` when it is missing or truncated."""
    try:
        return pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it is missing or truncated. "
            "Restore it from where you got it or re-record its episodes."
        ) from error


def write_tasks(root: Path, tasks: Sequence[str]) -> None:
    """Write `meta/tasks.parquet`; pandas and LeRobot read `task` as the index."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            _pandas_column("task_index", "int64", "int64"),
            _pandas_column("task", "unicode", "object"),
        ],
        "pandas_version": "2.0.0",
    }
    write_table(root / TASKS_FILE, table.replace_schema_metadata({"pandas": json.dumps(pandas)}))


def read_tasks(root: Path) -> dict[int, str]:
    """Task sentences by `task_index`, whose numbers may have gaps.

    Raises:
        DataError: the table cannot be read, lacks a column, or gives one index twice.
    """
    table = read_table(root / TASKS_FILE)
    name = "task" if "task" in table.column_names else "__index_level_0__"
    if not {"task_index", name} <= set(table.column_names):
        raise DataError(
            f"{root / TASKS_FILE} has the columns {table.column_names}; expected task_index and task."
        )
    numbers, tasks = table["task_index"].to_pylist(), table[name].to_pylist()
    if len(set(numbers)) != len(numbers):
        raise DataError(f"{root / TASKS_FILE} gives a task_index twice ({sorted(numbers)}).")
    return dict(sorted(zip(numbers, tasks, strict=True)))


def to_numpy(column: pa.ChunkedArray, shape: Sequence[int] | None) -> np.ndarray[Any, Any]:
    """A numeric column as (N, *shape); (N,) for shape (1,) stored as a scalar.

    With `shape` None a row has as many numbers as its first one: (N, n).

    Raises:
        DataError: a row has another number of entries, or is null.
    """
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = len(values)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    while pa.types.is_nested(values.type):
        values = values.flatten()
    if shape is None:
        shape = (len(values) // rows if rows else 0,)
        return to_numpy(column, shape).reshape(rows, -1)
    scalars = tuple(shape) == (1,)
    wanted = rows * int(np.prod(shape))
    if len(values) != wanted or values.null_count:
        raise DataError(
            f"a column holds {len(values)} numbers ({values.null_count} null) in {rows} rows; expected "
            f"{wanted} for shape {tuple(shape)}. Run `spatial-forcing data check`."
        )
    array = values.to_numpy(zero_copy_only=False)
    return array if scalars else array.reshape(rows, *shape)


def image_bytes(column: pa.ChunkedArray, row: int) -> bytes:
    """The encoded file in one row of an image column."""
    cell = column[row].as_py()
    if cell is None or cell.get("bytes") is None:
        raise DataError(
            f"row {row} of an image column holds no bytes (only path {cell and cell.get('path')!r}); "
            "embed the images in the parquet files."
        )
    data: bytes = cell["bytes"]
    return data


def _arrow_type(feature: Feature) -> pa.DataType:
    if feature["dtype"] == "image":
        return IMAGE_TYPE
    value = pa.from_numpy_dtype(feature["dtype"])
    shape = tuple(feature["shape"])
    if shape == (1,):
        return value
    if len(shape) == 1:
        return pa.list_(value, shape[0])
    for _ in shape:
        value = pa.list_(value)
    return value


def _hugging_face_type(feature: Feature) -> dict[str, Any]:
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    shape = list(feature["shape"])
    value = {"dtype": feature["dtype"], "_type": "Value"}
    if shape == [1]:
        return value
    if len(shape) == 1:
        # "Sequence" is read by every version of `datasets`; newer ones call it "List".
        return {"feature": value, "length": shape[0], "_type": "Sequence"}
    return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}


def _arrow_array(values: Any, kind: pa.DataType) -> pa.Array:
    if kind == IMAGE_TYPE:
        nothing = pa.nulls(len(values), pa.string())
        return pa.StructArray.from_arrays([pa.array(values, pa.binary()), nothing], fields=list(kind))
    array = np.asarray(values)
    flat = pa.array(array.reshape(-1))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    if not pa.types.is_nested(kind):
        return flat.cast(kind)
    for size in reversed(array.shape[1:]):
        offsets = pa.array(np.arange(0, len(flat) + 1, size, dtype=np.int32))
        flat = pa.ListArray.from_arrays(offsets, flat)
    return flat.cast(kind)


def _pandas_column(name: str, pandas: str, numpy: str) -> dict[str, Any]:
    return {
        "name": name,
        "field_name": name,
        "pandas_type": pandas,
        "numpy_type": numpy,
        "metadata": None,
    }
