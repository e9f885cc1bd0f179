"""Score models on the Hugging Face Hub, through its package, which is optional."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .._checks import check_flag
from .._model_checks import check_is_model
from .._writing import checked_path
from ..interfaces import ScoreModel
from .model_files import DESCRIPTION, WEIGHTS, load_model, save_model


def push_to_hub(
    model: ScoreModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload a score model",
) -> str:
    """Upload a score model to the Hugging Face Hub, in the files of `save_model`.

    The repository is created if there is none. A model card that names the library is added.

    Args:
        model: the score model.
        repo_id: the repository, such as "name/model".
        private: whether a new repository is private; the owner's default if None.
        token: the access token; that of ``hf auth login`` if None.
        branch: the branch; the main one if None.
        commit_message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if the package huggingface_hub is not installed.
        TypeError: if model is not a ScoreModel or one of its parts is not registered.
        ValueError: if `save_model` would raise one, or repo_id is not the name of a repository.
    """
    check_is_model(model)
    for name, value in (("repo_id", repo_id), ("commit_message", commit_message)):
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name}: expected a text, got {value!r:.80}")
    if private is not None:
        check_flag(private, "private")
    mixin: Any = _hub().ModelHubMixin
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)  # before a repository is created

        class HubModel(mixin, library_name="diffusionkit", tags=["score-based-diffusion"]):  # type: ignore[misc, call-arg]
            def _save_pretrained(self, save_directory: Path) -> None:
                for name in (DESCRIPTION, WEIGHTS):
                    shutil.copy(os.path.join(folder, name), save_directory)

        address: Any = HubModel().push_to_hub(
            repo_id, commit_message=commit_message, private=private, token=token, branch=branch
        )
    return str(address)


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ScoreModel:
    """Load a score model from a repository of the Hugging Face Hub, or from a local folder.

    Only the description and the weights are downloaded, and nothing in them is executed; see
    `load_model`.

    Args:
        source: the repository, such as "name/model", or the folder.
        revision: the branch, tag or commit; the main branch if None.
        token: the access token; that of ``hf auth login`` if None.
        cache_dir: the folder of downloaded files.
        local_files_only: whether to take files downloaded before, without the network.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ImportError: if the package safetensors or, for a repository, huggingface_hub is not
            installed.
        FileNotFoundError: if the repository or the folder has no such files.
        CheckpointError: as `load_model`.
    """
    folder = checked_path(source)
    check_flag(local_files_only, "local_files_only")
    if not os.path.isdir(folder):
        folder = _hub().snapshot_download(
            folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[DESCRIPTION, WEIGHTS],
        )
    return load_model(folder)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs the package huggingface_hub: "
            'pip install "diffusionkit-torch[hub]"'
        ) from error
    return huggingface_hub
