import io

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_compat.losses import CompatibleLoss, SSPLoss
from tests import reference
from tests.pairwise import pairwise

WIDTH = 6


def rows(seed=0, n=7, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old


def anchors(*shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


SHAPES = {"centroids": (5, 6), "two parts": (2, 4, 3), "six parts": (6, 8, 1)}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def loss_of(shape, **kwargs):
    return SSPLoss(anchors(*SHAPES[shape]), **kwargs)


def naive_codebooks(shape):
    given = anchors(*SHAPES[shape]).numpy()
    if given.ndim == 2:
        return [[reference.unit(row) for row in given]]
    mean_squares = [sum(float(c @ c) for c in book) / len(book) for book in given]
    return given / sum(mean_squares) ** 0.5


@pairwise
@every_shape
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", [None, 0.5, 40.0])
def test_matches_naive_loop(shape, seed, scale):
    new, old = rows(seed)
    given = {} if scale is None else {"scale": scale}
    found = loss_of(shape, reducer=reducers.DoNothingReducer(), **given)(new, ref_emb=old)["loss"]
    expected = reference.ssp_losses(new.detach().numpy(), old.numpy(), naive_codebooks(shape), scale or 5)
    torch.testing.assert_close(found["losses"], torch.tensor(expected, dtype=torch.float64))
    assert found["reduction_type"] == "element" and min(expected) > 0
    assert loss_of(shape, **given)(new, ref_emb=old).item() == pytest.approx(np.mean(expected))


def test_by_hand():
    """In the first part nothing changes; in the second 3/4 and 1/4 are turned: 0.5 log 3, of two parts half."""
    codebooks = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]])
    new, old = torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 1.0]])
    # s M |c| / sqrt(2) = log(3) / 2 apart from 0, with anchors that are scaled to 1 / sqrt(2)
    loss = SSPLoss(codebooks, scale=np.log(3) / 2)(new, ref_emb=old)
    assert loss.item() == pytest.approx(0.25 * np.log(3))


@every_shape
def test_the_length_of_the_anchors_does_not_matter(shape):
    """That of an index of rows that were never brought to length 1."""
    new, old = rows()
    twice = SSPLoss(100 * anchors(*SHAPES[shape]))
    torch.testing.assert_close(twice(new, ref_emb=old), loss_of(shape)(new, ref_emb=old))


def test_a_code_of_mean_anchors_has_length_1():
    books = SSPLoss(anchors(2, 4, 3)).old_anchors
    assert books.square().sum(2).mean(1).sum().item() == pytest.approx(1)


@every_shape
def test_gradcheck_and_no_gradient_for_what_is_old(shape):
    new, old = rows(n=4)
    old.requires_grad_()
    loss_func = loss_of(shape)
    assert torch.autograd.gradcheck(lambda x: loss_func(x, ref_emb=old.detach()), new)
    loss_func(new, ref_emb=old).backward()
    assert old.grad is None and new.grad.abs().sum() > 0 and not list(loss_func.parameters())


@every_shape
@pytest.mark.parametrize("n", [1, 3])
def test_where_new_is_old_there_is_nothing_to_learn(shape, n):
    _, old = rows(n=n)
    new = (3 * old).requires_grad_()
    loss = loss_of(shape)(new, ref_emb=old)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and new.grad.abs().max() < 1e-12


@every_shape
@pytest.mark.parametrize("which", ["new", "old"])
def test_rows_of_length_0(shape, which):
    new, old = rows()
    new = new.detach().clone()
    {"new": new, "old": old}[which][2] = 0
    new.requires_grad_()
    loss_of(shape)(new, ref_emb=old).backward()
    assert new.grad.isfinite().all() and (which != "new" or not new.grad[2].any())


@every_shape
def test_order_and_lengths_do_not_matter(shape):
    new, old = rows()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    expected = loss_of(shape)(new, ref_emb=old)
    torch.testing.assert_close(loss_of(shape)(new[order], ref_emb=old[order]), expected)
    torch.testing.assert_close(loss_of(shape)(5 * new, ref_emb=0.1 * old), expected)
    torch.testing.assert_close(SSPLoss(anchors(*SHAPES[shape]).flip(-2))(new, ref_emb=old), expected)


@pytest.mark.parametrize("width", [3, 9])
def test_other_widths_are_fitted(width):
    new, old = rows(width=width)[0], rows(seed=1)[1]
    fitted = torch.nn.functional.pad(new, (0, max(0, WIDTH - width)))[:, :WIDTH]
    found = loss_of("two parts")(new, ref_emb=old)
    torch.testing.assert_close(found, loss_of("two parts")(fitted, ref_emb=old))


@pairwise
@every_shape
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_low_precision_is_computed_in_float32(shape, dtype, autocast):
    new, old = (one.detach().to(dtype) for one in rows())
    new.requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(shape)(new, ref_emb=old)
    loss.backward()
    assert loss.dtype == torch.float32 and new.grad.dtype == dtype
    torch.testing.assert_close(loss, loss_of(shape)(new.detach().float(), ref_emb=old.float()))


def test_anchors_are_saved():
    new, old = rows()
    file = io.BytesIO()
    torch.save(loss_of("two parts").state_dict(), file)
    loaded = SSPLoss(torch.ones(2, 4, 3, dtype=torch.float64))
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert loaded(new, ref_emb=old) == loss_of("two parts")(new, ref_emb=old)


def test_beside_a_task_loss():
    new, old = rows()
    labels = torch.arange(7) % 2
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), loss_of("two parts"), weights=2.0)
    expected = pml_losses.ContrastiveLoss()(new, labels) + 2 * loss_of("two parts")(new, ref_emb=old)
    torch.testing.assert_close(both(new, labels, ref_emb=old), expected)


@pytest.mark.parametrize(
    ("width", "given", "shape"),
    [
        (6, {}, (3, 20, 2)),
        (9, {}, (3, 20, 3)),
        (5, {}, (1, 20, 5)),
        (2, {}, (1, 20, 2)),
        (6, {"subspaces": 1, "count": 4}, (1, 4, 6)),
    ],
)
def test_learned_anchors(width, given, shape):
    pytest.importorskip("sklearn")
    new, old = rows(n=20, width=width)
    loss_func = SSPLoss.from_embeddings(old, scale=2.0, **given)
    assert loss_func.old_anchors.shape == shape and loss_func.scale == 2
    loss_func(new, ref_emb=old).backward()
    again = SSPLoss.from_embeddings(old.numpy(), **given)
    torch.testing.assert_close(again.old_anchors, loss_func.old_anchors)


def test_anchors_of_an_index():
    faiss = pytest.importorskip("faiss")
    stored = torch.nn.functional.normalize(torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    index = faiss.index_factory(WIDTH, "PQ3x4")
    index.train(stored.numpy())
    loss_func = SSPLoss.from_index(index, scale=2.0)
    assert loss_func.old_anchors.shape == (3, 16, 2) and loss_func.scale == 2
    new, old = rows()
    loss_func(new, ref_emb=old).backward()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(5)], r"anchors must be \(K, D\) centroids or \(M, K, D / M\) codebooks, .* got shape \(5,\)"),
        ([torch.ones(1, 5)], r"anchors must be .* K of 2 or more, got shape \(1, 5\)"),
        ([torch.ones(2, 1, 5)], r"anchors must be .* K of 2 or more, got shape \(2, 1, 5\)"),
        ([torch.ones(0, 2, 5)], r"anchors must be .* got shape \(0, 2, 5\)"),
        ([torch.ones(3, 5).long()], r"anchors must be floating point, got torch.int64"),
        ([torch.full((3, 5), torch.inf)], r"anchors must be finite, row 0 has a NaN or an infinity"),
        ([torch.zeros(3, 5)], r"anchors must not be all 0"),
        (["IVF8"], r"anchors must be a torch.Tensor or a numpy.ndarray, got str"),
        ([torch.eye(5), 0], r"scale must be a finite number above 0, got 0"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        SSPLoss(*given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r: (e, None), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r: (e, r[:-1]), r"ref_emb must be shaped like embeddings, .* expected 7 rows, got 6"),
        (lambda e, r: (e, r[:, :4]), r"ref_emb must be 6 wide, got width 4"),
        (lambda e, r: (e * torch.nan, r), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r / 0), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e.to("meta"), r.to("meta")), r"embeddings must be on the device of the loss: got meta and cpu"),
    ],
)
def test_bad_calls(change, message):
    new, old = change(*rows())
    with pytest.raises(ValueError, match=message):
        loss_of("two parts")(new, ref_emb=old)


def test_pairs_and_triplets_are_refused():
    new, old = rows()
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        loss_of("centroids")(new, torch.arange(7), (torch.zeros(1).long(),) * 3, ref_emb=old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_shape
def test_gpu_gives_what_the_cpu_gives(shape):
    new, old = rows()
    on_gpu = loss_of(shape).cuda()(new.cuda(), ref_emb=old.cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss_of(shape)(new, ref_emb=old))
