"""Write text as Criteo's log has it: `python experiments/criteo_text.py FILE --rows=500000 [--seed=0]`.

A label (a quarter are 1), 13 counts (a fifth missing, log-normal), 26 hexadecimal categories with the real log's
numbers of values (every third column a tenth missing), drawn so that values keep turning up for the first time.
"""

import argparse

import numpy as np
import pyarrow as pa
from pyarrow import csv

KAGGLE_TABLES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_PIECE_ROWS = 100_000
_HEX = np.frombuffer(b"".join(b"%02x" % i for i in range(256)), "S2")


def hexadecimal(numbers: np.ndarray) -> pa.Array:
    """32-bit numbers as eight hexadecimal digits."""
    digits = _HEX[numbers.astype(">u4").view(np.uint8)]
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), len(numbers), [None, pa.py_buffer(digits.tobytes())])
    return fixed.cast(pa.binary()).cast(pa.string())


def piece(rng: np.random.Generator, num_rows: int) -> pa.Table:
    """Some rows as columns of text; null is missing."""
    columns: list[pa.Array] = [pa.array((rng.random(num_rows) < 0.256).astype(np.int8))]
    for i in range(13):
        counts = np.floor(np.exp(rng.normal(1 + i / 2, 1.2, num_rows))).astype(np.int64) - 1
        columns.append(pa.array(counts, mask=rng.random(num_rows) < 0.2))
    for i, rows in enumerate(KAGGLE_TABLES):
        # Ranks whose logarithm is uniform: about as skewed as the real columns.
        ranks = np.minimum((rows + 1) ** rng.random(num_rows) - 1, rows - 1).astype(np.uint64)
        values = (ranks + np.uint64(i * 77_777_777)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        column = hexadecimal(values.astype(np.uint32))
        if i % 3 == 0:
            column = pa.array(column.to_numpy(zero_copy_only=False), pa.string(), mask=rng.random(num_rows) < 0.1)
        columns.append(column)
    return pa.table(columns, names=[f"c{i}" for i in range(40)])


def write(path: str, num_rows: int, seed: int = 0) -> None:
    """Write `num_rows` rows to `path`."""
    rng = np.random.default_rng(seed)
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with open(path, "wb") as file:
        for start in range(0, num_rows, _PIECE_ROWS):
            csv.write_csv(piece(rng, min(_PIECE_ROWS, num_rows - start)), file, options)


def main() -> None:
    """Flags to file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    write(flags.file, flags.rows, flags.seed)


if __name__ == "__main__":
    main()
