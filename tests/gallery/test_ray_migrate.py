"""A migration over Ray's workers is that of one machine, also where a worker dies."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("ray", reason="needs the ray extra")
pytest.importorskip("pyarrow", reason="needs the parquet extra")

pytestmark = pytest.mark.slow

SETTING = """
import os, signal, sys
import numpy as np, ray, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.gallery.test_migrate import IDS, ROWS, content, linear, write_npy, write_parquet, write_parquet_folder
from pml_compat.gallery import migrate, migrate_with_ray, open_store
from pml_compat.transformations import LinearTransformation

class Fatal(LinearTransformation):
    '''Kills the process of a worker once, in the midst of the work.'''

    marker = driver = None

    def transform(self, embeddings, side_info):
        if self.marker is not None and os.getpid() != self.driver and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().transform(embeddings, side_info)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
"""


def run(code, folder):
    text = SETTING + textwrap.indent(textwrap.dedent(code), "    ")
    script = folder / "script.py"
    script.write_text(text)
    root = os.getcwd()
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_workers_write_what_one_machine_writes(tmp_path):
    run(
        """
        for write in (write_parquet, write_parquet_folder):
            here = folder / write.__name__
            here.mkdir()
            old, new = write(here)
            local = new.replace("new", "local")
            migrate(old, local, linear(), batch_size=40, normalize=True, progress=False)
            found = migrate_with_ray(old, new, linear(), batch_size=40, normalize=True, workers=2)
            assert (found["status"], found["done"]) == ("finished", ROWS) and found["read_back"] > 0
            one, two = (list(content(address).values()) for address in (new, local))
            assert one == two
            assert migrate_with_ray(old, new, linear(), batch_size=40, normalize=True) == found
        old, new = write_npy(folder)
        migrate(old, new, linear(), progress=False)
        before = content(new)
        try:
            migrate_with_ray(old, new, linear())
        except ValueError as error:
            assert "must be Parquet or Lance" in str(error)
        else:
            raise AssertionError("no error")
        assert content(new) == before
        """,
        tmp_path,
    )


def test_a_worker_that_dies_is_replaced(tmp_path):
    run(
        """
        import cloudpickle
        cloudpickle.register_pickle_by_value(sys.modules["__main__"])
        old, new = write_parquet_folder(folder)
        fatal = Fatal(8, 5)
        torch.nn.init.normal_(fatal.linear.weight, generator=torch.Generator().manual_seed(0))
        expected = fatal.apply_to(open_store(old).fetch(IDS), progress=False)
        fatal.marker, fatal.driver = str(folder / "died"), os.getpid()
        found = migrate_with_ray(old, new, fatal, batch_size=25, workers=2)
        assert os.path.exists(fatal.marker) and found["done"] == ROWS
        np.testing.assert_allclose(open_store(new).fetch(IDS), expected, rtol=1e-5, atol=1e-6)
        assert sorted(i for b in open_store(new).batches(77) for i in b.ids.tolist()) == IDS.tolist()
        """,
        tmp_path,
    )


def test_lance_over_two_workers(tmp_path):
    pytest.importorskip("lance", reason="needs the lance extra")
    run(
        """
        from tests.gallery.test_more_stores import write_lance
        write_lance(folder)
        old = str(folder / "old.lance")
        local = migrate(old, str(folder / "local.lance"), linear(), batch_size=40, progress=False)
        found = migrate_with_ray(old, str(folder / "new.lance"), linear(), batch_size=40, workers=2)
        assert (found["status"], found["done"]) == ("finished", ROWS) and found["read_back"] > 0
        one, two = (list(open_store(str(folder / f"{name}.lance")).batches(77)) for name in ("new", "local"))
        for left, right in zip(one, two, strict=True):
            assert (left.ids == right.ids).all() and (left.vectors == right.vectors).all()
            assert left.records() == right.records()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("mapped", [True, False])
def test_side_information_reaches_every_worker(mapped, tmp_path):
    run(
        f"""
        from pml_compat.transformations import FCTTransformation
        mapped = {mapped}
        """
        """
        old, new = write_parquet_folder(folder)
        torch.manual_seed(0)
        through = FCTTransformation(8, 5, side_features=3, hidden_features=16)
        side = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("f")
        order = np.random.default_rng(1).permutation(ROWS)
        np.save(folder / "side.npy", side[order])
        given = {"side_info": folder / "side.npy" if mapped else side[order], "side_ids": IDS[order]}
        found = migrate_with_ray(old, new, through, batch_size=40, workers=2, **given)
        expected = through.apply_to(open_store(old).fetch(IDS), side, progress=False)
        np.testing.assert_allclose(open_store(new).fetch(IDS), expected, rtol=1e-4, atol=1e-5)
        """,
        tmp_path,
    )
