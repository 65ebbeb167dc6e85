import copy
import io
import pickle

import numpy as np
import pytest
import torch

from pml_compat import fit_width
from pml_compat.heads import BasisTransformation
from tests import reference
from tests.pairwise import pairwise

# (new_features, old_features, extra_features): the old part ends within the free part, holds all, holds none of it
WIDTHS = [(7, 5, 2), (4, 6, 2), (6, 3, 3), (3, 1, 1)]
every_width = pytest.mark.parametrize("widths", WIDTHS)
HALF = [torch.float16, torch.bfloat16]


def build(widths=WIDTHS[0], scale=2.0, seed=0, turned=True):
    """Return a basis that training has turned from where it started, orthogonal in float64."""
    torch.manual_seed(seed)
    basis = BasisTransformation(*widths, scale=scale).double()
    for rotation in (basis.free_rotation, basis.old_rotation):
        torch.nn.init.orthogonal_(rotation.base)
        torch.nn.init.normal_(rotation.generator, std=0.5 if turned else 0.0)
    return basis


def trunk(basis, seed=0, n=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, basis.in_features, generator=generator, dtype=torch.float64).requires_grad_()


def naive(basis, u):
    """Return z, f and t, written from the formula."""
    tensors = (basis.extra.weight, basis.extra.bias, basis.free_rotation.matrix(), basis.old_rotation.matrix())
    rows = reference.basis_transformation(u.detach().numpy(), *(t.detach().numpy() for t in tensors), basis.scale)
    return [torch.tensor(np.array(part)) for part in zip(*rows, strict=True)]


@pairwise
@every_width
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_matches_naive_loop(widths, seed, scale):
    basis = build(widths, scale, seed)
    u = trunk(basis, seed)
    z, free, old = naive(basis, u)
    assert z.shape == (9, basis.out_features) and basis.in_features == u.shape[1]
    torch.testing.assert_close(basis(u), z)
    torch.testing.assert_close(basis.free_part(basis(u)), free)
    torch.testing.assert_close(basis.old_part(basis(u)), old)


def test_by_hand():
    basis = BasisTransformation(2, 2, 1, scale=2.0)
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # (a, b) becomes (-b, a)
    with torch.no_grad():
        basis.extra.weight.copy_(torch.tensor([[0.0, 0.0, -3.0, 1.0]]))
        basis.extra.bias.fill_(-0.5)
        basis.free_rotation.base.copy_(quarter)
        basis.old_rotation.base.copy_(quarter)
    u = torch.tensor([[3.0, 4.0, -1.0, 2.0]])
    # f = (0.6, 0.8), e = n(-3 * 0 + 1 * 2 - 0.5) = 1, v = [1; 2 * (-0.8, 0.6)], z = [1.6, 1; 1.2]
    z = basis(u)
    torch.testing.assert_close(z, torch.tensor([[1.6, 1.0, 1.2]]))
    torch.testing.assert_close(basis.old_part(z), torch.tensor([[1.6, 1.0]]) / 3.56**0.5)
    torch.testing.assert_close(basis.free_part(z), torch.tensor([[0.6, 0.8]]))


# What the basis must not change.


@every_width
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_new_vectors_rank_as_the_added_and_the_free_part_do(widths, scale):
    basis = build(widths, scale)
    u = trunk(basis, n=20)
    z, free = basis(u), torch.nn.functional.normalize(u[:, : basis.new_features], dim=1)
    extra = torch.nn.functional.normalize(basis.extra(u.relu()), dim=1)
    torch.testing.assert_close(z @ z.t(), extra @ extra.t() + scale**2 * free @ free.t())
    torch.testing.assert_close(z.norm(dim=1), torch.full((20,), (1 + scale**2) ** 0.5, dtype=torch.float64))
    apart = (z[:, None] - z).square().sum(2)  # ranks as the dot product does, and so as the cosine
    torch.testing.assert_close(apart, 2 * (1 + scale**2) - 2 * z @ z.t())


def test_new_vectors_rank_the_same_however_the_basis_is_turned():
    one, other = build(), build()
    with torch.no_grad():
        other.free_rotation.generator.normal_()
        other.old_rotation.generator.normal_()
    u = trunk(one)
    assert (one(u) - other(u)).abs().max() > 0.1
    torch.testing.assert_close(one(u) @ one(u).t(), other(u) @ other(u).t())


@every_width
def test_the_free_part_is_read_back_whatever_the_length_of_z(widths):
    basis = build(widths)
    u = trunk(basis)
    free = torch.nn.functional.normalize(u[:, : basis.new_features], dim=1)
    for factor in (1.0, 0.01, 30.0):
        found = basis.free_part(factor * basis(u))
        torch.testing.assert_close(found, free, rtol=0, atol=1e-12)


@every_width
def test_the_old_part_is_what_the_rule_for_widths_gives(widths):
    basis = build(widths)
    z = basis(trunk(basis))
    expected = torch.nn.functional.normalize(fit_width(z, basis.old_features), dim=1)
    torch.testing.assert_close(basis.old_part(z), expected)


@pytest.mark.parametrize("widths", WIDTHS[:3])  # a single coordinate cannot turn
def test_stays_orthogonal_in_training(widths):
    basis = build(widths, turned=False)
    u, target = trunk(basis), trunk(basis, seed=1)[:, : basis.old_features]
    optimizer = torch.optim.Adam(basis.parameters(), lr=0.1)
    before = basis.old_rotation.matrix().detach().clone()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (basis.old_part(basis(u)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and (basis.old_rotation.matrix() - before).norm() > 0.1
    for rotation in (basis.free_rotation, basis.old_rotation):
        matrix = rotation.matrix().detach()
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(len(matrix)).double())
    torch.testing.assert_close(basis(u).norm(dim=1), torch.full((9,), 5**0.5).double())


def test_a_fresh_basis_is_turned_anyhow():
    """From the identity, the old part would start as one coordinate after the other of the trunk."""
    one, other = BasisTransformation(7, 5, 2), BasisTransformation(7, 5, 2)
    for name, width in (("free_rotation", 7), ("old_rotation", 5)):
        first, second = (getattr(basis, name).matrix().detach() for basis in (one, other))
        assert (first - second).abs().max() > 0.1 and (first - torch.eye(width)).abs().max() > 0.1
        torch.testing.assert_close(first @ first.t(), torch.eye(width))


# Gradients.


@every_width
@pytest.mark.parametrize("part", ["forward", "old_part", "free_part"])
def test_gradcheck(widths, part):
    basis = build(widths)
    z = torch.randn(3, basis.out_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(basis, part), (trunk(basis, n=3) if part == "forward" else z,))


def test_gradcheck_of_the_rotations():
    basis = build()
    u = trunk(basis, n=3).detach()

    def embed(free, old):
        names = {"free_rotation.generator": free, "old_rotation.generator": old}
        return torch.func.functional_call(basis, names, (u,))

    generators = basis.free_rotation.generator, basis.old_rotation.generator
    assert torch.autograd.gradcheck(embed, tuple(g.detach().requires_grad_() for g in generators))


@every_width
def test_what_is_asked_of_the_free_part_alone_does_not_turn_the_basis(widths):
    basis = build(widths)
    u, target = trunk(basis), torch.randn(9, basis.new_features).double()
    (basis.free_part(basis(u)) * target).sum().backward()
    found, u.grad = u.grad, None
    for parameter in basis.parameters():
        assert parameter.grad.abs().max() < 1e-12
    (torch.nn.functional.normalize(u[:, : basis.new_features], dim=1) * target).sum().backward()
    torch.testing.assert_close(found, u.grad)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("row", [0.0, 1e-7])
def test_a_row_without_a_direction_has_a_finite_gradient(dtype, row):
    basis = build().float()
    torch.nn.init.zeros_(basis.extra.bias)
    u = trunk(basis).detach().to(dtype)
    u[2] *= row
    u.requires_grad_()
    z = basis(u)
    (z.sum() + basis.free_part(z).sum() + basis.old_part(z).sum()).backward()
    assert torch.isfinite(z).all() and torch.isfinite(u.grad).all()
    assert row > 0 or (z[2].abs().max() == 0 and u.grad[2].abs().max() == 0)
    z = torch.zeros(2, basis.out_features, dtype=dtype, requires_grad=True)
    (basis.free_part(z).sum() + basis.old_part(z).sum()).backward()
    assert z.grad.abs().max() == 0


# Dtypes, copies, state.


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, *HALF])
def test_dtypes(dtype, autocast):
    basis = build().float()
    u = trunk(basis).detach().to(dtype).requires_grad_()
    expected, free, old = naive(basis.double(), u.double())
    before = {name: tensor.dtype for name, tensor in basis.float().state_dict().items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        z = basis(u)
        parts = basis.free_part(z), basis.old_part(z)
    z.sum().backward()
    assert {z.dtype, u.grad.dtype, *(part.dtype for part in parts)} == {dtype}
    precision = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    for found, wanted in zip((z, *parts), (expected, free, old), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=precision)
    assert {name: tensor.dtype for name, tensor in basis.state_dict().items()} == before


@pytest.mark.parametrize("autocast", HALF)
def test_autocast_costs_nothing_of_a_float32_trunk(autocast):
    basis = build().float()
    u = trunk(basis).detach().float()
    expected = basis(u)
    with torch.autocast("cpu", autocast):
        assert basis(u).equal(expected) and basis.free_part(basis(u)).equal(basis.free_part(expected))


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_copy_to_serve_with(dtype):
    basis = build()
    u = trunk(basis).detach()
    served = copy.deepcopy(basis).to(dtype)
    z = served(u.to(dtype))
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), basis(u), rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.01)
    assert served.free_part(z).dtype == dtype


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda basis: pickle.loads(pickle.dumps(basis))])
def test_copies(duplicate):
    basis = build()
    u = trunk(basis)
    copied = duplicate(basis)
    expected = basis(u)
    assert copied(u).equal(expected)
    with torch.no_grad():
        copied.old_rotation.generator.normal_()
    assert basis(u).equal(expected) and not copied(u).equal(expected)


def test_state_dict_round_trip():
    source, target = build(seed=0), build(seed=1)
    u = trunk(source)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert not target(u).equal(source(u))
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert target(u).equal(source(u))


def test_train_and_eval_mode_give_the_same_and_the_input_stays():
    basis = build()
    u = trunk(basis)
    before = u.detach().clone()
    assert basis.train()(u).equal(basis.eval()(u)) and u.equal(before)


def test_rows_do_not_depend_on_each_other():
    basis = build()
    u = trunk(basis)
    torch.testing.assert_close(basis(u)[3:4], basis(u[3:4]))


def test_compiles_in_one_graph():
    basis = build().float()
    u = trunk(basis).detach().float()
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows: basis.free_part(basis(rows)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), basis.free_part(basis(u)))


def test_shows_its_sizes():
    assert "new_features=7, old_features=5, extra_features=2, scale=2" in repr(build())


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), r"new_features must be an integer of at least 1, got 0"),
        ((4, 2.0), r"old_features must be an integer of at least 1, got 2.0"),
        ((4, 4, 0), r"extra_features must be an integer of at least 1, got 0"),
        ((4, 4, 5), r"extra_features must be at most old_features, 4, got 5; more would not reach"),
        ((128, 16), r"extra_features must be at most old_features, 16, got 32"),
        ((4, 8, 3), r"old_features must be at most .*, 7, got 8; set extra_features to 4 or more"),
        ((4, 4, 2, 0.0), r"scale must be a finite number above 0, got 0.0"),
        ((4, 4, 2, float("nan")), r"scale must be a finite number above 0, got nan"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        BasisTransformation(*arguments)


@pytest.mark.parametrize(("part", "width"), [("forward", 12), ("old_part", 9), ("free_part", 9)])
def test_bad_calls(part, width):
    call = getattr(build(), part)
    for rows, message in [
        (torch.zeros(2, 7), rf"embeddings must be {width} wide, got width 7"),
        (torch.zeros(0, width), r"embeddings must not be empty"),
        (torch.zeros(width), r"embeddings must be 2-dimensional"),
        (torch.zeros(2, width).long(), r"embeddings must be floating point, got torch.int64"),
        (
            torch.zeros(2, width, device="meta"),
            r"embeddings must be on the device of the BasisTransformation: got meta",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call(rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_gpu_gives_what_the_cpu_gives(dtype):
    basis = build().float()
    u = trunk(basis).detach().float()
    expected = basis(u), basis.free_part(basis(u))
    basis.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        z = basis(u.cuda())
        found = z, basis.free_part(z)
    torch.testing.assert_close([part.cpu() for part in found], list(expected), rtol=0, atol=1e-5)
