import numpy as np
import pytest
import torch

from pml_compat.frozen import FrozenEmbeddings
from pml_compat.frozen.anchors import anchors_of_index, learned_anchors

WIDTH = 8


def vectors(n=700, seed=0):
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def trained(name):
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(WIDTH, name)
    index.verbose = False
    index.train(vectors())
    return faiss, index


def nearest(rows, anchors):
    return ((rows[:, None] - anchors) ** 2).sum(2).argmin(1)


@pytest.mark.parametrize("name", ["IVF8,Flat", "IVF8_HNSW8,SQ8", "IVF8,PQ4x4", "IDMap2,IVF8,Flat", "IVF8,Flat,RFlat"])
def test_lists_are_found_by_their_centroids(name):
    """Also where the codes are a product quantiser's, of what is left of a vector beside its centroid."""
    faiss, index = trained(name)
    anchors = anchors_of_index(index)
    assert anchors.shape == (8, WIDTH)
    ivf = faiss.extract_index_ivf(index)
    places = ivf.quantizer.search(vectors(50, 1), 1)[1][:, 0]
    assert places.tolist() == nearest(vectors(50, 1), anchors.numpy()).tolist()


def test_where_pml_has_made_faiss_give_tensors():
    """PML imports this module, which changes faiss for the whole process."""
    faiss, index = trained("IVF8,Flat")
    before = anchors_of_index(index)
    pytest.importorskip("faiss.contrib.torch_utils")
    assert isinstance(faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, 8), torch.Tensor)
    assert torch.equal(anchors_of_index(index), before)


@pytest.mark.parametrize("name", ["OPQ4,IVF8,Flat", "PCAR5,IVF8,Flat", "OPQ4_8,IVF8,PQ4x4"])
def test_centroids_of_mapped_vectors_are_mapped_back(name):
    faiss, index = trained(name)
    anchors = anchors_of_index(index)
    assert anchors.shape == (8, WIDTH)
    mapped = faiss.downcast_VectorTransform(index.chain.at(0)).apply(anchors.numpy())
    expected = faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, 8)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["PQ4x4", "IDMap,PQ4x4", "HNSW8_PQ4x4", "PQ4x4,RFlat", "PQ4x4fs"])
def test_a_product_quantisers_codebooks_give_what_its_codes_give(name):
    faiss, index = trained(name)
    anchors = anchors_of_index(index).numpy()
    assert anchors.shape == (4, 16, 2)
    rows = vectors(20, 1)
    parts = [book[nearest(part, book)] for part, book in zip(np.split(rows, 4, 1), anchors, strict=True)]
    plain = faiss.IndexPQ(WIDTH, 4, 4)
    plain.pq = _quantiser(faiss, index)
    plain.is_trained = True
    np.testing.assert_allclose(plain.sa_decode(plain.sa_encode(rows)), np.concatenate(parts, 1), atol=1e-6)


def _quantiser(faiss, index):
    while not hasattr(index, "pq"):
        index = next(getattr(index, name) for name in ("base_index", "storage", "index") if hasattr(index, name))
        index = faiss.downcast_index(index)
    return index.pq


def test_the_anchors_outlive_the_index():
    _, index = trained("IVF8,Flat")
    anchors = anchors_of_index(index)
    before = anchors.clone()
    del index
    assert anchors.equal(before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Flat",
            r"index must have IVF lists or a .* got IndexFlat.*, which has neither; learn anchors",
        ),
        ("HNSW8", r"index must have IVF lists or a product quantiser, got IndexFlat.*, which has neither"),
        ("SQ8", r"index must have .* got IndexScalarQuantizer, which has neither"),
        ("OPQ4,PQ4x4", r"index must have .* got IndexPQ, whose codes are of mapped vectors"),
    ],
)
def test_an_index_without_anchors(name, message):
    _, index = trained(name)
    with pytest.raises(ValueError, match=message):
        anchors_of_index(index)


def test_what_is_no_trained_index():
    faiss = pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=r"index must be trained, got IndexIVFFlat that is not"):
        anchors_of_index(faiss.index_factory(WIDTH, "IVF8,Flat"))
    with pytest.raises(ValueError, match=r"index must be a faiss index, got str; read a file by faiss.read_index"):
        anchors_of_index("old.faiss")


def test_learned_anchors_are_means_of_the_unit_rows_nearest_to_them():
    pytest.importorskip("sklearn")
    rows = vectors()
    books = learned_anchors(torch.from_numpy(rows), 5, 2, 0).numpy()
    assert books.shape == (2, 5, WIDTH // 2) and books.dtype == np.float32
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for part, book in zip(np.split(unit, 2, 1), books, strict=True):
        own = nearest(part, book)
        means = np.stack([part[own == place].mean(0) for place in range(5)])
        np.testing.assert_allclose(book, means, atol=0.03)  # k-means stops near its end


def test_learned_anchors_of_stored_embeddings(tmp_path):
    pytest.importorskip("sklearn")
    rows = torch.from_numpy(vectors())
    frozen = FrozenEmbeddings.write(tmp_path / "old", [(rows.half(), torch.arange(len(rows)))])
    expected = learned_anchors(rows.half(), 2, 1, 3)
    for given in (frozen, rows.half().numpy()):
        assert learned_anchors(given, 2, 1, 3).equal(expected)
    assert not learned_anchors(rows.half(), 2, 1, 4).equal(expected)  # 512 other rows


def test_no_more_rows_are_read_than_are_learned_from():
    pytest.importorskip("sklearn")
    rows = np.full((10_000, WIDTH), np.nan, np.float32)
    order = np.random.default_rng(0).permutation(10_000)
    rows[order[:512]] = vectors(512)
    assert learned_anchors(rows, 2, 2, 0).isfinite().all()
    with pytest.raises(ValueError, match=r"embeddings must be finite, row \d+ has a NaN"):
        learned_anchors(rows, 3, 2, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 2, 0), r"count must be an integer of at least 2, got 1"),
        ((4, 3, 0), r"subspaces must divide the width of the embeddings, 8, got 3"),
        ((4, 0, 0), r"subspaces must be an integer of at least 1, got 0"),
        ((4, 2, -1), r"seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_numbers(given, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        learned_anchors(vectors(), *given)
