"""Every loss in mixed-precision training, and under ``torch.compile``."""

import pytest
import torch

from pml_compat._checks import check_embeddings
from tests.cases import ALIGNED, BALANCED, LOSSES, PAIRED, WIDTH, batch, build, references

NAMES = [*LOSSES, *ALIGNED, *PAIRED]
every_loss = pytest.mark.parametrize("name", NAMES)
# Losses that torch.compile takes in one graph. The others cut it, mostly where they pick the rows that a term is for,
# whose number is a value of the batch, where the task loss, which is PML's, does, or where a multiplier is measured,
# which takes gradients of its own.
STARTS = ("fct", "lwf", "point_alignment", "raml", "csd", "ssp", "d3still", "focal_distillation", "ract", "compatible")
WHOLE = [name for name in NAMES if (name.startswith(STARTS) or name == "nccl") and name not in BALANCED]
IN_PARTS = {name.split("_")[0]: name for name in reversed(NAMES) if name not in WHOLE}  # one of each kind
IN_PARTS["mined"] = "cross_model_mined"
IN_PARTS |= {f"{name.split('_')[0]} balanced": name for name in sorted(BALANCED)}


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_autocast(name, dtype):
    torch.manual_seed(0)
    model, loss_func = torch.nn.Linear(4, WIDTH), build(name)
    inputs, labels = torch.randn(16, 4), batch()[1]
    parameters = [*model.parameters(), *loss_func.parameters()]
    before = {key: tensor.dtype for key, tensor in loss_func.state_dict().items()}
    weight, old = model.weight.detach().clone(), references(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # a scaler skips the steps whose gradient is not finite
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    with torch.autocast("cpu", dtype):
        embeddings = model(inputs)
        loss = loss_func(embeddings, labels, **{key: other.to(dtype) for key, other in old.items()})
    assert embeddings.dtype == dtype and loss.dtype == torch.float32
    scaler.scale(loss).backward()
    for parameter in parameters:
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        assert parameter.dtype == torch.float32
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0 and not model.weight.equal(weight)
    assert {key: tensor.dtype for key, tensor in loss_func.state_dict().items()} == before
    # The gradient is that of float32, as far as the embeddings are.
    exact = embeddings.detach().float().requires_grad_()
    given = {key: other.to(dtype).float() for key, other in old.items()}
    torch.testing.assert_close(loss.float(), build(name)(exact, labels, **given), rtol=0.02, atol=0.01)


def compiled(name, **options):
    """Return value and gradient of a loss as it is, and compiled (by Dynamo alone: no C++ compiler is needed)."""
    found = []
    for compile_it in (lambda loss: loss, lambda loss: torch.compile(loss, backend="eager", **options)):
        torch._dynamo.reset()
        embeddings, labels = batch()
        loss = compile_it(build(name))(embeddings, labels, **references(name))
        loss.backward()
        found.append((loss.detach(), embeddings.grad))
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_compiles_in_one_graph(name):
    as_it_is, in_one_graph = compiled(name, fullgraph=True)
    torch.testing.assert_close(in_one_graph, as_it_is)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo's, of what it cannot see through
@pytest.mark.parametrize("name", IN_PARTS.values())
def test_compiles_in_several_graphs(name):
    as_it_is, in_graphs = compiled(name)
    torch.testing.assert_close(in_graphs, as_it_is)


def test_values_are_not_checked_inside_a_compiled_graph():
    """Shapes and dtypes are: they are known when the graph is made."""
    check = torch.compile(check_embeddings, backend="eager", fullgraph=True)
    assert check(torch.tensor([[torch.nan]])).isnan().all()
    with pytest.raises(ValueError, match="embeddings must be finite"):
        check_embeddings(torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match=r"embeddings must not be empty, got shape \(0, 4\)"):
        torch.compile(check_embeddings, backend="eager")(torch.zeros(0, 4))
