import copy
import io
import math
import pickle

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers

from pml_compat.frozen import ClassCenters
from pml_compat.heads import BasisTransformation
from pml_compat.losses import BT2Loss, GatheredLoss
from pml_compat.trainers import CompatibleMetricLossOnly
from tests import reference
from tests.pairwise import pairwise

NEW, OLD, EXTRA, CLASSES = 7, 5, 3, 6
KNOWN = [4, 0, 2]  # labels with a centre
WITHOUT = {"match_weight": 0.0, "class_weight": 0.0, "point_weight": 0.0}


def build_basis(dtype=torch.float64):
    torch.manual_seed(0)
    basis = BasisTransformation(NEW, OLD, EXTRA).to(dtype)
    for rotation in (basis.free_rotation, basis.old_rotation):
        torch.nn.init.orthogonal_(rotation.base)
        torch.nn.init.normal_(rotation.generator, std=0.5)
    return basis


def task(dtype=torch.float64, width=NEW):
    torch.manual_seed(1)
    return losses.NormalizedSoftmaxLoss(CLASSES, width).to(dtype)


def old_centers(dtype=torch.float64):
    return ClassCenters(
        torch.randn(3, OLD, generator=torch.Generator().manual_seed(7), dtype=dtype), torch.tensor(KNOWN)
    )


def build(*weights, dtype=torch.float64, **kwargs):
    return BT2Loss(task(dtype), build_basis(dtype), old_centers(dtype), *weights, **kwargs)


def batch(seed=0, n=10, dtype=torch.float64):
    """Return what the trunk gives, labels, and the old and the independent embeddings, of any length."""
    generator = torch.Generator().manual_seed(seed)
    u, old, independent = (
        torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for width in (NEW + OLD, OLD, NEW)
    )
    return u.requires_grad_(), torch.arange(n) % CLASSES, old, independent


def called(loss_func, u, labels, old, independent):
    return loss_func(loss_func.basis(u), labels, ref_emb=old, target_emb=independent)


def naive_terms(basis, u, labels, old, independent, scale):
    """Return the added terms before their weights, one number a row, written from the formula."""
    tensors = (basis.extra.weight, basis.extra.bias, basis.free_rotation.matrix(), basis.old_rotation.matrix())
    rows = reference.basis_transformation(u.detach().numpy(), *(t.detach().numpy() for t in tensors), basis.scale)
    centers = old_centers().centers.numpy()
    match = [1 - float(f @ reference.unit(other)) for (_, f, _), other in zip(rows, independent.numpy(), strict=True)]
    point = [1 - float(t @ reference.unit(other)) for (*_, t), other in zip(rows, old.numpy(), strict=True)]
    classes = [
        reference.cross_entropy([scale * float(t @ center) for center in centers], KNOWN.index(label))
        for (*_, t), label in zip(rows, labels.tolist(), strict=True)
        if label in KNOWN
    ]
    return match, classes, point


def mean(values):
    return sum(values) / len(values)


# Values.


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [(1.0, 10.0, 5.0), (0.5, 1.0, 0.0), (0.0, 2.0, 3.0), (2.0, 0.0, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_matches_naive_loop(seed, weights, scale):
    given = batch(seed)
    loss_func = build(*weights, scale=scale)
    loss = called(loss_func, *given)
    added = naive_terms(loss_func.basis, *given, scale)
    free = torch.nn.functional.normalize(given[0][:, :NEW], dim=1)
    expected = loss_func.loss(free, given[1]).item()
    assert loss_func.terms["task_loss"].item() == pytest.approx(expected, rel=1e-9)
    for name, weight, values in zip(("match", "class", "point"), weights, added, strict=True):
        assert loss_func.terms[f"{name}_loss"].item() == pytest.approx(weight * mean(values), rel=1e-9)
        expected += weight * mean(values)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_papers_weights_are_the_default():
    given = batch()
    assert called(build(), *given).equal(called(build(1.0, 10.0, 5.0, 1.0), *given))


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.CosineSimilarity()])
def test_pair_losses_of_either_distance_direction_as_task(distance):
    u, labels, *_ = given = batch(n=16)
    positive, negative = (0.1, 0.8) if not distance.is_inverted else (0.8, 0.1)
    task_loss = losses.ContrastiveLoss(positive, negative, distance=distance)
    loss_func = BT2Loss(task_loss, build_basis(), old_centers())
    called(loss_func, *given)
    torch.testing.assert_close(loss_func.terms["task_loss"], task_loss(u[:, :NEW], labels).detach())


def test_by_hand():
    basis = BasisTransformation(2, 2, 1, scale=1.0)
    with torch.no_grad():
        basis.free_rotation.base.copy_(torch.eye(2))
        basis.old_rotation.base.copy_(torch.eye(2))
    task_loss = losses.NormalizedSoftmaxLoss(2, 2, temperature=1.0)
    torch.nn.init.eye_(task_loss.W)
    loss_func = BT2Loss(task_loss, basis, ClassCenters(torch.eye(2), torch.tensor([0, 5])), 2.0, 1.0, 3.0, scale=2.0)
    z = torch.tensor([[1.0, 0.0, 1.0]])  # e = 1, f = (0, 1), t = (1, 0)
    loss = loss_func(z, torch.tensor([1]), ref_emb=torch.tensor([[3.0, 3.0]]), target_emb=torch.tensor([[-2.0, 0.0]]))
    found = [loss_func.terms[f"{name}_loss"].item() for name in ("task", "match", "class", "point")]
    assert found == pytest.approx([math.log(1 + math.exp(-1)), 2 * 1.0, 0.0, 3 * (1 - 0.5**0.5)])  # 1 has no centre
    assert loss.item() == pytest.approx(sum(found))
    loss_func(z, torch.tensor([0]), ref_emb=torch.tensor([[3.0, 3.0]]), target_emb=torch.tensor([[-2.0, 0.0]]))
    assert loss_func.terms["class_loss"].item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_lengths_of_the_other_models_embeddings_do_not_matter():
    u, labels, old, independent = batch()
    expected = called(build(), u, labels, old, independent)
    torch.testing.assert_close(called(build(), u, labels, 0.01 * old, 30 * independent), expected)


def test_a_mapping_does_what_two_arguments_do():
    u, labels, old, independent = batch()
    loss_func = build()
    z, both = loss_func.basis(u), {"old": old, "independent": independent}
    expected = loss_func(z, labels, ref_emb=old, target_emb=independent)
    assert loss_func(z, labels, ref_emb=both).equal(expected)
    assert loss_func(z, labels, ref_emb={"old": old}, target_emb=independent).equal(expected)
    assert GatheredLoss(loss_func)(z, labels, ref_emb=both, ref_labels=labels.clone()).equal(expected)


@pytest.mark.parametrize("weights", [(0.0, 10.0, 5.0), (0.0, 10.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_weight_of_0_needs_no_embeddings(weights):
    u, labels, old, _ = batch()
    loss_func = build(*weights)
    given = {"ref_emb": old} if weights[2] else {}
    loss = loss_func(loss_func.basis(u), labels, **given)
    loss.backward()
    assert torch.isfinite(loss) and u.grad.abs().sum() > 0 and loss_func.terms["match_loss"] == 0


# Gradients.


def test_gradcheck():
    u, labels, old, independent = batch(n=4)
    loss_func = build(0.7, 1.3, 0.4, scale=3.0, reducer=reducers.DoNothingReducer())
    z = loss_func.basis(u).detach().requires_grad_()
    for name in ("match_loss", "class_loss", "point_loss"):

        def term(rows, name=name):
            return loss_func(rows, labels, ref_emb=old, target_emb=independent)[name]["losses"]

        assert torch.autograd.gradcheck(term, (z,))


def test_who_learns_and_who_does_not():
    u, labels, old, independent = batch()
    old.requires_grad_()
    independent.requires_grad_()
    loss_func = build()
    rows = loss_func.old_classifier.rows.clone()
    called(loss_func, u, labels, old * 1.0, independent * 1.0).backward()
    assert old.grad is None and independent.grad is None and u.grad.abs().sum() > 0
    assert not loss_func.old_classifier.rows.requires_grad and loss_func.old_classifier.rows.equal(rows)
    for name, parameter in [*loss_func.named_parameters(), *loss_func.basis.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("weights", "turns"),
    [({}, False), ({"match_weight": 1.0}, False), ({"class_weight": 1.0}, True), ({"point_weight": 1.0}, True)],
)
def test_the_old_model_alone_turns_the_basis(weights, turns):
    loss_func = build(**WITHOUT | weights)
    called(loss_func, *batch()).backward()
    grads = [parameter.grad.abs().max() for parameter in loss_func.basis.parameters()]
    assert all(grad > 1e-4 if turns else grad < 1e-12 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["zero new", "zero others", "equal"])
def test_finite_gradient_at_zero_and_at_equal_rows(dtype, case):
    u, labels, old, independent = batch()
    loss_func = build(dtype=torch.float32)
    z = loss_func.basis(u.float()).detach().to(dtype)
    if case == "zero new":
        z[2] = 0
    elif case == "zero others":
        old[2], independent[2] = 0, 0
    else:
        old, independent = loss_func.basis.old_part(z).detach(), loss_func.basis.free_part(z).detach()
    z.requires_grad_()
    loss = loss_func(z, labels, ref_emb=old, target_emb=independent)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    if case == "equal":
        assert loss_func.terms["match_loss"].abs() < 1e-2 and loss_func.terms["point_loss"].abs() < 1e-2


# Dtypes, ownership, PML's machinery.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(dtype, autocast):
    u, labels, old, independent = batch(dtype=torch.float32)
    loss_func = build(dtype=torch.float32)
    z = loss_func.basis(u).detach()
    expected = loss_func(z, labels, ref_emb=old, target_emb=independent)
    low = z.to(dtype).requires_grad_()
    before = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, labels, ref_emb=old.half(), target_emb=independent.double())
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    if dtype != torch.float64:  # PML itself turns its weights to float64 for float64 embeddings
        assert {name: tensor.dtype for name, tensor in loss_func.state_dict().items()} == before


def test_the_basis_is_the_models_alone():
    loss_func = build()
    model = torch.nn.Sequential(torch.nn.Linear(4, NEW + OLD).double(), loss_func.basis)
    assert {name for name, _ in loss_func.named_parameters()} == {"loss.W"}
    assert not any("basis" in name or "rotation" in name for name in loss_func.state_dict())
    assert loss_func.basis not in set(loss_func.modules())
    parameters = [*model.parameters(), *loss_func.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    loss_func.train().requires_grad_(False)
    loss_func.float()
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    assert loss_func.old_classifier.rows.dtype == torch.float32
    model.float()
    assert loss_func.basis is model[1] and loss_func.basis.extra.weight.dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_loss_belong_together(duplicate):
    given = batch()
    loss_func = build()
    expected = called(loss_func, *given)
    model, copied = duplicate((torch.nn.Sequential(loss_func.basis), loss_func))
    assert copied.basis is model[0] and copied.basis is not loss_func.basis
    alone = duplicate(loss_func)
    assert alone.basis is not loss_func.basis and called(alone, *given).equal(expected)
    torch.nn.init.normal_(copied.basis.old_rotation.generator)
    assert not called(copied, *given).equal(expected) and called(loss_func, *given).equal(expected)


def test_state_dict_round_trip():
    given = batch()
    source, target = build(), BT2Loss(task(), build_basis(), ClassCenters(torch.eye(5)[:3].double(), torch.arange(3)))
    with torch.no_grad():
        source.loss.W.mul_(-1)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert not called(target, *given).equal(called(source, *given))
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert called(target, *given).equal(called(source, *given))


def test_rows_in_another_order_and_labels_of_any_integer_type():
    u, labels, old, independent = given = batch()
    expected, order = called(build(), *given), torch.randperm(len(u))
    torch.testing.assert_close(called(build(), *(part[order] for part in given)), expected)
    for other in (labels.clone(), labels.int(), labels.to(torch.uint8)):
        torch.testing.assert_close(called(build(), u, other, old, independent), expected)


def test_miner_tuples_reach_the_task_loss_alone():
    u, labels, old, independent = batch(n=16)
    task_loss = losses.TripletMarginLoss()
    loss_func = BT2Loss(task_loss, build_basis(), old_centers())
    z = loss_func.basis(u)
    tuples = miners.BatchHardMiner()(z, labels)
    found = [
        loss_func(z, labels, indices, ref_emb=old, target_emb=independent) - task_loss(u[:, :NEW], labels, indices)
        for indices in (None, tuples)
    ]
    torch.testing.assert_close(*found)


def test_samples_of_unknown_labels_are_left_out_of_the_class_loss():
    u, _, old, independent = batch()
    loss_func = build(collect_stats=True)
    called(loss_func, u, torch.tensor([1, 3, 5, 1, 3, 5, 1, 3, 5, 4]), old, independent)
    assert loss_func.known_fraction == pytest.approx(0.1)
    expected = loss_func.terms["class_loss"]
    called(loss_func, u[9:], torch.tensor([4]), old[9:], independent[9:])
    torch.testing.assert_close(loss_func.terms["class_loss"], expected)
    called(loss_func, u, torch.ones(10, dtype=torch.long), old, independent).backward()
    assert loss_func.terms["class_loss"] == 0 and loss_func.known_fraction == 0 and u.grad.abs().sum() > 0


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % CLASSES


def test_a_pml_trainer_with_both_models():
    basis = build_basis(torch.float32)
    loss_func = BT2Loss(task(torch.float32), basis, old_centers(torch.float32))
    trunk = torch.nn.Linear(4, basis.in_features)
    modules = {"trunk": trunk, "embedder": basis}
    before = copy.deepcopy({**trunk.state_dict(), **basis.state_dict(), **loss_func.state_dict()})
    names = {"trunk_optimizer": trunk, "embedder_optimizer": basis, "metric_loss_optimizer": loss_func}
    trainer = CompatibleMetricLossOnly(
        modules,
        {name: torch.optim.SGD(module.parameters(), lr=0.1) for name, module in names.items()},
        12,
        {"metric_loss": loss_func},
        Samples(),
        old_model={"old": torch.nn.Linear(4, OLD), "independent": torch.nn.Linear(4, NEW)},
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=1)
    for name, tensor in {**trunk.state_dict(), **basis.state_dict(), **loss_func.state_dict()}.items():
        assert tensor.equal(before[name]) == (name.startswith("old_classifier") or name.endswith("base")), name


def test_training_finds_the_old_space_and_the_free_model():
    """The old model sees one part of the inputs, in a basis of its own, and the independent one another."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 10)
    labels = inputs[:, 3 : 3 + CLASSES].argmax(1)
    old = inputs[:, :OLD] @ torch.nn.init.orthogonal_(torch.empty(OLD, OLD))
    independent = inputs[:, 10 - NEW :]
    basis = BasisTransformation(NEW, OLD, EXTRA)
    model = torch.nn.Sequential(torch.nn.Linear(10, basis.in_features), basis)
    loss_func = BT2Loss(losses.ContrastiveLoss(), basis, ClassCenters.from_embeddings(old, labels), 10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    cosine = torch.nn.functional.cosine_similarity

    def fits():
        with torch.no_grad():
            z = model(inputs)
            return [cosine(basis.old_part(z), old).mean(), cosine(basis.free_part(z), independent).mean()]

    before = fits()
    for _ in range(100):
        optimizer.zero_grad()
        loss_func(model(inputs), labels, ref_emb=old, target_emb=independent).backward()
        optimizer.step()
    after = fits()
    assert max(before) < 0.3 and min(after) > 0.7


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": torch.nn.Linear(2, 2)}, r"basis must be the model's BasisTransformation, got Linear; make one with"),
        ({"loss": losses.TripletMarginLoss}, r"loss must be a PML loss object"),
        (
            {"loss": losses.ArcFaceLoss(6, NEW + EXTRA)},
            r"loss must be made for the free part .* 7 wide, got .* 10; make",
        ),
        ({"centers": torch.eye(OLD)}, r"centers must be a ClassCenters, got Tensor"),
        ({"centers": ClassCenters(torch.eye(NEW), torch.arange(NEW))}, r"centers must be 5 wide, got width 7"),
        ({"match_weight": -1.0}, r"match_weight must be a finite number of at least 0, got -1.0"),
        ({"class_weight": float("nan")}, r"class_weight must be .* got nan"),
        ({"point_weight": "much"}, r"point_weight must be .* got 'much'"),
        ({"scale": 0.0}, r"scale must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options(change, message):
    arguments = {"loss": task(), "basis": build_basis(), "centers": old_centers()}
    with pytest.raises(ValueError, match=message):
        BT2Loss(**arguments | change)


U, LABELS, ROWS, TARGET = batch()
Z = build_basis()(U).detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": Z[:, :NEW]}, r"embeddings must be 10 wide, got width 7"),
        ({"embeddings": Z * torch.nan}, r"embeddings must be finite, row 0"),
        ({"embeddings": Z[:0]}, r"embeddings must not be empty"),
        ({"labels": None}, r"labels must be given, got None"),
        ({"labels": LABELS + 1}, r"labels must be in \[0, 5\], the task loss's classes, got 6"),
        ({"ref_labels": LABELS + 1}, r"ref_labels must equal labels"),
        ({"ref_emb": None}, r"ref_emb must be given: the old model's .* got None; none are needed with point_weight=0"),
        ({"target_emb": None}, r"target_emb must be given: the independent model's .* needed with match_weight=0"),
        ({"ref_emb": ROWS[:-1]}, r"ref_emb must have one row an embedding, of the same item: expected 10 rows, got 9"),
        ({"ref_emb": TARGET}, r"ref_emb must be 5 wide, got width 7"),
        ({"target_emb": ROWS}, r"target_emb must be 7 wide, got width 5"),
        ({"target_emb": TARGET / 0}, r"target_emb must be finite, row 0"),
        ({"target_emb": TARGET.long()}, r"target_emb must be floating point, got torch.int64"),
        ({"ref_emb": ROWS.to("meta")}, r"embeddings must be on the device of ref_emb: got cpu and meta"),
        ({"ref_emb": "rows"}, r"ref_emb must be a torch.Tensor or a numpy.ndarray, got str"),
        (
            {"ref_emb": {"old": ROWS, "new": ROWS}},
            r"no other names than \['old', 'independent'\], got \['old', 'new'\]",
        ),
        ({"ref_emb": {"old": ROWS, "independent": TARGET}}, r"target_emb must be None where ref_emb has .* got both"),
        ({"ref_emb": {}}, r"ref_emb\['old'\] must be given: the old model's"),
        ({"ref_emb": {"old": ROWS}, "target_emb": None}, r"ref_emb\['independent'\] must be given: the independent"),
    ],
)
def test_bad_calls(change, message):
    arguments = {"embeddings": Z, "labels": LABELS, "ref_emb": ROWS, "target_emb": TARGET}
    with pytest.raises(ValueError, match=message):
        build()(**arguments | change)


def test_wrong_device():
    loss_func = BT2Loss(losses.TripletMarginLoss(), build_basis(), old_centers()).to("meta")
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_func(Z, LABELS, ref_emb=ROWS, target_emb=TARGET)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_gives_what_the_cpu_gives(dtype):
    u, labels, old, independent = batch(dtype=torch.float32)
    loss_func = build(dtype=torch.float32)
    expected = called(loss_func, u, labels, old, independent)
    loss_func.basis.cuda()
    loss_func.cuda()
    on_gpu = u.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = called(loss_func, on_gpu, labels, old.cuda(), independent.cuda())  # labels may stay, as in PML
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02) and torch.isfinite(on_gpu.grad).all()


def test_a_step_makes_each_matrix_exponential_once(monkeypatch):
    """The free part is read back by what z was turned by, whose gradient is the same."""
    made, real = [], torch.linalg.matrix_exp
    monkeypatch.setattr(torch.linalg, "matrix_exp", lambda matrix: made.append(matrix) or real(matrix))
    found = []
    for keep in (lambda z: z, lambda z: z * 1.0 + torch.zeros_like(z, requires_grad=True)):  # the latter is unknown
        torch.manual_seed(0)
        basis = BasisTransformation(6, 4, extra_features=2)
        centers = ClassCenters(torch.randn(3, 4), torch.arange(3))
        loss_func = BT2Loss(losses.NormalizedSoftmaxLoss(3, 6), basis, centers, match_weight=0.0)
        labels, old = torch.arange(5) % 3, torch.randn(5, 4)
        made.clear()
        loss_func(keep(basis(torch.randn(5, 10))), labels, ref_emb=old).backward()
        found.append((len(made), [parameter.grad for parameter in basis.parameters()]))
    assert [count for count, _ in found] == [2, 4]
    torch.testing.assert_close(found[0][1], found[1][1])
