"""Contents and files of every format, written by the real writers."""

import io
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusionkit._files import CheckpointError, read_torch

SOURCE = "open('victim', 'w')\nraise SystemExit"  # must not run when an EDM pickle is read


class EasyDict(dict):
    """A stand-in for EDM's class."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the readers call no function that a file names")


def persistent(cls: type) -> type:
    """Make a class pickle like EDM's persistent classes."""

    def reduce(self) -> tuple[Any, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": cls.__name__,
            "state": dict(vars(self)),
        }
        return _reconstruct_persistent_obj, (meta,), None

    cls.__reduce__ = reduce
    return cls


@persistent
class Conv2d(nn.Module):
    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (channels,), {"bias": bias, "scale": np.sqrt(0.5)}
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.randn(channels)) if bias else None
        self.register_buffer("filter", None if bias else torch.ones(2, 2))


@persistent
class SongUNet(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (), kwargs
        self.map_label = None
        self.enc = nn.ModuleDict({"8x8_conv": Conv2d(2, bias=True)})
        self.enc["8x8_half"] = Conv2d(3, bias=False).half()
        self.out = nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.BatchNorm1d(3))
        self.register_buffer("freqs", torch.randn(4))
        self.register_buffer("hidden", torch.randn(4), persistent=False)


@persistent
class EDMPrecond(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (), EasyDict(kwargs)
        self.sigma_max, self.dtype = float("inf"), torch.float16
        self.model = SongUNet(img_resolution=8)


@persistent
class EDMLoss:
    def __init__(self) -> None:
        self._init_args, self._init_kwargs = None, None
        self.P_mean = np.float64(-1.2)


KWARGS = {
    "img_resolution": 8,
    "channel_mult": [1, 2],
    "model_type": "SongUNet",
    "filter": (1, 3, 3, 1),
    "init": {"init_mode": "xavier_uniform", "init_weight": np.float64(np.sqrt(0.2))},
    "use_fp16": np.bool_(True),
    "count": np.int64(-3),
}


@pytest.fixture(scope="session")
def edm_network() -> nn.Module:
    torch.manual_seed(0)
    return EDMPrecond(**KWARGS)


@pytest.fixture(scope="session")
def pickled():
    """A function that pickles with stand-ins for EDM's modules."""

    def dump(value: Any, protocol: int = 4) -> bytes:
        names = {
            "torch_utils.persistence": _reconstruct_persistent_obj,
            "dnnlib.util": EasyDict,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, member in names.items():
                module = types.ModuleType(name)
                setattr(module, member.__name__, member)
                patch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
                patch.setitem(sys.modules, name, module)
                patch.setattr(member, "__module__", name)
            return pickle.dumps(value, protocol)

    return dump


@pytest.fixture(scope="session")
def edm_content(edm_network) -> dict[str, Any]:
    kwargs = EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=False)
    return {"ema": edm_network, "loss_fn": EDMLoss(), "augment_pipe": None, "dataset": kwargs}


@pytest.fixture(scope="session")
def torch_content() -> dict[str, Any]:
    """The state of a training run, with plain values of every type."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 2e-4 * np.minimum(3 / 5000, 1.0)  # numpy's float64, as score_sde saves it
    base = torch.arange(24.0)
    numbers = [
        np.dtype(code).type(1)
        for code in ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d"]
    ]
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": list(network.parameters())},
        "step": 3,
        "numbers": numbers,
        "views": [
            base,
            base[3:9:2],
            base.view(4, 6).T,
            torch.ones(1).expand(5),
            base[:0],
            torch.ones(5, 0),
        ],
        "dtypes": [
            torch.ones(2, dtype=dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)
        ],
        "integers": [
            torch.ones(2, dtype=dtype)
            for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        ],
        "bool": torch.tensor([True, False]),
        "plain": [
            None,
            True,
            2**70,
            -1.5,
            1j,
            "ü",
            b"\xff\x00",
            {1, "a"},
            (1, (2,)),
            {0: 1, "": 2},
        ],
        "torch": [torch.Size((2, 3)), torch.float32, torch.device("cpu")],
    }


@pytest.fixture(scope="session")
def saved():
    """A function that returns the bytes written by torch.save."""

    def save(value: Any, *, legacy: bool = False) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=not legacy)
        return file.getvalue()

    return save


@pytest.fixture
def given(monkeypatch):
    """A function that lets the loaders find a content at a path, without writing a file."""

    def give(content: Any) -> str:
        for module in ("_score_sde_file", "dit_files", "improved_diffusion"):
            name = f"diffusionkit.checkpoints.{module}.read_torch"
            monkeypatch.setattr(name, lambda path, **options: content)
        return "checkpoint.pth"

    return give


@pytest.fixture
def rejected(tmp_path):
    """A function that checks the error for a file's content: the path and a reason."""

    def check(content: bytes, match: str, read: Any = read_torch) -> None:
        path = tmp_path / "x.bin"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"(?s)x\.bin: expected a .*, got .*{match}"):
            read(path)

    return check


class EDMPart(nn.Module):
    """A stand-in for any of EDM's modules, with its name and arguments as data."""

    def __init__(self, reconstruct, name, kwargs) -> None:
        super().__init__()
        self.reconstruct, self.name = reconstruct, name
        self._init_args, self._init_kwargs = (), kwargs

    def __reduce__(self):
        state = {key: value for key, value in vars(self).items() if key not in ("name",)}
        del state["reconstruct"]
        meta = {"type": "class", "version": 6, "module_src": "", "class_name": self.name}
        return self.reconstruct, (meta | {"state": state},), None


class Encoder:
    """A stand-in for EDM2's encoders of images, which hold arrays."""

    def __init__(self, reconstruct, name) -> None:
        self.reconstruct, self.name = reconstruct, name

    def __reduce__(self):
        state = {
            "scale": np.float32([0.5, 2.0]),
            "_vae": None,
            "_init_args": (),
            "_init_kwargs": {},
        }
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.name}
        return self.reconstruct, (meta | {"state": state},), None


@pytest.fixture
def written(tmp_path, pickled, edm_network):
    """A function that writes tensors to a pickle like EDM's training; EDM2's has an encoder."""
    reconstruct = edm_network.__reduce__()[0]

    def write(precond, kwargs, tensors, encoder=None) -> str:
        kwargs = {"img_resolution": 8, "img_channels": 3} | kwargs
        root = EDMPart(reconstruct, precond, kwargs)
        for name, tensor in tensors.items():
            module = root
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    new = (
                        EDMPart(reconstruct, "Part", {})
                        if part not in ("enc", "dec")
                        else nn.ModuleDict()
                    )
                    module.add_module(part, new)
                module = module._modules[part]
            if last in ("resample_filter", "freqs", "phases", "u"):
                module.register_buffer(last, tensor)
            else:
                module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        path = tmp_path / "network-snapshot-200000.pkl"
        content = {"ema": root, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}
        if encoder is not None:
            content["encoder"] = Encoder(reconstruct, encoder)
        path.write_bytes(pickled(content))
        return str(path)

    return write
