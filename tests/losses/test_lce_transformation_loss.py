import numpy as np
import pytest
import torch
from pytorch_metric_learning import reducers

from pml_compat.frozen import ClassCenters
from pml_compat.losses import LCETransformationLoss
from pml_compat.transformations import LinearTransformation, ResidualBottleneckTransformation
from tests import reference
from tests.losses.test_lce_loss import NEW as TARGET
from tests.losses.test_lce_loss import OLD, centers
from tests.pairwise import pairwise


def transformation(seed=0):
    torch.manual_seed(seed)
    linear = LinearTransformation(OLD, TARGET).double()
    torch.nn.init.normal_(linear.linear.weight)
    torch.nn.init.normal_(linear.linear.bias)
    return linear


def stored(seed=0, n=12, labels=6):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, OLD, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(labels, (n,), generator=generator)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["angle", "cosine"])
@pytest.mark.parametrize(("align", "weight"), [(100.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
def test_matches_naive_loop(seed, kind, align, weight):
    linear, (embeddings, labels) = transformation(seed), stored(seed)
    source, target = centers(OLD, [5, 1, 2, 3]), centers(TARGET, [0, 1, 2, 3, 4], seed=4, counts=[5, 5, 1, 5, 5])
    with pytest.warns(UserWarning):
        loss_func = LCETransformationLoss(linear, source, target, align, weight, kind)
    loss = loss_func(linear(embeddings), labels)

    def apply(row):
        return linear(torch.from_numpy(row)[None]).detach().numpy()[0]

    rows = {int(label): target.centers[i].numpy() for i, label in enumerate(target.labels)}
    sources = {int(label): source.centers[i].numpy() for i, label in enumerate(source.labels)}
    mapped = [apply(sources[label]) for label in (1, 2, 3)]
    alignment = reference.lce_alignment(mapped, [rows[label] for label in (1, 2, 3)])
    bounded = {label: float(target.boundaries[i]) for i, label in enumerate([0, 1, 2, 3, 4]) if label != 2}
    points = [apply(e) for e in embeddings.numpy()]
    boundary = reference.lce_boundary(points, labels.tolist(), rows, bounded, kind)
    assert loss_func.terms["align_loss"].item() == pytest.approx(align * alignment, rel=1e-9)
    assert loss_func.terms["boundary_loss"].item() == pytest.approx(weight * boundary, rel=1e-9)
    assert loss.item() == pytest.approx(align * alignment + weight * boundary, rel=1e-9)


def test_gradcheck():
    linear, (embeddings, labels) = transformation(), stored()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET), reducer=reducers.SumReducer())
    assert torch.autograd.gradcheck(
        lambda e, *_: loss_func(linear(e), labels), (embeddings.requires_grad_(), *linear.parameters())
    )


def test_training_maps_class_onto_class():
    """Two spaces of the same classes that share nothing else, not even a sample."""
    torch.manual_seed(0)
    old_directions, new_directions = torch.randn(6, OLD), torch.randn(6, TARGET)
    old_labels, new_labels = torch.randint(6, (300,)), torch.randint(6, (400,))
    old = old_directions[old_labels] + 0.2 * torch.randn(300, OLD)
    new = new_directions[new_labels] + 0.2 * torch.randn(400, TARGET)
    target = ClassCenters.from_embeddings(new, new_labels)
    mapping = ResidualBottleneckTransformation(OLD, TARGET)
    loss_func = LCETransformationLoss(mapping, ClassCenters.from_embeddings(old, old_labels), target)
    optimizer = torch.optim.Adam(mapping.parameters(), lr=0.01)
    unit = torch.nn.functional.normalize(old, dim=1)

    def right():
        mapped = mapping.eval()(unit)
        mapping.train()
        return ((mapped @ target.centers.t()).argmax(1) == old_labels).float().mean().item()

    before = right()
    for _ in range(100):
        optimizer.zero_grad()
        loss_func(mapping(unit), old_labels).backward()
        optimizer.step()
    assert before < 0.5 and right() > 0.95


def test_the_transformation_is_the_callers():
    """In the model's optimizer and in the loss's it would be moved twice a step."""
    linear = transformation()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET))
    assert list(loss_func.parameters()) == [] and loss_func.transformation is linear
    assert not any(key.startswith("transformation") for key in loss_func.state_dict())
    before = {key: buffer.clone() for key, buffer in loss_func.named_buffers()}
    embeddings, labels = stored()
    loss_func(linear(embeddings), labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in linear.parameters())
    assert all(buffer.equal(before[key]) for key, buffer in loss_func.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    linear = transformation().float()
    embeddings, labels = stored()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET)).float()
    expected = loss_func(linear(embeddings.float()), labels)
    with torch.autocast("cpu", dtype):
        loss = loss_func(linear(embeddings.float()).to(dtype), labels)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.item() == pytest.approx(
        expected.item(), rel=0.05
    )
    assert np.isfinite(linear.linear.weight.grad).all()


def test_one_sample_zero_rows_and_no_bounded_class():
    linear = transformation()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET))
    for embeddings, labels in (
        (torch.zeros(2, TARGET), [0, 1]),
        (torch.ones(1, TARGET), [3]),
        (torch.ones(2, TARGET), [77, 78]),
    ):
        embeddings = embeddings.double().requires_grad_()
        loss_func(embeddings, torch.tensor(labels)).backward()
        assert torch.isfinite(embeddings.grad).all()
    assert loss_func.terms["boundary_loss"] == 0


def test_row_order_does_not_matter():
    linear, (embeddings, labels) = transformation(), stored()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET))
    order = torch.randperm(len(labels))
    torch.testing.assert_close(
        loss_func(linear(embeddings[order]), labels[order]), loss_func(linear(embeddings), labels)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (torch.nn.Linear(5, 7), centers(OLD), centers(TARGET)), r"transformation must be one of pml_compat"),
        (lambda: (transformation(), centers(TARGET), centers(TARGET)), r"source_centers must be 5 wide, got width 7"),
        (lambda: (transformation(), centers(OLD), centers(OLD)), r"target_centers must be 7 wide, got width 5"),
        (lambda: (transformation(), centers(OLD), torch.ones(6, 7)), r"target_centers must be a ClassCenters, got T"),
        (
            lambda: (transformation(), centers(OLD), centers(TARGET, [7, 8])),
            r"source_centers and target_centers must have labels in common, got none",
        ),
        (
            lambda: (transformation(), centers(OLD), ClassCenters(torch.randn(6, 7), torch.arange(6))),
            r"target_centers must have boundaries, got none",
        ),
        (lambda: (transformation(), centers(OLD), centers(TARGET), -1.0), r"align_weight must be .* got -1.0"),
        (lambda: (transformation(), centers(OLD), centers(TARGET), 1.0, 1.0, "x"), r"boundary must be 'angle' or"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        LCETransformationLoss(*arguments())


def test_bad_calls():
    loss_func = LCETransformationLoss(transformation(), centers(OLD), centers(TARGET))
    embeddings, labels = torch.ones(3, TARGET, dtype=torch.float64), torch.tensor([0, 1, 2])
    for bad, bad_labels, message in (
        (embeddings[:, :4], labels, r"embeddings must be 7 wide, got width 4"),
        (embeddings * torch.nan, labels, r"embeddings must be finite"),
        (embeddings, labels[:2], r"labels must have one entry a row: expected 3, got 2"),
        (embeddings, None, r"labels must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_func(bad, bad_labels)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_func.to("meta")(embeddings, labels)


def test_reports_what_is_left_out():
    with pytest.warns(UserWarning, match=r"leaves out 1 classes of the source .*; 2 classes of the target that the"):
        LCETransformationLoss(transformation(), centers(OLD, [9, 1]), centers(TARGET, [1, 2, 3]))


def test_states_from_when_the_loss_owned_its_map_load():
    linear = transformation()
    loss_func = LCETransformationLoss(linear, centers(OLD), centers(TARGET))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    state = loss_func.state_dict()
    owned = {f"transformation.{name}": torch.zeros_like(tensor) for name, tensor in before.items()}
    loss_func.load_state_dict(state | owned)
    assert all(linear.state_dict()[name].equal(tensor) for name, tensor in before.items())
