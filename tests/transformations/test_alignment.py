import math

import pytest
import torch

from pml_compat.transformations.alignment import Alignment, neighborhood_temperature


def rows(seed=0, n=6, d=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=generator, dtype=torch.double)


def by_loop(mapped, target, variance, temperature, weight):
    def unit(row):
        return row / row.norm()

    losses = []
    for h, f in zip(mapped, target, strict=True):
        shares = [math.exp(float(unit(f) @ unit(other)) / temperature) for other in target]
        smooth = sum(share / sum(shares) * unit(other) for share, other in zip(shares, target, strict=True))
        losses.append(float((h - f) @ (h - f)) / variance + weight * (1 - float(unit(h) @ unit(smooth))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("variance", "temperature", "weight"), [(1.0, 0.1, 3.0), (2.5, 0.5, 0.0), (0.1, 1.0, 10.0)])
def test_matches_a_loop(seed, variance, temperature, weight):
    mapped, target = rows(seed)
    loss = Alignment(variance, temperature, weight)(mapped, ref_emb=target)
    assert loss.item() == pytest.approx(by_loop(mapped, target, variance, temperature, weight), rel=1e-10)


def test_by_hand():
    """Rows at right angles are no neighbours at a low temperature: 25 / 5 and a right angle."""
    mapped, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert Alignment(5.0, 0.01)(mapped, ref_emb=target).item() == pytest.approx(5 + 3)


def test_gradient():
    mapped, target = rows()
    loss = Alignment(2.0, 0.2)
    assert torch.autograd.gradcheck(lambda m: loss(m, ref_emb=target), (mapped.requires_grad_(),))
    target.requires_grad_()
    loss(mapped, ref_emb=target).backward()
    assert target.grad is None
    same = torch.zeros(3, 2, requires_grad=True)
    loss(same, ref_emb=torch.zeros(3, 2)).backward()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("unit", [1e-4, 1e3])
def test_the_unit_of_the_target_does_not_count(unit):
    mapped, target = rows()
    expected = Alignment(2.0, 0.2)(mapped, ref_emb=target)
    found = Alignment(2.0 * unit**2, 0.2)(unit * mapped, ref_emb=unit * target)
    torch.testing.assert_close(found, expected)
    assert neighborhood_temperature(unit * target) == pytest.approx(neighborhood_temperature(target))


def test_half_of_a_neighborhood_is_the_row_itself():
    target = rows(n=200, d=16)[0]
    unit = torch.nn.functional.normalize(target, dim=1)
    shares = (unit @ unit.t() / neighborhood_temperature(target)).softmax(1).diagonal()
    assert shares.mean().item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("target", [torch.ones(5, 3), torch.zeros(5, 3), torch.ones(1, 3)])
def test_rows_that_are_all_the_same(target):
    temperature = neighborhood_temperature(target)
    assert 1e-3 <= temperature <= 1.0
    assert math.isfinite(Alignment(1.0, temperature)(target + 1, ref_emb=target))
