import copy
import io
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, reducers

from pml_compat.frozen import FrozenEmbeddings
from pml_compat.losses import AdvBCTLoss, CompatibleLoss
from pml_compat.losses.advbct_loss import reverse_gradient
from tests import reference
from tests.pairwise import pairwise

WIDTH = 5


def stored(seed=0, n=60, dtype=torch.float64):
    """Return old embeddings of labels 3, 10, 17 and 24, each around a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n) % 4
    centers = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    lengths = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 3 + 0.5
    return ((centers[rows] + 0.4 * noise) * lengths).to(dtype), rows * 7 + 3


def batch(seed=0, n=9, dtype=torch.float64):
    """Return new embeddings, labels of which some are unknown, and old embeddings."""
    generator = torch.Generator().manual_seed(seed + 100)
    new, old = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return new.requires_grad_(), torch.tensor([3, 10, 17, 24, 4, 3, -1, 99, 10])[:n], old * 2 + 1


def loss_of(seed=0, progress=0.5, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    loss_func = AdvBCTLoss.from_embeddings(*stored(seed), **kwargs).to(dtype)
    loss_func.set_progress(progress)
    return loss_func


def expected_rows(loss_func, seed, threshold, progress):
    """Return the naive rows of both terms."""
    new, labels, old = (tensor.detach().numpy() for tensor in batch(seed))
    balls = {label: ball[:2] for label, ball in reference.class_balls(*(t.numpy() for t in stored(seed))).items()}
    elasticity = dict(zip(loss_func.old_label_map.labels.tolist(), loss_func.elasticity.tolist(), strict=True))
    state = {name: value.detach().numpy() for name, value in loss_func.discriminator.state_dict().items()}
    shown = [[reference.unit(row) for row in rows] for rows in (new, old)] if loss_func.normalize else (new, old)
    adversarial = reference.advbct_adversarial(*shown, state, progress)
    return adversarial, reference.advbct_boundary(new, labels, balls, elasticity, threshold)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("threshold", "progress"), [(1.0, 0.0), (0.0, 0.3), (0.5, 0.75)])
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_naive_loop(seed, threshold, progress, normalize):
    options = {"threshold": threshold, "normalize": normalize}
    loss_func = loss_of(seed, progress, **options, adversarial_weight=0.7, boundary_weight=3.0)
    adversarial, boundary = expected_rows(loss_func, seed, threshold, progress)
    new, labels, old = batch(seed)
    outside = [value for value in boundary.values() if value > 0]
    assert len(outside) > 0
    loss = loss_func(new, labels, ref_emb=old)
    assert loss_func.terms["adversarial_loss"].item() == pytest.approx(0.7 * np.mean(adversarial), rel=1e-6)
    assert loss_func.terms["boundary_loss"].item() == pytest.approx(3 * np.mean(outside), rel=1e-6)
    assert loss.item() == pytest.approx(0.7 * np.mean(adversarial) + 3 * np.mean(outside), rel=1e-6)

    loss_func = loss_of(seed, progress, **options, reducer=reducers.DoNothingReducer())
    terms, tenth = loss_func(new, labels, ref_emb=old), [value / 10 for value in adversarial]  # by default
    torch.testing.assert_close(terms["adversarial_loss"]["losses"].tolist(), tenth, rtol=1e-6, atol=1e-9)
    assert terms["adversarial_loss"]["indices"].tolist() == list(range(9))
    torch.testing.assert_close(terms["boundary_loss"]["losses"].tolist(), list(boundary.values()), rtol=1e-6, atol=1e-9)
    assert terms["boundary_loss"]["indices"].tolist() == list(boundary) == [0, 1, 2, 3, 5, 8]


def test_by_hand():
    """Two classes, of centres at length 0.6 and 0.5; at v = 0 a boundary is half way between its radius and T."""
    centers, radii = torch.tensor([[0.6, 0.0], [0.0, 0.5]]), torch.tensor([0.2, 1.4])
    loss_func = AdvBCTLoss(centers, radii, [4, 2], adversarial_weight=0, threshold=1.0, collect_stats=True)
    torch.nn.init.zeros_(loss_func.elasticity)
    new = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-3.0, 0.0], [0.0, -2.0], [1.0, 0.0]])
    labels = torch.tensor([4, 4, 4, 2, 3])
    # boundaries 0.6 and 1.2; distances 0.4, sqrt(1 + 0.36), 1.6 to the first centre and 1.5 to the second
    outside = [math.sqrt(1.36) - 0.6, 1.0, 0.3]
    loss = loss_func(new, labels, ref_emb=new.clone())
    assert loss.item() == pytest.approx(sum(outside) / 3)
    assert loss_func.mean_radius_change == pytest.approx((0.4 + 0.2) / 2)
    assert loss_func.bounded_fraction == pytest.approx(4 / 5) and loss_func.outside_fraction == pytest.approx(3 / 4)
    assert loss_func.boundary_loss == pytest.approx(loss.item()) and loss_func.adversarial_loss == 0


def test_centers_are_not_brought_to_unit_length_and_radii_have_no_outliers():
    old, labels = stored()
    old[0] = -old[4]  # label 3's, on the far side
    loss_func = AdvBCTLoss.from_embeddings(old, labels)
    for row, (label, (center, radius, _, distances)) in enumerate(reference.class_balls(old.numpy(), labels).items()):
        assert loss_func.old_label_map.labels[row] == label
        torch.testing.assert_close(loss_func.old_centers[row], torch.from_numpy(center))
        assert loss_func.old_radii[row].item() == pytest.approx(radius)
        if label == 3:
            assert radius < max(distances)
    assert (loss_func.old_centers.norm(dim=1) < 0.99).all()


def test_from_embeddings_reads_what_is_on_disk(tmp_path):
    old, labels = stored(dtype=torch.float32)
    expected = AdvBCTLoss.from_embeddings(old, labels)
    np.save(tmp_path / "old.npy", old.numpy())
    on_disk = FrozenEmbeddings.write(tmp_path / "old", [(old, torch.arange(len(old)))])
    for source in (np.load(tmp_path / "old.npy", mmap_mode="r"), on_disk):
        loss_func = AdvBCTLoss.from_embeddings(source, labels, threshold=0.5)
        torch.testing.assert_close(loss_func.old_centers, expected.old_centers)
        torch.testing.assert_close(loss_func.old_radii, expected.old_radii)
        assert loss_func.threshold == 0.5


def test_classes_of_one_sample_are_left_out():
    old, labels = stored()
    labels[0] = 1
    with pytest.warns(UserWarning, match=r"AdvBCTLoss leaves 1 of 5 classes, those of one sample, out"):
        loss_func = AdvBCTLoss.from_embeddings(old, labels, adversarial_weight=0)
    assert loss_func.old_label_map.labels.tolist() == [3, 10, 17, 24]
    new = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = loss_func(new, torch.tensor([1, 5]), ref_emb=new.detach())
    loss.backward()
    assert loss == 0 and new.grad.equal(torch.zeros_like(new))
    with pytest.raises(ValueError, match="old_embeddings must have a class of two samples or more"):
        AdvBCTLoss.from_embeddings(old, torch.arange(len(old)))


@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 0.0), (0.1, math.tanh(0.5)), (0.5, math.tanh(2.5))])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_reversed_before_the_discriminator(progress, alpha, normalize):
    """Against finite differences: D goes down the loss, the new model up, by 2 / (1 + exp(-10 p)) - 1 = tanh(5 p)."""
    loss_func = loss_of(progress=progress, boundary_weight=0, normalize=normalize)
    new, labels, old = batch()
    loss_func(new, labels, ref_emb=old).backward()

    def difference(tensor, index, step=1e-6):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[index] += sign * step
                values.append(loss_func(new, labels, ref_emb=old).item())
                tensor[index] -= sign * step
        return (values[0] - values[1]) / (2 * step)

    for index in ((0, 0), (4, 2), (8, 4)):
        slope = difference(new, index)
        assert abs(slope) > 1e-6
        assert new.grad[index].item() == pytest.approx(-alpha * slope, rel=1e-4)
    for name, index in (("0.weight", (3, 1)), ("1.bias", (7,)), ("3.weight", (1, 5)), ("3.bias", (0,))):
        parameter = loss_func.discriminator.get_parameter(name)
        assert parameter.grad[index].item() == pytest.approx(difference(parameter, index), rel=1e-4, abs=1e-9)


def test_reverse_gradient():
    values = torch.tensor([1.0, -2.0], requires_grad=True)
    result = reverse_gradient(values, torch.tensor(0.25))
    (3 * result).sum().backward()
    assert result.tolist() == [1, -2] and values.grad.tolist() == [-0.75, -0.75]


@pytest.mark.parametrize("normalize", [False, True])
def test_adversarial_training_brings_the_two_models_together(normalize):
    """Old embeddings lie off to one side; the new ones get there, by what the discriminator gives away alone."""
    torch.manual_seed(0)
    old = torch.randn(64, WIDTH) + 3
    loss_func = AdvBCTLoss(torch.zeros(1, WIDTH), torch.ones(1), boundary_weight=0, normalize=normalize)
    loss_func.set_progress(0.5)
    shift = torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [shift], "lr": 0.05}, {"params": loss_func.parameters(), "lr": 0.01}])
    for _ in range(150):
        optimizer.zero_grad()
        loss_func(torch.randn(64, WIDTH) + shift, torch.zeros(64).long(), ref_emb=old).backward()
        optimizer.step()
    assert (shift - 3).abs().max() < 1


def test_gradcheck_of_the_boundary_and_its_elasticity():
    loss_func = loss_of(adversarial_weight=0)
    new, labels, old = batch()
    assert torch.autograd.gradcheck(
        lambda rows, _: loss_func(rows, labels, ref_emb=old), (new, loss_func.elasticity), eps=1e-7
    )


@pytest.mark.parametrize("threshold", [0.2, 2.0])
def test_the_boundary_is_learned_between_radius_and_threshold(threshold):
    loss_func = loss_of(adversarial_weight=0, threshold=threshold, collect_stats=True)
    new, labels, old = batch()
    radii, optimizer = loss_func.old_radii, torch.optim.SGD([loss_func.elasticity], lr=5.0)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss_func(new, labels, ref_emb=old).backward()
        optimizer.step()
        found.append(loss_func.mean_radius_change)
    # the hinge can only widen the boundary: towards T where that is further out, back to the radius where it is not
    assert found == sorted(found, reverse=threshold < 1)
    assert 0 < found[-1] < (threshold - radii).abs().mean()


def test_parameters_and_buffers():
    loss_func = loss_of()
    parameters = {name.split(".")[0] for name, _ in loss_func.named_parameters()}
    assert parameters == {"discriminator", "elasticity"}
    buffers = {name.split(".")[0] for name, _ in loss_func.named_buffers()}
    assert buffers == {"old_centers", "old_radii", "old_label_map", "progress"}
    assert loss_func.elasticity.abs().max() <= 1 and len(loss_func.elasticity) == 4
    before = copy.deepcopy(loss_func.state_dict())
    new, labels, old = batch()
    loss_func(new, labels, ref_emb=old.requires_grad_()).backward()
    assert old.grad is None and all(parameter.grad.abs().sum() > 0 for parameter in loss_func.parameters())
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())
    loss_func.to("meta")
    assert {tensor.device.type for tensor in loss_func.state_dict().values()} == {"meta"}


def test_progress_is_saved_and_rules_the_weight():
    source, target = loss_of(progress=0.75, boundary_weight=0), loss_of(1, progress=0.0, boundary_weight=0)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    new, labels, old = batch()
    assert target.progress == 0.75 and target(new, labels, ref_emb=old) == source(new, labels, ref_emb=old)
    source.set_progress(0)
    first = source(new, labels, ref_emb=old)
    torch.testing.assert_close(target(new, labels, ref_emb=old), 0.25 * first)
    source.set_progress(1)
    loss = source(new, labels, ref_emb=old)
    loss.backward()
    assert loss == 0 and torch.isfinite(new.grad).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_discriminator_sees_lengths_where_it_is_asked_to(normalize):
    loss_func = loss_of(boundary_weight=0, normalize=normalize)
    new, labels, old = batch()
    loss = loss_func(new, labels, ref_emb=old)
    same = torch.isclose(loss_func(new * 3, labels, ref_emb=torch.nn.functional.normalize(old)), loss)
    assert bool(same) == normalize


def test_discriminator_accuracy():
    loss_func = loss_of(collect_stats=True)
    with torch.no_grad():
        loss_func.discriminator[3].weight.zero_()
        loss_func.discriminator[3].bias.copy_(torch.tensor([1.0, 0.0]))
    new, labels, old = batch()
    loss_func(new, labels, ref_emb=old)
    assert loss_func.discriminator_accuracy == 0.5  # "new" for every row


def test_only_the_terms_with_a_weight_are_computed():
    new, labels, old = batch()
    both = loss_of()(new, labels, ref_emb=old)
    alone = [loss_of(**{weight: 0})(new, labels, ref_emb=old) for weight in ("adversarial_weight", "boundary_weight")]
    torch.testing.assert_close(sum(alone), both)
    loss = loss_of(adversarial_weight=0, boundary_weight=0)(new, labels, ref_emb=old)
    loss.backward()
    assert loss == 0 and new.grad.equal(torch.zeros_like(new))


@pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dtypes(dtype, loss_dtype, autocast):
    new, labels, old = batch()
    expected = loss_of()(new, labels, ref_emb=old)
    loss_func, low = loss_of(dtype=loss_dtype), new.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, labels, ref_emb=old.float())
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert {parameter.dtype for parameter in loss_func.parameters()} == {loss_dtype}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["equal", "zero", "on the centre"])
@pytest.mark.parametrize("normalize", [False, True])
def test_finite_gradient_at_corners(dtype, case, normalize):
    loss_func = loss_of(dtype=torch.float32, normalize=normalize)
    new, labels, old = batch(dtype=dtype)
    with torch.no_grad():
        if case == "equal":
            new.copy_(old)
        elif case == "zero":
            new[:3] = 0
        else:
            loss_func.old_centers[0] = torch.nn.functional.normalize(new[0].float(), dim=0)
            loss_func.old_radii.zero_()
            loss_func.threshold = 0.0
    loss = loss_func(new, labels, ref_emb=old)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in loss_func.parameters())


def test_one_row():
    """Batch norm refuses one row; the new and the old one are two."""
    for mode in (True, False):
        loss_func = loss_of().train(mode)
        new, labels, old = batch(n=1)
        loss_func(new, labels, ref_emb=old).backward()
        assert torch.isfinite(new.grad).all()


def test_beside_a_task_loss():
    new, labels, old = (tensor.float() if tensor.is_floating_point() else tensor for tensor in batch(n=6))
    task_loss, term = losses.NormalizedSoftmaxLoss(30, WIDTH), loss_of(dtype=torch.float32)
    loss_func = CompatibleLoss(task_loss, term, weights=2.0)
    loss = loss_func(new, labels, ref_emb=old)
    expected = task_loss(new, labels) + 2 * loss_of(dtype=torch.float32)(new, labels, ref_emb=old)
    torch.testing.assert_close(loss, expected)
    assert set(term.terms) == {"adversarial_loss", "boundary_loss"}
    names = {name.split(".")[0] for name, _ in loss_func.named_parameters()}
    assert names == {"loss", "old_losses"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"adversarial_weight": -1}, "adversarial_weight must be a finite number of at least 0, got -1"),
        ({"boundary_weight": math.nan}, "boundary_weight must be a finite number of at least 0, got nan"),
        ({"threshold": "1m"}, "threshold must be a finite number of at least 0, got '1m'"),
        ({"hidden_features": 0}, "hidden_features must be an integer of at least 1, got 0"),
        ({"labels": [0]}, "labels must have one entry a row: expected 2, got 1"),
        ({"labels": [7, 7]}, "labels must not repeat, got 7 more than once"),
        ({"centers": torch.eye(2) * 3}, "centers must be means of unit rows, at most 1 long, got a length of 3;"),
        ({"centers": torch.eye(2) * torch.nan}, "centers must be finite"),
        ({"radii": torch.ones(3)}, r"radii must be one finite distance .* \(2,\), got shape \(3,\)"),
        ({"radii": torch.tensor([0.1, -0.1])}, r"radii must be .* of 0 or more .* values in \[-0.1, 0.1\]"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AdvBCTLoss(**{"centers": torch.eye(2) / 2, "radii": torch.ones(2), **kwargs})


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, None])
def test_bad_progress(progress):
    with pytest.raises(ValueError, match=f"progress must be .*, got {progress}"):
        loss_of().set_progress(progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, y, r: (e, y, None, None), "ref_emb must be given: the old model's embeddings"),
        (lambda e, y, r: (e, y, r[:-1], None), "ref_emb must be shaped like embeddings, .* expected 9 rows, got 8"),
        (lambda e, y, r: (e, y, r[:, :3], None), "ref_emb must be 5 wide, like the old centres, got width 3; measure"),
        (lambda e, y, r: (e, y, r * torch.nan, None), "ref_emb must be finite, row 0 has a NaN"),
        (lambda e, y, r: (e[:0], y[:0], r[:0], None), "embeddings must not be empty"),
        (lambda e, y, r: (e, None, r, None), "labels must be given, got None"),
        (lambda e, y, r: (e, y.float(), r, None), "labels must be integers, got torch.float32"),
        (lambda e, y, r: (e, y, r, y.flip(0)), "ref_labels must equal labels"),
        (lambda e, y, r: (e, y, r.to("meta"), None), "embeddings must be on the device of ref_emb"),
    ],
)
def test_bad_calls(change, message):
    new, labels, old, ref_labels = change(*batch())
    with pytest.raises(ValueError, match=message):
        loss_of()(new, labels, ref_emb=old, ref_labels=ref_labels)


def test_embeddings_on_another_device_than_the_loss():
    new, labels, old = batch()
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_of().to("meta")(new, labels, ref_emb=old)


def test_pairs_and_triplets_are_refused():
    new, labels, old = batch()
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        loss_of()(new, labels, (torch.zeros(1).long(),) * 3, ref_emb=old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives():
    new, labels, old = batch()
    on_gpu = loss_of().cuda()(new.cuda(), labels, ref_emb=old.cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss_of()(new, labels, ref_emb=old))
