import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.frozen import FrozenModel, WithinClassWhitening
from pml_compat.heads import CompatibleHead
from tests import reference
from tests.pairwise import pairwise

IN, OLD, FREE, HIDDEN = 6, 5, 4, 7
HALF = [torch.float16, torch.bfloat16]
every_free = pytest.mark.parametrize("free", [True, False])  # a layer of its own, or the features as they are
every_number = pytest.mark.parametrize("parts", [1, 2, 3])
every_space = pytest.mark.parametrize("whitened", [True, False])


def old_embeddings(seed=0, n=40):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(n, OLD, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 1.5, OLD)


def mean_part(z, parts=2):
    """Return the mean direction of the compatible parts, written from the formula."""
    found = []
    for row in z.detach().double().numpy():
        directions = [reference.unit(row[OLD * m : OLD * (m + 1)]) for m in range(parts)]
        found.append(reference.unit(sum(directions)))
    return torch.tensor(np.array(found))


def build(seed=0, free=True, whitened=True, dtype=torch.float64, parts=2, **kwargs):
    """Return a head whose batch normalisation training has moved, in eval mode."""
    torch.manual_seed(seed)
    whitening = WithinClassWhitening.from_embeddings(old_embeddings(), torch.arange(40) % 4) if whitened else None
    layer = torch.nn.Linear(IN, FREE) if free else None
    head = CompatibleHead(IN, OLD, layer, whitening=whitening, hidden_features=HIDDEN, parts=parts, **kwargs)
    norm = head.compatible[1]
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return head.to(dtype).eval()


def trunk(seed=0, n=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def naive(head, u):
    """Return p and f, written from the formula."""
    state = {name: tensor.detach().numpy().astype(float) for name, tensor in head.compatible.state_dict().items()}
    free = [p.detach().double().numpy() for p in head.free.parameters()] or None
    rows = reference.compatible_head(u.detach().double().numpy(), state, free, head.training)
    return [torch.tensor(np.array(part)) for part in rows]


def whitened_rows(head, rows):
    matrix, mean = head.whitening.matrix.double(), head.whitening.mean.double()
    return torch.stack([(torch.from_numpy(reference.unit(row)) - mean) @ matrix for row in rows.numpy()])


# Values.


@pairwise
@every_free
@every_space
@every_number
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_matches_naive_loop(free, whitened, parts, seed, training):
    head, u, old = build(seed, free, whitened, parts=parts).train(training), trunk(seed), old_embeddings(seed)
    compatible, rest = naive(head, u)
    z = head(u)
    assert z.shape == (9, head.out_features) and head.out_features == parts * OLD + (FREE if free else IN)
    torch.testing.assert_close(z, torch.cat([compatible, rest], 1))
    torch.testing.assert_close(head.free_part(z), rest)
    torch.testing.assert_close(torch.cat(head.compatible_parts(z), 1), compatible)
    part = mean_part(z, parts)
    found = head.old_part(z).detach()
    asked = part @ head.whitening.matrix if whitened else part
    torch.testing.assert_close(found, torch.stack([torch.from_numpy(reference.unit(row)) for row in asked.numpy()]))
    targets = whitened_rows(head, old) if whitened else old
    expected = torch.stack([torch.from_numpy(reference.unit(row)) for row in targets.numpy()])
    torch.testing.assert_close(head.target(old), expected)


def test_by_hand():
    head = CompatibleHead(2, 2, hidden_features=2, old_share=0.36, parts=1).eval()
    first, norm, _, last = head.compatible
    norm.eps = 0.0  # the running statistics of a fresh one are 0 and 1
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        last.weight.copy_(torch.tensor([[0.0, 5.0], [1.0, 9.0]]))
        last.bias.copy_(torch.tensor([4.0, 0.0]))
    z = head(torch.tensor([[3.0, -4.0]]))  # W1 u = (3, -4), after the ReLU (3, 0), W2 of it (0, 3), p = (4, 3)
    torch.testing.assert_close(z, torch.tensor([[4.0, 3.0, 3.0, -4.0]]))
    torch.testing.assert_close(head.old_part(z), torch.tensor([[0.8, 0.6]]))
    torch.testing.assert_close(head.whole(z), torch.tensor([[0.48, 0.36, 0.48, -0.64]]))
    torch.testing.assert_close(head.target(torch.tensor([[0.0, -7.0]])), torch.tensor([[0.0, -1.0]]))


def test_two_parts_by_hand():
    head = CompatibleHead(2, 2, old_share=0.36, parts=2)  # parts (0, 2) and (5, 0): their directions' mean is diagonal
    z = torch.tensor([[0.0, 2.0, 5.0, 0.0, 3.0, -4.0]])
    torch.testing.assert_close(head.old_part(z), torch.tensor([[0.5**0.5, 0.5**0.5]]))
    torch.testing.assert_close(head.whole(z), torch.tensor([[0.6 * 0.5**0.5, 0.6 * 0.5**0.5, 0.48, -0.64]]))
    torch.testing.assert_close(head.compatible_parts(z), (z[:, :2], z[:, 2:4]))


@pairwise
@every_space
@every_number
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_whole_vectors_compare_by_both_parts(whitened, parts, share):
    head = build(whitened=whitened, old_share=share, parts=parts)
    z = head(trunk(n=20))
    part, free = mean_part(z, parts), normalize(z[:, parts * OLD :], dim=1)
    whole = head.whole(z)
    assert whole.shape == (20, FREE if share == 0 else OLD + FREE)
    torch.testing.assert_close(whole @ whole.t(), share * part @ part.t() + (1 - share) * free @ free.t())
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(20).double())
    torch.testing.assert_close(head.whole(0.01 * z), whole)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stored_rows_rank_as_in_the_whitened_space(seed):
    head, old = build(seed), old_embeddings(seed)
    z = head(trunk(seed)).detach()
    found = head.old_part(z) @ normalize(old, dim=1).t()
    expected = mean_part(z) @ head.whitening(old).t()
    assert found.argsort(1).equal(expected.argsort(1))
    assert not found.argsort(1).equal((mean_part(z) @ normalize(old, dim=1).t()).argsort(1))


def test_a_head_on_its_target_asks_what_whitened_old_embeddings_ask():
    head, old = build(), old_embeddings()
    z = torch.cat([head.target(old), 3 * head.target(old), torch.zeros(40, FREE)], 1)
    torch.testing.assert_close(head.old_part(z), head.whitening.query(head.whitening(old)))


@every_space
def test_lengths_of_old_embeddings_do_not_matter(whitened):
    head, old = build(whitened=whitened), old_embeddings()
    torch.testing.assert_close(head.target(30 * old), head.target(old))
    torch.testing.assert_close(head.target(old.numpy()), head.target(old))


def test_the_width_of_the_free_part():
    def width(*arguments):
        return CompatibleHead(IN, OLD, *arguments).free_features

    sequential = torch.nn.Sequential(torch.nn.Linear(IN, 3), torch.nn.ReLU())
    assert [width(), width(None, IN), width(torch.nn.Linear(IN, 3)), width(sequential, 3)] == [IN, IN, 3, 3]


# A finished model stays as it is.


@every_free
def test_the_embeddings_of_a_finished_model_stay_bit_by_bit(free):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(10, IN), torch.nn.ReLU(), *([torch.nn.Linear(IN, FREE)] if free else [])]
    finished = torch.nn.Sequential(*layers).requires_grad_(False).eval()
    inputs = torch.randn(12, 10)
    expected = finished(inputs)
    head = CompatibleHead(IN, OLD, finished[2] if free else None, old_share=0)
    model = torch.nn.Sequential(*finished[:2], head)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in head.compatible.parameters()}
    optimizer, before = torch.optim.AdamW(learning, lr=0.1), head.old_part(model.eval()(inputs)).detach()
    for _ in range(3):
        head.old_part(model.train()(inputs)).square()[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    z = model.eval()(inputs)
    assert head.free_part(z).equal(expected) and head.whole(z).equal(normalize(expected, dim=1))
    assert finished(inputs).equal(expected) and not head.old_part(z).equal(before)


def test_a_last_layer_with_state_stays_in_a_frozen_model():
    last = torch.nn.Sequential(torch.nn.Linear(IN, FREE), torch.nn.BatchNorm1d(FREE))
    u = trunk(dtype=torch.float32)
    expected = last.eval()(u).detach()
    head = CompatibleHead(IN, OLD, FrozenModel(last, save=True), FREE).train()
    z = head(u)
    z.sum().backward()
    assert head.free_part(z).equal(expected) and head.eval().free_part(head(u)).equal(expected)
    assert all(p.grad is None for p in last.parameters()) and "free.model.1.running_mean" in head.state_dict()


# Gradients.


@every_free
@every_space
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(free, whitened, training):
    head, u = build(free=free, whitened=whitened, old_share=0.3, trunk_gradient=1.0).train(training), trunk(n=3)
    z = head(u).detach().requires_grad_()
    assert torch.autograd.gradcheck(head, (u,))
    for part in (head.old_part, head.free_part, head.whole, head.compatible_parts):
        assert torch.autograd.gradcheck(part, (z,))
    assert torch.autograd.gradcheck(head.target, (old_embeddings(n=3).requires_grad_(),))


def gradients(part, training, **kwargs):
    """Return the gradient of p alone, f alone or both at the features and at the compatible part, and the value."""
    head, u = build(**kwargs).train(training), trunk()
    z = head(u)
    asked = {"p": z[:, :-FREE], "f": z[:, -FREE:], "both": z}[part]
    if not kwargs.get("free", True):
        asked = {"p": z[:, :-IN], "f": z[:, -IN:], "both": z}[part]
    asked.exp().sum().backward()
    return u.grad, [parameter.grad for parameter in head.compatible.parameters()], z


@pairwise
@every_free
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1.0])
def test_how_much_of_the_gradient_reaches_the_trunk(free, training, share):
    options = {"training": training, "free": free}
    whole, own, value = gradients("p", trunk_gradient=1.0, **options)
    scaled, same_own, same_value = gradients("p", **({} if share is None else {"trunk_gradient": share}), **options)
    assert same_value.equal(value) and all(torch.equal(*pair) for pair in zip(same_own, own, strict=True))
    torch.testing.assert_close(scaled, (0.6 if share is None else share) * whole)
    assert own[0].abs().max() > 0 and whole.abs().max() > 0
    both, *_ = gradients("both", **({} if share is None else {"trunk_gradient": share}), **options)
    alone, *_ = gradients("f", trunk_gradient=0.7, **options)
    torch.testing.assert_close(both, scaled + alone)


@every_free
@pytest.mark.parametrize("training", [True, False])
def test_without_it_the_trunks_gradient_is_bit_by_bit_that_without_the_head(free, training):
    head, u, alone = build(free=free, trunk_gradient=0).train(training), trunk(), trunk()
    z = head(u)
    (z.exp().sum() + head.old_part(z)[:, 0].sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.compatible[3].parameters())
    head.free(alone).exp().sum().backward()
    assert u.grad.equal(alone.grad)


def test_everything_but_the_whitening_learns():
    head = build().train()
    head(trunk()).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0 and not name.startswith("whitening"), name
    old = old_embeddings().requires_grad_()
    assert head.target(old).requires_grad and not head.whitening.matrix.requires_grad


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@every_space
def test_rows_of_zero(dtype, whitened):
    head = build(whitened=whitened, old_share=0.3, dtype=torch.float32)
    z = head(trunk(dtype=torch.float32)).detach().to(dtype)
    for columns in (slice(None), slice(OLD), slice(2 * OLD), slice(2 * OLD, None)):
        given = z.clone()
        given[2, columns] = 0
        for found in (head.old_part(given), head.whole(given)):
            assert torch.isfinite(found).all() and found.dtype == dtype
    assert head.old_part(0 * z).abs().max() == head.whole(0 * z).abs().max() == 0
    target = head.target(torch.zeros(1, OLD, dtype=dtype))
    assert torch.isfinite(target).all() and (whitened or target.abs().max() == 0)


# Dtypes, copies, state.


@pytest.mark.parametrize("autocast", [None, *HALF])
@every_space
def test_autocast(autocast, whitened):
    head, u = build(whitened=whitened, old_share=0.3, dtype=torch.float32), trunk(dtype=torch.float32)
    expected = torch.cat(naive(head, u), 1)
    before = {name: tensor.dtype for name, tensor in head.state_dict().items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        z = head(u)
        parts = head.old_part(z), head.whole(z), head.free_part(z)
    z.float().sum().backward()
    assert {z.dtype, *(part.dtype for part in parts)} == {autocast or torch.float32} and u.grad.dtype == torch.float32
    precision = {torch.float16: 1e-2, torch.bfloat16: 8e-2}.get(autocast, 1e-5)
    torch.testing.assert_close(z.double(), expected, rtol=precision, atol=precision)
    for found, part in zip(parts, (head.old_part, head.whole, head.free_part), strict=True):
        torch.testing.assert_close(found.double(), part(expected), rtol=0, atol=4 * precision)
    assert {name: tensor.dtype for name, tensor in head.state_dict().items()} == before


@pytest.mark.parametrize("autocast", HALF)
def test_features_as_they_are_keep_their_dtype_in_autocast(autocast):
    head, u = build(free=False, dtype=torch.float32), trunk(dtype=torch.float32)
    with torch.autocast("cpu", autocast):
        z = head(u)
    assert z.dtype == torch.float32 and head.free_part(z).equal(u)


@pytest.mark.parametrize("dtype", HALF)
def test_the_free_part_keeps_the_dtype_that_its_module_gives(dtype):
    class Low(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input).to(dtype)

    head, u = CompatibleHead(IN, OLD, Low(IN, FREE)), trunk(dtype=torch.float32)
    z = head(u)
    assert z.dtype == dtype and head.free_part(z).equal(head.free(u))


@pytest.mark.parametrize("dtype", HALF)
@every_space
def test_a_half_precision_copy_to_serve_with(dtype, whitened):
    head, u = build(whitened=whitened), trunk()
    served = copy.deepcopy(head).to(dtype)
    z = served(u.to(dtype))
    assert z.dtype == served.old_part(z).dtype == served.whole(z).dtype == dtype
    torch.testing.assert_close(served.old_part(z).double(), head.old_part(head(u)), rtol=0, atol=0.1)
    torch.testing.assert_close(served.whole(z).double(), head.whole(head(u)), rtol=0, atol=0.1)
    assert torch.isfinite(served.whole(torch.full_like(z, 6e4))).all()  # whose squares, and length, are infinite


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
@every_space
def test_copies(duplicate, whitened):
    head, u = build(whitened=whitened, old_share=0.2, trunk_gradient=0.5), trunk()
    copied, expected = duplicate(head), head.old_part(head(u))
    assert copied.old_part(copied(u)).equal(expected) and repr(copied) == repr(head)
    with torch.no_grad():
        copied.compatible[0].weight.normal_()
    assert head.old_part(head(u)).equal(expected) and not copied.old_part(copied(u)).equal(expected)


@every_number
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_queries_are_whitened_as_they_were_told(parts, dtype):
    head, z = build(whitened=False, dtype=dtype, parts=parts), build(whitened=False, parts=parts)(trunk()).to(dtype)
    before, whole = head.old_part(z), head.whole(z)
    matrix = torch.randn(OLD, OLD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head.whiten_queries(matrix)
    asked = mean_part(z, parts) @ matrix.to(dtype).double()
    expected = torch.tensor(np.array([reference.unit(row) for row in asked.numpy()]))
    close = 1e-9 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert head.old_part(z).dtype == dtype
    torch.testing.assert_close(head.old_part(z).double(), expected, rtol=0, atol=close)
    if dtype != torch.float16:  # a CPU's autocast knows no other half precision than its own
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(head.old_part(z).double(), expected, rtol=0, atol=close)
    torch.testing.assert_close(head.whole(z), whole)  # of new vectors nothing changes
    matrix.zero_()
    assert head.old_part(z).double().sub(expected).abs().max() <= close  # a copy
    head.whiten_queries(None)
    assert head.old_part(z).equal(before)


def test_how_queries_are_whitened_is_in_the_state():
    source, target, z = build(whitened=False), build(whitened=False), build(whitened=False)(trunk())
    plain, state = source.old_part(z), source.state_dict()
    assert "query_whitening" not in state
    source.whiten_queries(torch.diag(torch.arange(1.0, OLD + 1)))
    target.load_state_dict(source.state_dict())
    assert target.old_part(z).equal(source.old_part(z)) and not target.old_part(z).equal(plain)
    duplicated = copy.deepcopy(target)
    assert duplicated.old_part(z).equal(target.old_part(z))
    target.load_state_dict(state)  # of a head whose queries are not whitened
    assert target.old_part(z).equal(plain)


@pytest.mark.parametrize(
    ("whitened", "matrix", "message"),
    [
        (True, torch.eye(OLD), "whitening must be None for a head that was made with one"),
        (False, torch.eye(OLD + 1), "whitening must "),
        (False, torch.ones(2, OLD), "whitening must be square"),
        (False, torch.full((OLD, OLD), torch.nan), "whitening must be finite"),
    ],
)
def test_bad_whitenings_of_queries(whitened, matrix, message):
    head, z = build(whitened=whitened), build(whitened=whitened)(trunk())
    before = head.old_part(z)
    with pytest.raises(ValueError, match=message):
        head.whiten_queries(matrix)
    assert head.old_part(z).equal(before)


def test_state_dict_round_trip_with_the_whitening():
    source, target, u = build(seed=0), build(seed=1), trunk()
    target.whitening.mean.zero_(), target.whitening.matrix.copy_(torch.eye(OLD))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert {"whitening.mean", "whitening.matrix"} <= set(state) and not target(u).equal(source(u))
    assert not target.target(old_embeddings()).equal(source.target(old_embeddings()))
    target.load_state_dict(state)
    assert target.old_part(target(u)).equal(source.old_part(source(u)))
    assert target.target(old_embeddings()).equal(source.target(old_embeddings()))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"whitening.mean\""):
        build(whitened=False).load_state_dict(state)


@every_free
def test_one_row_in_training_has_the_running_statistics(free):
    head, u = build(free=free), trunk(n=1)
    before = copy.deepcopy(head.state_dict())
    expected = head.eval()(u)
    assert head.train()(u).equal(expected)
    assert all(tensor.equal(before[name]) for name, tensor in head.state_dict().items())


@every_free
def test_inputs_stay_and_rows_in_eval_mode_do_not_depend_on_each_other(free):
    head, u = build(free=free), trunk()
    before = u.detach().clone()
    torch.testing.assert_close(head(u)[3:4], head(u[3:4]))
    z = head.train()(u)
    kept = z.detach().clone()
    head.old_part(z), head.whole(z), head.free_part(z)
    assert u.equal(before) and z.equal(kept)


@every_space
def test_compiles_in_one_graph(whitened):
    head, u = build(whitened=whitened, old_share=0.3, dtype=torch.float32), trunk(dtype=torch.float32)

    def both(rows):
        z = head(rows)
        return head.old_part(z), head.whole(z)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(both, backend="eager", fullgraph=True)(u), both(u))


def test_shows_its_sizes():
    shown = repr(build(old_share=0.25, trunk_gradient=0.5))
    assert "in_features=6, old_features=5, free_features=4, parts=2, old_share=0.25, trunk_gradient=0.5" in shown
    assert "WithinClassWhitening(features=5)" in shown


# Errors.


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, r"in_features must be an integer of at least 1, got 0"),
        ((4, 2.0), {}, r"old_features must be an integer of at least 1, got 2.0"),
        ((4, 4), {"parts": 0}, r"parts must be an integer of at least 1, got 0"),
        ((4, 4), {"hidden_features": 0}, r"hidden_features must be an integer of at least 1, got 0"),
        ((4, 4, torch.nn.ReLU(), 0), {}, r"free_features must be an integer of at least 1, got 0"),
        ((4, 4, torch.nn.ReLU(), "4"), {}, r"free_features must be an integer of at least 1, got '4'"),
        ((4, 4, torch.nn.ReLU()), {}, r"free_features must be given: ReLU does not tell its width"),
        (
            (4, 4, None, 3),
            {},
            r"free_features must be in_features, 4, without a free module, got 3; give free=torch.nn.Linear\(4, 3\)",
        ),
        ((4, 4), {"old_share": 1.0}, r"old_share must be in \[0, 1\), got 1.0"),
        ((4, 4), {"old_share": -0.1}, r"old_share must be a finite number of at least 0, got -0.1"),
        ((4, 4), {"old_share": float("nan")}, r"old_share must be a finite number of at least 0, got nan"),
        ((4, 4), {"trunk_gradient": 1.5}, r"trunk_gradient must be in \[0, 1\], got 1.5"),
        ((4, 4), {"trunk_gradient": -0.1}, r"trunk_gradient must be a finite number of at least 0, got -0.1"),
        (
            (4, 4),
            {"whitening": WithinClassWhitening(torch.zeros(3), torch.eye(3))},
            r"whitening must be of old_features, 4, got 3",
        ),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        CompatibleHead(*arguments, **options)


@pytest.mark.parametrize(
    ("part", "name", "width"),
    [
        ("forward", "features", IN),
        ("old_part", "embeddings", 2 * OLD + FREE),
        ("compatible_parts", "embeddings", 2 * OLD + FREE),
        ("free_part", "embeddings", 2 * OLD + FREE),
        ("whole", "embeddings", 2 * OLD + FREE),
        ("target", "old_embeddings", OLD),
    ],
)
def test_bad_calls(part, name, width):
    call = getattr(build(), part)
    for rows, message in [
        (torch.zeros(2, 13), rf"{name} must be {width} wide, got width 13"),
        (torch.zeros(0, width), rf"{name} must not be empty"),
        (torch.zeros(width), rf"{name} must be 2-dimensional"),
        (torch.zeros(2, width).long(), rf"{name} must be floating point, got torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(rows)


def test_wrong_device():
    head = build()
    with pytest.raises(ValueError, match=r"features must be on the device of the CompatibleHead: got meta and cpu"):
        head(torch.zeros(2, IN, device="meta"))
    for part, width in (("old_part", 2 * OLD + FREE), ("target", OLD)):
        with pytest.raises(ValueError, match=r"on the device of the WithinClassWhitening: got meta and cpu"):
            getattr(head, part)(torch.zeros(2, width, device="meta"))


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (torch.nn.Linear(IN, 3), r"the output of free must be 4 wide, got width 3"),
        (torch.nn.Unflatten(1, (2, 3)), r"the output of free must be 2-dimensional, \(N, D\), got shape \(9, 2, 3\)"),
    ],
)
def test_a_free_module_that_gives_something_else(free, message):
    with pytest.raises(ValueError, match=message):
        CompatibleHead(IN, OLD, free, FREE)(trunk(dtype=torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_gpu_gives_what_the_cpu_gives(dtype):
    head, u = build(old_share=0.3, dtype=torch.float32), trunk(dtype=torch.float32)
    expected = head.old_part(head(u)), head.whole(head(u))
    head.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        z = head(u.cuda())
        found = head.old_part(z), head.whole(z)
    precision = {torch.float16: 1e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-3)
    assert z.dtype == dtype
    torch.testing.assert_close([part.cpu().float() for part in found], list(expected), rtol=0, atol=precision)
