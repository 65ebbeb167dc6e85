"""The maps of BC-Aligner over several versions: frozen, composed, saved, served."""

import copy
import io

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses
from torch.nn.functional import normalize

from pml_compat.losses import BCAlignerLoss
from pml_compat.transformations import (
    LinearTransformation,
    LowRankTransformation,
    NumpyTransformation,
    OrthogonalTransformation,
    ScaledOrthogonalTransformation,
    TransformationChain,
    load_transformation,
)
from tests.losses.test_bc_aligner_loss import CLASSES, EXACT, NEW, OLD, OLDER, batch, random_linear, task


def test_only_the_new_embeddings_and_the_new_map_learn():
    embeddings, labels, old = batch(dtype=torch.float32)
    older = OLDER["narrow, wide"]()
    before = copy.deepcopy(older.state_dict())
    to_previous = LinearTransformation(NEW, OLD, bias=False)
    loss_func = BCAlignerLoss(task(dtype=torch.float32), to_previous, previous_maps=older)
    assert {id(p) for p in loss_func.parameters()} == {id(loss_func.loss.W), id(to_previous.linear.weight)}
    old.requires_grad_()
    optimizer = torch.optim.SGD([*loss_func.parameters(), *older.parameters()], lr=0.1)
    loss_func(embeddings, labels, ref_emb=old).backward()
    optimizer.step()
    assert embeddings.grad.abs().sum() > 0 and to_previous.linear.weight.grad.abs().sum() > 0
    assert old.grad is None and all(parameter.grad is None for parameter in older.parameters())
    assert all(tensor.equal(before[key]) for key, tensor in older.state_dict().items())
    with torch.no_grad():
        older.steps[0].linear.weight.zero_()  # ours is a copy
    assert loss_func.old_matrix.abs().sum() > 0


def test_offsets_of_older_maps_do_not_count_in_the_papers():
    embeddings, labels, old = batch()
    found = []
    for offset in (0.0, 5.0):
        older = random_linear(OLD, 3, 1, bias=True)
        torch.nn.init.constant_(older.linear.bias, offset)
        loss_func = BCAlignerLoss(task(), random_linear(NEW, OLD, 9).double(), 1.0, older)
        found.append(float(loss_func(embeddings, labels, ref_emb=old)))
    assert found[0] == pytest.approx(found[1], rel=EXACT)


@pytest.mark.parametrize("kind", [LowRankTransformation, OrthogonalTransformation, ScaledOrthogonalTransformation])
def test_other_linear_maps(kind):
    torch.manual_seed(0)
    options = {"rank": 2} if kind is LowRankTransformation else {}
    older = kind(OLD, 3, **options).fit(torch.randn(40, OLD), torch.randn(40, 3))
    embeddings, labels, old = batch(dtype=torch.float32)
    loss_func = BCAlignerLoss(task(dtype=torch.float32), OrthogonalTransformation(NEW, OLD), 1.0, older)
    first, second = loss_func._as_versions(old)
    torch.testing.assert_close(first, old)
    torch.testing.assert_close(second, older(old).detach(), atol=1e-5, rtol=1e-5)
    loss_func(embeddings, labels, ref_emb=old).backward()
    assert loss_func.backward_transformation.generator.grad.isfinite().all()


def test_the_state_has_the_older_maps():
    embeddings, labels, old = batch(dtype=torch.float32)

    def made(seed):
        older = random_linear(OLD, 3, seed)
        return BCAlignerLoss(task(dtype=torch.float32), random_linear(NEW, OLD, seed), 1.0, older)

    source, target = made(1), made(2)
    expected = source(embeddings, labels, ref_emb=old)
    assert target(embeddings, labels, ref_emb=old) != expected
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert target(embeddings, labels, ref_emb=old) == expected


def test_the_map_is_saved_exported_and_chained(tmp_path):
    older = random_linear(OLD, 3, 1)
    loss_func = BCAlignerLoss(task(dtype=torch.float32), random_linear(NEW, OLD, 9), previous_maps=older)
    embeddings = batch(dtype=torch.float32)[0].detach()
    loss_func.backward_transformation.save(tmp_path / "to_previous.safetensors")
    again = load_transformation(tmp_path / "to_previous.safetensors")
    torch.testing.assert_close(again(embeddings), loss_func.backward_transformation(embeddings))
    to_first = TransformationChain(again, older)
    torch.testing.assert_close(to_first(embeddings), older(again(embeddings)))
    to_first.export(tmp_path / "to_first.npz")
    served = NumpyTransformation(tmp_path / "to_first.npz")(embeddings.numpy())
    np.testing.assert_allclose(served, to_first(embeddings).detach().numpy(), atol=1e-5)


def test_three_versions_of_which_the_newest_serves_all():
    """Each version knows more of the data and is wider; queries of the last search the galleries of the others."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.arange(300) % CLASSES
    data = torch.randn(CLASSES, 20, generator=generator)[labels] + 1.2 * torch.randn(300, 20, generator=generator)
    versions, maps = [], []
    for width in (4, 6, 8):
        model, loss_func = torch.nn.Linear(20, width), losses.NormalizedSoftmaxLoss(CLASSES, width)
        if versions:
            to_previous = LinearTransformation(width, versions[-1].shape[1], bias=False)
            older = TransformationChain(*maps) if maps else None
            loss_func = BCAlignerLoss(loss_func, to_previous, previous_maps=older)
            maps = [to_previous, *maps]
        optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            references = {"ref_emb": versions[-1]} if versions else {}
            loss_func(model(data), labels, **references).backward()
            optimizer.step()
        versions.append(model(data).detach())
    first, second, third = versions
    for steps, gallery in ((maps[:1], second), (maps, first)):
        with torch.no_grad():
            mapped = TransformationChain(*steps)(third)
        assert (normalize(mapped) * normalize(gallery)).sum(1).mean() > 0.9
