"""A map back to the version before, trained with the new model; older versions by composition."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from pml_compat.losses import BCAlignerLoss, CoReSLoss, NCCLLoss
from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    TransformationChain,
)
from tests.pairwise import pairwise
from tests.reference import unit

OLD, NEW, CLASSES = 5, 7, 4
EXACT = 1e-5  # the older maps are float32


def batch(seed=0, n=6, old=OLD, new=NEW, dtype=torch.float64):
    """New embeddings, labels and those of the version before."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, new, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return embeddings, labels, torch.randn(n, old, generator=generator, dtype=torch.float64).to(dtype)


def task(width=NEW, dtype=torch.float64):
    torch.manual_seed(0)
    return losses.NormalizedSoftmaxLoss(CLASSES, width).to(dtype)


def random_linear(d_in, d_out, seed, bias=False):
    made = LinearTransformation(d_in, d_out, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return made


OLDER = {
    "none": lambda: None,
    "one": lambda: random_linear(OLD, 3, 1),
    "narrow, wide": lambda: TransformationChain(random_linear(OLD, 3, 1), random_linear(3, 6, 2)),
    "a chain in a chain": lambda: TransformationChain(
        random_linear(OLD, 3, 1, bias=True),
        TransformationChain(random_linear(3, 4, 2, bias=True), random_linear(4, 4, 3)),
    ),
}


def steps_of(older):
    if older is None:
        return []
    return [s for step in older.steps for s in steps_of(step)] if hasattr(older, "steps") else [older]


def apply_linear(step, row):
    weight = step.linear.weight.detach().double().numpy()
    bias = 0 if step.linear.bias is None else step.linear.bias.detach().double().numpy()
    return weight @ row + bias


def naive_alignment(embeddings, old, to_previous, older, error_of):
    """The mean over samples of the mean over versions, one sample and one version at a time."""
    total = 0.0
    for new_row, old_row in zip(embeddings.detach().double().numpy(), old.double().numpy(), strict=True):
        mapped, wanted, errors = apply_linear(to_previous, new_row), old_row, []
        errors.append(error_of(mapped, wanted))
        for step in steps_of(older):
            mapped, wanted = apply_linear(step, mapped), apply_linear(step, wanted)
            errors.append(error_of(mapped, wanted))
        total += sum(errors) / len(errors)
    return total / len(embeddings)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize("new", [NEW, OLD, 3])  # wider, equal, narrower
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", [16.0, 0.5])
def test_a_number_is_the_papers(seed, older, new, bias, weight):
    embeddings, labels, old = batch(seed, new=new)
    to_previous, older = random_linear(new, OLD, 9, bias).double(), OLDER[older]()
    loss_func = BCAlignerLoss(task(new), to_previous, weight, older)
    loss = loss_func(embeddings, labels, ref_emb=old)

    def error_of(mapped, wanted):
        return sum((float(w) - float(m)) ** 2 for m, w in zip(mapped, wanted, strict=True)) / len(wanted)

    aligned = naive_alignment(embeddings, old, to_previous, older, error_of)
    assert float(loss_func.terms["align_loss"]) == pytest.approx(weight * aligned, rel=EXACT)
    assert float(loss) == pytest.approx(float(loss_func.loss(embeddings, labels)) + weight * aligned, rel=EXACT)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize("new", [NEW, OLD, 3])
def test_the_default_is_by_cosines_and_as_strong_as_the_task(seed, older, new):
    to_previous, older = random_linear(new, OLD, 9).double(), OLDER[older]()
    loss_func = BCAlignerLoss(task(new), to_previous, previous_maps=older)
    lengths = np.zeros(2)
    for call in range(3):
        embeddings, labels, old = batch(10 * seed + call, new=new)
        loss = loss_func(embeddings, labels, ref_emb=old)

        def error_of(mapped, wanted):
            return 1 - float(unit(mapped) @ unit(wanted))

        aligned = naive_alignment(embeddings, old, to_previous, older, error_of)
        weight = float(loss_func.balance.weight("align_loss"))
        assert float(loss_func.terms["align_loss"]) == pytest.approx(weight * aligned, rel=EXACT)
        (both,) = torch.autograd.grad(loss, embeddings)
        (alone,) = torch.autograd.grad(loss_func.loss(embeddings, labels), embeddings)
        lengths += [float(alone.norm(dim=1).sum()), float((both - alone).norm(dim=1).sum()) / weight]
        assert weight == pytest.approx(lengths[0] / lengths[1], rel=1e-4)


def test_by_hand():
    to_previous, first = LinearTransformation(3, 2, bias=False), LinearTransformation(2, 1, bias=False)
    with torch.no_grad():
        first.linear.weight.copy_(torch.tensor([[2.0, 0.0]]))
    new, old = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[4.0, 0.0]])
    loss_func = BCAlignerLoss(losses.ContrastiveLoss(), to_previous, 16.0, first)
    # the first coordinates are (1, 2): an error of (3, -2), mean square 13 / 2; it arrives as 6 at the first version
    assert float(loss_func(new, torch.tensor([0]), ref_emb=old)) == pytest.approx(16 * (13 / 2 + 36) / 2)
    loss_func = BCAlignerLoss(losses.ContrastiveLoss(), to_previous)
    value = float(loss_func(new, torch.tensor([0]), ref_emb=old))  # no task, so that the multiplier is 1
    assert value == pytest.approx(1 - 1 / 5**0.5)


@pytest.mark.parametrize("older", ["none", "narrow, wide"])
def test_gradcheck_of_embeddings(older):
    embeddings, labels, old = batch(n=4)
    loss_func = BCAlignerLoss(task(), random_linear(NEW, OLD, 9), None, OLDER[older]()).double()
    loss_func(embeddings, labels, ref_emb=old)
    loss_func.eval()  # a measured multiplier stays
    assert torch.autograd.gradcheck(lambda rows: loss_func(rows, labels, ref_emb=old), embeddings)


@pytest.mark.parametrize("older", ["none", "narrow, wide"])
def test_gradcheck_of_embeddings_and_map(older):
    embeddings, labels, old = batch(n=4)
    loss_func = BCAlignerLoss(task(), random_linear(NEW, OLD, 9), 2.0, OLDER[older]()).double()
    name = "backward_transformation.linear.weight"
    matrix = loss_func.get_parameter(name).detach().clone().requires_grad_()

    def value(rows, own):
        return torch.func.functional_call(loss_func, {name: own}, (rows, labels), {"ref_emb": old})

    assert torch.autograd.gradcheck(value, (embeddings, matrix))


def test_rows_of_length_0_and_of_the_wanted_place_have_finite_gradients():
    embeddings = torch.zeros(2, NEW, requires_grad=True)
    old = torch.tensor([[0.0] * OLD, [1.0] * OLD])
    for weight in (None, 16.0):
        loss_func = BCAlignerLoss(losses.ContrastiveLoss(), LinearTransformation(NEW, OLD), weight, OLDER["one"]())
        for rows in (embeddings, torch.ones(2, NEW, requires_grad=True)):
            (gradient,) = torch.autograd.grad(loss_func(rows, torch.tensor([0, 1]), ref_emb=old), rows)
            assert gradient.isfinite().all()


def test_lengths_do_not_count_in_the_default():
    embeddings, labels, old = batch()
    found = []
    for new_length, old_length in ((1, 1), (3, 0.1)):
        older = OLDER["narrow, wide"]()  # without offsets
        loss_func = BCAlignerLoss(losses.TripletMarginLoss(), random_linear(NEW, OLD, 9).double(), previous_maps=older)
        loss_func.balance = None
        loss_func(embeddings * new_length, labels, ref_emb=old * old_length)
        found.append(float(loss_func.terms["align_loss"]))
    assert found[0] == pytest.approx(found[1], rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, 16.0])
def test_half_precision_is_computed_in_float32(dtype, weight):
    embeddings, labels, old = batch(dtype=dtype)
    made = [
        BCAlignerLoss(task(dtype=torch.float32), random_linear(NEW, OLD, 9), weight, OLDER["one"]()) for _ in range(2)
    ]
    exact = made[0](embeddings.float(), labels, ref_emb=old.float())
    found = made[1](embeddings, labels, ref_emb=old)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
    assert made[1].backward_transformation.linear.weight.dtype == torch.float32


def test_a_task_loss_without_labels_and_one_that_asks_for_old_embeddings():
    embeddings, labels, old = batch(dtype=torch.float32)
    alone = losses.SelfSupervisedLoss(losses.NTXentLoss())
    loss_func = BCAlignerLoss(alone, LinearTransformation(NEW, OLD), 1.0)
    assert loss_func.needs_ref_emb and not loss_func.needs_labels
    asking = BCAlignerLoss(
        NCCLLoss(task(dtype=torch.float32), 20, embedding_size=OLD), LinearTransformation(NEW, OLD), 1.0
    )
    assert asking(embeddings, labels, ref_emb=old).isfinite()
    assert BCAlignerLoss(CoReSLoss(NEW + 1), LinearTransformation(NEW, OLD))(embeddings, labels, ref_emb=old) > 0


def test_a_weight_of_0_is_the_task_alone():
    embeddings, labels, old = batch()
    loss_func = BCAlignerLoss(task(), LinearTransformation(NEW, OLD).double(), 0.0)
    assert loss_func(embeddings, labels, ref_emb=old) == loss_func.loss(embeddings, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backward_transformation": None}, "backward_transformation must be given: LinearTransformation"),
        ({"backward_transformation": torch.nn.Linear(NEW, OLD)}, "backward_transformation must be one of pml_compat"),
        ({"backward_transformation": LinearTransformation(6, OLD)}, "must map width 7 to 5, got 6 to 5"),
        ({"weight": -1.0}, "weight must be"),
        ({"previous_maps": FCTTransformation(OLD, 3)}, "previous_maps must be linear, .* got FCTTransformation"),
        ({"previous_maps": [random_linear(OLD, 3, 1)]}, "previous_maps must be linear, .* got list"),
        (
            {"previous_maps": random_linear(3, OLD, 1)},
            "previous_maps must start where backward_transformation ends, at width 5, .* one from width 3 to 5",
        ),
        ({"class_weight_length": 0.0}, "class_weight_length"),
        ({"loss": "ArcFace"}, "loss must be a PML loss object"),
    ],
)
def test_errors_at_construction(arguments, message):
    given = {"loss": task(), "backward_transformation": LinearTransformation(NEW, OLD)} | arguments
    with pytest.raises(ValueError, match=message):
        BCAlignerLoss(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_emb": None}, "ref_emb must be given"),
        ({"ref_emb": torch.randn(6, OLD + 1)}, "ref_emb"),
        ({"ref_emb": torch.randn(5, OLD)}, "ref_emb must be shaped like embeddings, row i of the same item"),
        ({"ref_emb": torch.full((6, OLD), torch.nan)}, "ref_emb must be finite"),
        ({"embeddings": torch.randn(6, OLD)}, "embeddings"),
        ({"embeddings": torch.full((6, NEW), torch.inf)}, "embeddings must be finite"),
        ({"labels": torch.full((6,), CLASSES)}, r"labels must be in \[0, 3\]"),
        ({"labels": None}, "labels"),
        ({"ref_labels": torch.full((6,), 99)}, "ref_labels must equal labels"),
    ],
)
def test_errors_of_a_call(change, message):
    embeddings, labels, old = batch(dtype=torch.float32)
    loss_func = BCAlignerLoss(task(dtype=torch.float32), LinearTransformation(NEW, OLD))
    with pytest.raises(ValueError, match=message):
        loss_func(**({"embeddings": embeddings, "labels": labels, "ref_emb": old} | change))
