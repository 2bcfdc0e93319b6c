"""CSV files of gigabytes, row by row."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

__all__ = ["csv_rows"]

_ROWS_PER_UPDATE = 1 << 14


def csv_rows(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Sequence[str]]]:
    """Read rows of a CSV file; only one is in memory at a time.

    Args:
        path: File in UTF-8.
        columns: At least two names of its header, in any order: what to return of each row. None
            for all of every row, the first one too.

    Yields:
        Line number, counted from 1, and fields. Empty lines are passed over.

    Raises:
        ValueError: It is no CSV file, lacks a column, or a row is shorter than the columns need.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file. datasets/README.md says where files lie."
        )
    size = path.stat().st_size
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, bar:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        try:
            pick = None if columns is None else _picker(path, next(reader, []), columns)
            for number, row in enumerate(reader):
                if number % _ROWS_PER_UPDATE == 0:
                    bar.update(file.tell() - bar.n)
                if row:
                    yield reader.line_num, row if pick is None else pick(row)
        except IndexError:
            raise ValueError(
                f"{path}, line {reader.line_num} has fewer fields than its header. Download the "
                "file again."
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: is no CSV text ({error}). Download it "
                "again, and unpack it."
            ) from None
        bar.update(file.tell() - bar.n)


def _picker(path: Path, header: Sequence[str], columns: Sequence[str]) -> itemgetter:
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}; its first line is "
            f"{','.join(header)!r:.120}. Required are {', '.join(columns)}."
        )
    return itemgetter(*map(header.index, columns))
