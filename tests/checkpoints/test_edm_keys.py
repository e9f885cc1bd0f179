"""Network pickles of EDM: tensors are read by name and no code runs."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints._edm_keys import EDMObject, read_edm_pickle


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function that reads a content and checks that its source code did not run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.pkl"

    def reader(content: bytes):
        path.write_bytes(content)
        try:
            return read_edm_pickle(path)
        finally:
            assert list(tmp_path.iterdir()) == [path]

    return reader


@pytest.fixture
def rejected(read):
    def check(content: bytes, match: str) -> None:
        expected = r"(?s)network\.pkl: expected a network pickle of EDM, got .*"
        with pytest.raises(CheckpointError, match=expected + match):
            read(content)

    return check


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_have_the_names_of_the_state_dict(
    read, pickled, edm_content, edm_network, protocol
) -> None:
    ema = read(pickled(edm_content, protocol))["ema"]
    wanted = edm_network.state_dict()
    assert list(ema.state_dict) == list(wanted)
    assert "model.enc.8x8_conv.filter" not in wanted
    for name, value in wanted.items():
        assert ema.state_dict[name].dtype == value.dtype
        assert torch.equal(ema.state_dict[name], value)
        assert not ema.state_dict[name].requires_grad


def test_constructor_arguments_are_plain_values(read, pickled, edm_content) -> None:
    ema = read(pickled(edm_content))["ema"]
    assert ema.class_name == "EDMPrecond"
    assert ema.init_args == ()
    kwargs = ema.init_kwargs
    assert kwargs["img_resolution"] == 8
    assert kwargs["channel_mult"] == [1, 2]
    assert kwargs["filter"] == (1, 3, 3, 1)
    assert kwargs["init"] == {"init_mode": "xavier_uniform", "init_weight": np.sqrt(0.2)}
    assert type(kwargs["init"]["init_weight"]) is float
    assert kwargs["use_fp16"] is True
    assert kwargs["count"] == -3
    assert type(kwargs) is dict


def test_other_entries_are_read(read, pickled, edm_content) -> None:
    data = read(pickled(edm_content))
    assert data["augment_pipe"] is None
    assert data["dataset"] == {
        "class_name": "training.dataset.ImageFolderDataset",
        "use_labels": False,
    }
    assert data["loss_fn"] == EDMObject("EDMLoss", (), {}, {})


def test_views_of_a_shared_storage_are_read(read, pickled, edm_network) -> None:
    """An offset, strides, and no elements."""
    base = torch.arange(24.0)
    edm_network.parts = nn.ParameterList([base[3:9:2], base.view(4, 6).T, base[:0]])
    try:
        state = read(pickled({"ema": edm_network}))["ema"].state_dict
    finally:
        del edm_network.parts
    assert state["parts.0"].tolist() == [3.0, 5.0, 7.0]
    assert torch.equal(state["parts.1"], base.view(4, 6).T)
    assert state["parts.2"].shape == (0,)


def test_tensors_of_another_device_are_read(read, pickled, edm_content, edm_network) -> None:
    content = pickled(edm_content).replace(b"X\x03\0\0\0cpu", b"X\x03\0\0\0mps")
    assert b"mps" in content
    weight = read(content)["ema"].state_dict["model.out.0.weight"]
    assert weight.device.type == "cpu"
    assert torch.equal(weight, edm_network.state_dict()["model.out.0.weight"])


def test_numbers_of_numpy_1_are_read(read, pickled, edm_content) -> None:
    content = pickled(edm_content, 3)
    own = np.float64(0).__reduce__()[0].__module__.encode()
    renamed = content.replace(b"c" + own + b"\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core.multiarray" in renamed
    weight = read(renamed)["ema"].init_kwargs["init"]["init_weight"]
    assert weight == np.sqrt(0.2)


def test_absent_modules_have_no_tensors_and_modules_are_rejected_as_arguments(
    rejected, read, pickled
) -> None:
    network = nn.Linear(2, 3)
    network._init_args, network._init_kwargs = (), {"act": [nn.SiLU()]}
    network.register_module("absent", None)
    holder = type("Holder", (nn.Linear,), {"__reduce__": _reduce})
    network.__class__ = holder
    rejected(pickled({"ema": network}), "expected plain values, got an object of torch.nn.modules")
    network._init_kwargs = {}
    assert list(read(pickled({"ema": network}))["ema"].state_dict) == ["weight", "bias"]


def _reduce(self):
    meta = {"type": "class", "version": 6, "module_src": "", "class_name": "N", "state": vars(self)}
    return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def test_pickle_runs_code_that_the_reader_rejects(rejected, tmp_path) -> None:
    attack = b"\x80\x02cos\nsystem\nX\x0c\0\0\0touch victim\x85R."
    rejected(attack, "the global os.system")
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", code], input=attack, cwd=tmp_path, check=True)
    assert (tmp_path / "victim").exists()


def test_other_versions_are_rejected(rejected, pickled, edm_content) -> None:
    content = pickled(edm_content, 3)
    place = content.index(b"K\x06", content.index(b"version"))
    for version in (5, 7):
        other = content[:place] + b"K" + bytes([version]) + content[place + 2 :]
        rejected(other, f"expected persistence version 6, got {version}")


def test_pickles_without_a_network_are_rejected(rejected, pickled, edm_network) -> None:
    for value in ([1], {"ema": {}}, {"ema": None}, {"G_ema": edm_network}, edm_network):
        rejected(pickled(value), "no network as its entry 'ema'")
    rejected(b"", "an empty file")
    rejected(b"PK\x03\x04" + bytes(50), "a zip file")
    file = io.BytesIO()
    torch.save({"ema": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    rejected(file.getvalue(), "more bytes")


def test_bytes_after_the_pickle_are_rejected(rejected, pickled, edm_content) -> None:
    rejected(pickled(edm_content) + b".", "more bytes")


def test_arrays_are_read_past_but_returned_nowhere(rejected, pickled, edm_network) -> None:
    """EDM2's encoders hold arrays of numbers, in a part that is not read."""
    content = {"ema": edm_network, "x": np.ones(2)}
    rejected(pickled(content), "expected plain values, got an object of numpy.ndarray")
    rejected(pickled(content | {"x": np.array([None])}), "expected the dtype of a number, got 'O8'")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.functional.silu, r"torch\.nn\.functional\.silu"),
        (pickle.loads, r"_pickle\.loads"),
        (print, r"builtins\.print"),
        (torch.ones(2).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    ],
    ids=["function", "loads", "print", "sparse"],
)
def test_error_names_the_forbidden_global(rejected, pickled, edm_network, value, name) -> None:
    rejected(
        pickled({"ema": edm_network, "x": value}), f"the global (?:{name}), which is not among"
    )
