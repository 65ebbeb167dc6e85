import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pml_compat
from pml_compat import embed, fit_width
from pml_compat.data.nest import moved_to
from pml_compat.frozen import FrozenEmbeddings, model_fingerprint


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 3)
    )


INPUTS, LABELS = torch.randn(23, 4, generator=torch.Generator().manual_seed(1)), torch.arange(23) % 3


def run(model, data, **kwargs):
    return embed(model, data, progress=False, **kwargs)


def test_every_form_of_data_and_the_mode_comes_back():
    model = network()
    model[2].eval()
    expected = network().eval()(INPUTS).detach()
    dataset = TensorDataset(INPUTS, LABELS)
    for data in (INPUTS, INPUTS.numpy(), TensorDataset(INPUTS), dataset, DataLoader(dataset, 7)):
        found = run(model, data, batch_size=5)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert model.training and model[1].training and not model[2].training
    assert int(model[1].num_batches_tracked) == 0


class Nested(Dataset):
    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        return {"pair": (INPUTS[index], INPUTS[index] + 1), "ids": torch.tensor(index), "labels": LABELS[index]}


class OfNests(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, batch):
        assert set(batch) == {"pair", "ids"}
        return self.layer(batch["pair"][0]) + batch["pair"][1][:, :3]


def test_batches_that_are_nests():
    model = OfNests()
    torch.testing.assert_close(run(model, Nested(), batch_size=4), model.layer(INPUTS).detach() + INPUTS[:, :3] + 1)
    moved = moved_to({"a": (INPUTS, [LABELS, "text"])}, "cpu", torch.float64)
    assert moved["a"][0].dtype == torch.float64 and moved["a"][1][0].dtype == torch.int64 and moved["a"][1][1] == "text"


def test_autocast_gives_float32():
    found = run(network(), INPUTS, autocast=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network().eval()(INPUTS).detach(), rtol=0.1, atol=0.05)


def test_into_a_folder_with_ids(tmp_path):
    model, ids = network(), torch.arange(23).flip(0) + 100
    found = run(model, TensorDataset(INPUTS, LABELS, ids), out=tmp_path / "new", batch_size=5)
    assert isinstance(found, FrozenEmbeddings) and found.fingerprint == model_fingerprint(model)
    assert found.ids.equal(ids) and found[:].equal(run(model, INPUTS, batch_size=5))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(ValueError, match="out must be free"):
        run(model, INPUTS, out=tmp_path / "new")


def test_a_killed_run_goes_on(tmp_path):
    model, calls = network(), []

    def stop_at_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(model, INPUTS, out=tmp_path / "new", batch_size=5)
    with pytest.raises(ValueError, match="by another model or batch_size"):
        run(model, INPUTS, out=tmp_path / "new", batch_size=6)
    found = run(model, INPUTS, out=tmp_path / "new", batch_size=5)
    hook.remove()
    assert len(calls) == 6  # 2 of 5 batches were there
    assert found[:].equal(run(model, INPUTS, batch_size=5))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (len, INPUTS, "model must be a torch.nn.Module"),
        (torch.nn.Identity(), 3, "data must be a tensor, an array, a Dataset or a DataLoader, got int"),
        (torch.nn.Identity(), torch.zeros(0, 4), "data must not be empty"),
        (torch.nn.Flatten(0), INPUTS, r"model must return a tensor of shape \(N, D\), got"),
        (torch.nn.Identity(), torch.tensor([[0.0], [np.nan]]), "embeddings must be finite, row 1"),
    ],
)
def test_bad_calls(model, data, message):
    with pytest.raises(ValueError, match=message):
        run(model, data)


def test_the_package_has_both_lazily():
    assert pml_compat.embed is embed and fit_width(INPUTS, 2).shape == (23, 2)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pml_compat.nothing
