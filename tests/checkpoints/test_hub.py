"""Models on the Hugging Face Hub: what is uploaded and downloaded, without the network."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusionkit import VPSDE, CheckpointError, EDMModel
from diffusionkit.checkpoints import from_pretrained, push_to_hub, save_model
from diffusionkit.networks import MLP


def model() -> EDMModel:
    torch.manual_seed(0)
    return EDMModel(MLP(2, width=4), VPSDE(), 0.7).eval()


def equal(a, b) -> bool:
    return type(a) is type(b) and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one repository, instead of the one on the network."""
    hub = pytest.importorskip("huggingface_hub")
    folder, calls = tmp_path / "server", []

    class Api:
        def __init__(self, token=None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, **_):
            calls.append(("upload", repo_id, commit_message, revision))
            shutil.copytree(folder_path, folder, dirs_exist_ok=True)
            return f"https://hub.example/{repo_id}/commit/1"

    def download(repo_id, *, allow_patterns, **options) -> str:
        calls.append(("download", repo_id, options["revision"], options["local_files_only"]))
        found = tmp_path / "cache"
        found.mkdir(exist_ok=True)
        for name in allow_patterns:
            shutil.copy(folder / name, found)
        return str(found)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return SimpleNamespace(folder=folder, calls=calls)


def test_a_model_goes_up_and_comes_down(server) -> None:
    own = model()
    address = push_to_hub(own, "someone/moons", private=True, token="t", branch="b")
    assert address == "https://hub.example/someone/moons/commit/1"
    assert server.calls == [
        ("token", "t"),
        ("create", "someone/moons", True, True),
        ("upload", "someone/moons", "Upload a score model", "b"),
    ]
    found = sorted(path.name for path in Path(server.folder).iterdir())
    assert found == ["README.md", "model.json", "model.safetensors"]
    card = (server.folder / "README.md").read_text()
    assert "library_name: diffusionkit" in card
    assert equal(own, from_pretrained("someone/moons", revision="b"))
    assert server.calls[-1] == ("download", "someone/moons", "b", False)


def test_a_model_that_cannot_be_saved_is_not_uploaded(server) -> None:
    foreign = EDMModel(torch.nn.Bilinear(2, 2, 2), VPSDE())
    with pytest.raises(TypeError, match=r"model\.network: expected a class of diffusionkit"):
        push_to_hub(foreign, "someone/moons")
    assert server.calls == []


def test_local_folders_need_no_package(tmp_path, monkeypatch) -> None:
    own = model()
    save_model(tmp_path / "m", own)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert equal(own, from_pretrained(tmp_path / "m"))
    (tmp_path / "m" / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="got another kind of file"):
        from_pretrained(tmp_path / "m")
    install = r'huggingface_hub: pip install "diffusionkit-torch\[hub\]"'
    with pytest.raises(ImportError, match=install):
        from_pretrained("someone/moons")
    with pytest.raises(ImportError, match=install):
        push_to_hub(own, "someone/moons")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": MLP(2)}, "model: expected a ScoreModel, got MLP"),
        ({"repo_id": ""}, "repo_id: expected a text, got ''"),
        ({"repo_id": 3}, "repo_id: expected a text, got 3"),
        ({"private": "yes"}, "private: expected"),
        ({"commit_message": None}, "commit_message: expected a text, got None"),
    ],
)
def test_arguments(arguments, match) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        push_to_hub(**{"model": model(), "repo_id": "someone/moons"} | arguments)


def test_names_of_repositories_are_checked(server) -> None:
    with pytest.raises(ValueError, match="someone/moons/more"):
        push_to_hub(model(), "someone/moons/more")
    assert server.calls == []
