"""What carrying a Parquet gallery over costs: a map's run against the same reading and writing without one.

    python benchmarks/migrate.py                 # 1,000,000 x 256, linear and FCT
    python benchmarks/migrate.py --rows 200000

The unmapped run goes through the same store and writer, and leaves every vector as it is. Runs alternate; the ratio is
of their medians. Peak memory is of this process, embeddings of the reader and the writer included.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from pml_compat.gallery import migrate
from pml_compat.transformations import FCTTransformation, LinearTransformation, Transformation


class Unmapped(Transformation):
    """Gives back what it is given."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def apply_to(self, source: np.ndarray, side_info: None = None, **settings: object) -> np.ndarray:
        """Return what came in."""
        return source

    def config(self) -> dict[str, int]:
        """Return the width."""
        return {"features": self.in_features}


def write_gallery(path: Path, rows: int, width: int) -> None:
    """Write row groups of 65,536, as most writers do."""
    rng = np.random.default_rng(0)
    writer = None
    for start in range(0, rows, 65536):
        count = min(65536, rows - start)
        values = pyarrow.array(rng.standard_normal(count * width, np.float32))
        vectors = pyarrow.FixedSizeListArray.from_arrays(values, width)
        table = pyarrow.table({"id": np.arange(start, start + count), "vector": vectors})
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def seconds_of(transformation: Transformation, old: Path, folder: Path) -> float:
    new = folder / "new"
    start = time.perf_counter()
    migrate(old, new, transformation, progress=False)
    taken = time.perf_counter() - start
    shutil.rmtree(new)
    (folder / "new.manifest.json").unlink()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=2048, help="of FCT's network")
    parser.add_argument("--maps", nargs="+", choices=["linear", "FCT"], default=["linear", "FCT"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width = options.width
    maps = {
        "unmapped": Unmapped(width),
        "linear": LinearTransformation(width, width),
        "FCT": FCTTransformation(width, width, hidden_features=options.hidden).eval(),
    }
    maps = {name: maps[name] for name in ("unmapped", *options.maps)}
    times: dict[str, list[float]] = {name: [] for name in maps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_gallery(folder / "old.parquet", options.rows, width)
        for _ in range(options.repeats):
            for kind, transformation in maps.items():
                times[kind].append(seconds_of(transformation, folder / "old.parquet", folder))
    base = statistics.median(times["unmapped"])
    for kind, values in times.items():
        median = statistics.median(values)
        print(f"{kind:10} {median:7.1f} s   {base / median:5.2f} of the speed unmapped   {values}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
