import copy
import pickle

import pytest
import torch

from pml_compat.frozen import FrozenModel


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))


def holder(frozen):
    return torch.nn.ModuleDict({"old": frozen, "new": torch.nn.Linear(4, 3)})


def test_output_is_the_eval_output_without_a_gradient():
    model, x = network(), torch.randn(6, 4, requires_grad=True)
    frozen = FrozenModel(model)
    holder(frozen).train()
    output = frozen(x)
    assert output.shape == (6, 3) and not output.requires_grad
    torch.testing.assert_close(output, model.eval()(x).detach())


def test_stays_in_eval_mode_even_if_the_network_itself_is_switched():
    model = network()
    frozen = FrozenModel(model)
    assert not model.training
    holder(frozen).train()
    assert not model.training
    model.train()
    before = model[1].running_mean.clone()
    frozen(torch.randn(6, 4))
    assert not model.training and model[1].running_mean.equal(before)


def test_is_in_neither_parameters_nor_state_dict():
    frozen = FrozenModel(network())
    whole = holder(frozen)
    assert {name for name, _ in whole.named_parameters()} == {"new.weight", "new.bias"}
    assert set(whole.state_dict()) == {"new.weight", "new.bias"}
    assert not list(frozen.buffers())
    holder(FrozenModel(network())).load_state_dict(whole.state_dict())


def test_state_dict_round_trip_where_it_is_saved():
    source, target = holder(FrozenModel(network(), save=True)), holder(FrozenModel(network(), save=True))
    with torch.no_grad():
        source["old"].model[0].weight.add_(1)
    state = source.state_dict()
    assert "old.model.0.weight" in state and "old.model.1.running_mean" in state
    target.load_state_dict(state)
    assert target["old"].model[0].weight.equal(source["old"].model[0].weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*old\.model\.0\.weight"):
        target.load_state_dict({k: v for k, v in state.items() if k != "old.model.0.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*old\.model\.0\.weight"):
        holder(FrozenModel(network())).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict({**state, "old.model.0.weight": torch.zeros(1, 1)})


def test_follows_to():
    whole = holder(FrozenModel(network())).double()
    assert whole["old"](torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert next(whole.to("meta")["old"].model.parameters()).device.type == "meta"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    frozen, x = FrozenModel(network(), normalize=True), torch.randn(2, 4)
    twin = duplicate(frozen)
    torch.testing.assert_close(twin(x), frozen(x))
    assert twin.model is not frozen.model


def test_normalize():
    norms = FrozenModel(network(), normalize=True)(torch.randn(5, 4)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_training_the_old_model_is_noticed():
    model = network()
    frozen = FrozenModel(model)
    frozen(torch.randn(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"parameters changed.*copy.deepcopy"):
        frozen(torch.randn(2, 4))


def test_loading_weights_before_the_first_call_is_fine():
    frozen = FrozenModel(network())
    frozen.model.load_state_dict(network().state_dict())
    frozen(torch.randn(2, 4))
    frozen(torch.randn(2, 4))


def test_inference_mode_network():
    with torch.inference_mode():
        model = network()
    assert FrozenModel(model)(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: x[0], lambda x: {"embedding": x}])
def test_outputs_that_are_no_embeddings(output):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(ValueError, match=r"model must return a tensor of shape \(N, D\), got"):
        FrozenModel(Odd())(torch.eye(3))


def test_no_module():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got builtin_function_or_method"):
        FrozenModel(torch.relu)


def test_buffers_that_move_are_noticed():
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    old = FrozenModel(network)
    old(torch.randn(5, 4))
    old(torch.randn(5, 4))
    network.train()(torch.randn(5, 4))  # the statistics move
    with pytest.raises(RuntimeError, match="buffers or parameters changed"):
        old(torch.randn(5, 4))
