import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.frozen import WithinClassWhitening, within_class_whitening
from tests import reference
from tests.pairwise import pairwise

HALF = [torch.float16, torch.bfloat16]


def data(seed=0, n=80, d=5, classes=4, dtype=torch.float64):
    """Return rows of any length, which vary more in some directions than in others, and labels that are not 0 to C-1"""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) * 3 + 2
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 1.0, d)
    centers = torch.randn(classes * 3 + 2, d, generator=generator, dtype=torch.float64)
    return (2 * centers[labels] + noise).to(dtype), labels


def build(dtype=torch.float64, **kwargs):
    return WithinClassWhitening.from_embeddings(*data(**kwargs)).to(dtype)


# Values.


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shrinkage", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_matches_naive_loop(seed, shrinkage, labelled):
    old, labels = data(seed)
    whitening = WithinClassWhitening.from_embeddings(old, labels if labelled else None, shrinkage=shrinkage)
    mean, matrix = reference.within_class_whitening(
        old.numpy(), labels.tolist() if labelled else [0] * len(old), shrinkage
    )
    np.testing.assert_allclose(whitening.mean, mean, atol=1e-6)
    np.testing.assert_allclose(whitening.matrix, matrix, rtol=1e-5, atol=1e-5)
    expected = np.array([(reference.unit(row) - mean) @ matrix for row in old.numpy()])
    np.testing.assert_allclose(whitening(old), expected, rtol=1e-5, atol=1e-5)
    queries = np.array([reference.unit(row @ matrix) for row in expected])
    np.testing.assert_allclose(whitening.query(whitening(old)), queries, rtol=1e-5, atol=1e-5)


def test_by_hand():
    # Unit rows (1, 0) and (0, 1): S = [[1, -1], [-1, 1]] / 4, its mean variance 1 / 4. With half of it twice over added
    # to each direction S has 1 along (1, -1) and 1 / 2 along (1, 1): A has 1 and the root of 2.
    whitening = WithinClassWhitening.from_embeddings(torch.tensor([[2.0, 0.0], [0.0, 7.0]]), shrinkage=2.0)
    more, less = (math.sqrt(2) + 1) / 2, (math.sqrt(2) - 1) / 2
    torch.testing.assert_close(whitening.mean, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(whitening.matrix, torch.tensor([[more, less], [less, more]]))
    torch.testing.assert_close(whitening(torch.tensor([[9.0, 0.0]])), torch.tensor([[0.5, -0.5]]))
    torch.testing.assert_close(whitening.query(torch.tensor([[0.5, -0.5]])), torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    # (0, -1): (-0.5, -1.5) = -(1, 1) + (0.5, -0.5)
    root = math.sqrt(2)
    torch.testing.assert_close(whitening(torch.tensor([[0.0, -0.1]])), torch.tensor([[0.5 - root, -0.5 - root]]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_makes_the_scatter_within_classes_round(seed):
    old, labels = data(seed)
    whitened = WithinClassWhitening.from_embeddings(old, labels, shrinkage=1e-9)(old)
    for label in labels.unique():
        whitened[labels == label] -= whitened[labels == label].mean(0)
    torch.testing.assert_close(whitened.t() @ whitened / len(old), torch.eye(5).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_labels_the_covariance_as_a_whole_becomes_round(seed):
    old, _ = data(seed)
    whitened = WithinClassWhitening.from_embeddings(old, shrinkage=1e-9)(old)
    torch.testing.assert_close(whitened.t() @ whitened / len(old), torch.eye(5).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-5)


def test_large_shrinkage_leaves_the_directions_as_they_are():
    old, labels = data()
    whitening = WithinClassWhitening.from_embeddings(old, labels, shrinkage=1e6)
    matrix = whitening.matrix / whitening.matrix[0, 0]
    torch.testing.assert_close(matrix, torch.eye(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_queries_rank_the_stored_rows_as_whitened_inner_products_do(seed):
    whitening, (old, _) = build(seed=seed), data(seed)
    whitened = whitening(data(seed + 10)[0][:20])
    found = whitening.query(whitened) @ normalize(old, dim=1).t()
    expected = whitened @ whitening(old).t()
    # Equal up to one positive factor and one constant a query.
    ratio = (expected[:, 1:] - expected[:, :1]) / (found[:, 1:] - found[:, :1])
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.min() > 0 and found.argsort(1).equal(expected.argsort(1))
    assert not found.argsort(1).equal((normalize(data(seed + 10)[0][:20]) @ normalize(old).t()).argsort(1))


def test_queries_are_unit_rows_of_any_length_of_what_is_asked():
    whitening, (old, _) = build(), data()
    whitened = whitening(old)
    torch.testing.assert_close(whitening.query(whitened).norm(dim=1), torch.ones(80).double())
    torch.testing.assert_close(whitening.query(7 * whitened), whitening.query(whitened))


def test_tells_classes_apart_where_noise_hides_them():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 20
    noise = torch.randn(300, 16, generator=generator) * torch.tensor(4 * [3.0] + 12 * [0.5])
    old = torch.randn(20, 16, generator=generator)[labels] + noise
    whitening = WithinClassWhitening.from_embeddings(old, labels)

    def right(scores):
        return (labels[scores.fill_diagonal_(-torch.inf).argmax(1)] == labels).float().mean()

    stored = normalize(old, dim=1)
    assert right(whitening.query(whitening(old)) @ stored.t()) > right(stored @ stored.t()) + 0.2


# What it must not depend on.


def test_lengths_of_the_rows_do_not_matter():
    old, labels = data()
    lengths = torch.rand(80, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100 + 0.01
    one, other = build(), WithinClassWhitening.from_embeddings(old * lengths, labels).double()
    torch.testing.assert_close((other.mean, other.matrix), (one.mean, one.matrix))
    torch.testing.assert_close(one(old * lengths), one(old))


def test_order_of_the_rows_and_names_of_the_labels_do_not_matter():
    old, labels = data()
    order = torch.randperm(80)
    one = build()
    for given in [
        (old[order], labels[order]),
        (old, 2**60 - labels),
        (old, labels.int()),
        (old.numpy(), labels.numpy()),
        (old, labels - 11),
    ]:
        other = WithinClassWhitening.from_embeddings(*given).double()
        torch.testing.assert_close((other.mean, other.matrix), (one.mean, one.matrix))


def test_labels_matter():
    old, labels = data()
    assert (WithinClassWhitening.from_embeddings(old, labels.flip(0)).matrix - build().matrix).abs().max() > 0.1
    assert WithinClassWhitening.from_embeddings(old, None).matrix.equal(
        WithinClassWhitening.from_embeddings(old, torch.full((80,), 7)).matrix
    )


@pytest.mark.parametrize("rows", [1, 7, 80])
def test_blocks_give_what_the_whole_gives(rows, monkeypatch):
    one = build()
    monkeypatch.setattr(within_class_whitening, "_BLOCK", rows)
    other = build()
    torch.testing.assert_close((other.mean, other.matrix), (one.mean, one.matrix))


def test_reads_a_memory_map(tmp_path):
    old, labels = data(dtype=torch.float32)
    np.save(tmp_path / "old.npy", old.numpy())
    mapped = np.load(tmp_path / "old.npy", mmap_mode="r")
    assert WithinClassWhitening.from_embeddings(mapped, labels).matrix.equal(
        WithinClassWhitening.from_embeddings(old, labels).matrix
    )


@pytest.mark.parametrize("dtype", HALF)
def test_measures_half_precision_in_float64(dtype):
    old, labels = data(dtype=dtype)
    found = WithinClassWhitening.from_embeddings(old, labels)
    assert found.matrix.dtype == found.mean.dtype == torch.float32
    assert found.matrix.equal(WithinClassWhitening.from_embeddings(old.double(), labels).matrix)


@pytest.mark.parametrize("shrinkage", [0.1, 1e-20])  # past what rounding leaves of the directions without scatter
def test_fewer_rows_than_directions(shrinkage):
    old, labels = data(n=4, d=9, classes=1)
    whitening = WithinClassWhitening.from_embeddings(old, labels, shrinkage=shrinkage)
    assert torch.isfinite(whitening.matrix).all() and torch.isfinite(whitening(old)).all()
    torch.testing.assert_close(whitening.matrix, whitening.matrix.t())


# Gradients.


def test_gradcheck():
    whitening, (old, _) = build(), data(n=4)
    assert torch.autograd.gradcheck(whitening, (old.requires_grad_(),))
    assert torch.autograd.gradcheck(whitening.query, (whitening(old).detach().requires_grad_(),))


def test_nothing_of_it_learns():
    old, labels = data()
    old.requires_grad_()
    whitening = WithinClassWhitening.from_embeddings(old, labels)
    assert not list(whitening.parameters()) and not whitening.matrix.requires_grad and not whitening.mean.requires_grad
    mean, matrix = torch.zeros(2, requires_grad=True), torch.eye(2).requires_grad_()
    given = WithinClassWhitening(mean, matrix)
    assert not given.mean.requires_grad and not given.matrix.requires_grad
    with torch.no_grad():
        matrix.zero_()
    assert given.matrix.equal(torch.eye(2))  # its own


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_rows_of_zero(dtype):
    whitening = build(torch.float32)
    rows = torch.zeros(2, 5, dtype=dtype)
    expected = -whitening.mean @ whitening.matrix
    torch.testing.assert_close(whitening(rows).float(), expected.expand(2, 5), rtol=1e-2, atol=1e-2)
    assert whitening.query(rows).equal(rows)


# Dtypes, copies, state.


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, *HALF])
def test_dtypes(dtype, autocast):
    whitening, old = build(torch.float32), data(dtype=torch.float64)[0].to(dtype)
    expected = build()(old.double())
    before, rows = {name: tensor.dtype for name, tensor in whitening.state_dict().items()}, old.clone()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        whitened = whitening(old)
        queries = whitening.query(whitened)
    assert whitened.dtype == queries.dtype == dtype and old.equal(rows)
    precision = {torch.float16: 1e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-4)
    torch.testing.assert_close(whitened.double(), expected, rtol=0, atol=precision)
    torch.testing.assert_close(queries.double(), build().query(expected), rtol=0, atol=precision)
    assert {name: tensor.dtype for name, tensor in whitening.state_dict().items()} == before


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_copy(dtype):
    whitening, old = build(), data()[0]
    low = copy.deepcopy(whitening).to(dtype)
    found = low.query(low(old.to(dtype)))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), whitening.query(whitening(old)), rtol=0, atol=0.1)


def test_state_dict_round_trip():
    source, target, old = build(), build(seed=1), data()[0]
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert set(source.state_dict()) == {"mean", "matrix"} and not target(old).equal(source(old))
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert target(old).equal(source(old))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda whitening: pickle.loads(pickle.dumps(whitening))])
def test_copies(duplicate):
    whitening, old = build(), data()[0]
    expected = whitening(old)
    copied = duplicate(whitening)
    assert copied(old).equal(expected)
    copied.matrix.zero_()
    assert whitening(old).equal(expected)


def test_rows_do_not_depend_on_each_other():
    whitening, old = build(), data()[0]
    torch.testing.assert_close(whitening(old)[3:4], whitening(old[3:4]))


def test_compiles_in_one_graph():
    whitening, old = build(torch.float32), data(dtype=torch.float32)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows: whitening.query(whitening(rows)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(old), whitening.query(whitening(old)))


def test_shows_its_width():
    assert build().features == 5 and "features=5" in repr(build())


# Errors.


@pytest.mark.parametrize(
    ("mean", "matrix", "message"),
    [
        (torch.zeros(3), torch.eye(2), r"mean must be one row as wide as matrix, \(2,\), got shape \(3,\)"),
        (torch.zeros(1, 2), torch.eye(2), r"mean must be one row as wide as matrix, \(2,\), got shape \(1, 2\)"),
        (torch.zeros(2), torch.ones(2, 3), r"matrix must be 2 wide, got width 3"),
        (torch.zeros(2), torch.ones(2), r"matrix must be 2-dimensional"),
        (torch.zeros(0), torch.ones(0, 0), r"matrix must not be empty"),
        (torch.zeros(2), torch.eye(2).long(), r"matrix must be floating point, got torch.int64"),
    ],
)
def test_bad_arguments(mean, matrix, message):
    with pytest.raises(ValueError, match=message):
        WithinClassWhitening(mean, matrix)


EYE = torch.eye(3)
DIFFER = r"embeddings must differ within classes, got no two different rows of one label"


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (EYE, None, {"shrinkage": 0.0}, r"shrinkage must be a finite number above 0, got 0.0"),
        (EYE, None, {"shrinkage": -1.0}, r"shrinkage must be a finite number above 0, got -1.0"),
        (EYE, None, {"shrinkage": math.nan}, r"shrinkage must be a finite number above 0, got nan"),
        (EYE / 0, None, {}, r"embeddings must be finite, row 0"),
        (EYE * torch.tensor([1.0, 1.0, torch.inf]), None, {}, r"embeddings must be finite, row 0"),
        (EYE, torch.tensor([0, 0]), {}, r"labels must have one entry a row: expected 3, got 2"),
        (EYE, torch.zeros(3), {}, r"labels must be integers, got torch.float32"),
        (torch.zeros(0, 3), None, {}, r"embeddings must not be empty"),
        ([[1.0, 2.0]], None, {}, r"embeddings must be a torch.Tensor or a numpy.ndarray, got list"),
        (EYE, torch.arange(3), {}, DIFFER),
        (EYE[:1], None, {}, DIFFER),
        (torch.tensor([[1.0, 1.0], [3.0, 3.0]]), None, {}, DIFFER),  # one direction, two lengths
        (torch.zeros(4, 2), None, {}, DIFFER),
    ],
)
def test_bad_embeddings(embeddings, labels, options, message):
    with pytest.raises(ValueError, match=message):
        WithinClassWhitening.from_embeddings(embeddings, labels, **options)


@pytest.mark.parametrize("part", ["forward", "query"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 4), r"embeddings must be 5 wide, got width 4"),
        (torch.zeros(5), r"embeddings must be 2-dimensional"),
        (torch.zeros(0, 5), r"embeddings must not be empty"),
        (torch.zeros(2, 5).long(), r"embeddings must be floating point, got torch.int64"),
        (
            torch.zeros(2, 5, device="meta"),
            r"embeddings must be on the device of the WithinClassWhitening: got meta and cpu",
        ),
    ],
)
def test_bad_calls(part, rows, message):
    with pytest.raises(ValueError, match=message):
        getattr(build(), part)(rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_gpu_gives_what_the_cpu_gives(dtype):
    old, labels = data(dtype=torch.float32)
    expected = WithinClassWhitening.from_embeddings(old, labels)
    whitening = WithinClassWhitening.from_embeddings(old.cuda(), labels)  # labels may stay
    torch.testing.assert_close(whitening.matrix.cpu(), expected.matrix)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = whitening.query(whitening(old.cuda()))
    torch.testing.assert_close(found.cpu(), expected.query(expected(old)), rtol=0, atol=1e-5)
