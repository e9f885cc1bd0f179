"""Saved statistics of features, in the file format of pytorch-fid and EDM."""

from __future__ import annotations

import os
import zipfile
from io import BytesIO
from typing import Any

import numpy as np
import torch

from .._checks import check_part
from .._files import ZIP, CheckpointError, opened
from .._writing import atomic_write, checked_path
from .frechet import FeatureMoments, FeatureStatistics

_EXPECTED = "statistics of features, a .npz file with mu (d,) and sigma (d, d)"


def save_statistics(
    path: str | os.PathLike[str], moments: FeatureMoments, *, features: str | None = None
) -> None:
    """Write the mean and covariance of features to a .npz file, as `mu` and `sigma`.

    The file also states the number of samples and the extractor, which other programs ignore.

    Args:
        path: the file.
        moments: the moments of at least two samples.
        features: the name of the feature extractor.

    Raises:
        ValueError: if there are fewer than two samples.
        TypeError: if an argument has the wrong type.
    """
    check_part(moments, FeatureMoments, "moments")
    if features is not None and not isinstance(features, str):
        raise TypeError(f"features: expected a name or None, got {type(features).__name__}")
    entries = {
        "mu": moments.mean.cpu().numpy(),
        "sigma": moments.covariance.cpu().numpy(),
        "count": np.array(moments.count),
    }
    if features is not None:
        entries["features"] = np.array(features)
    content = BytesIO()
    np.savez(content, **entries)  # type: ignore[arg-type]
    atomic_write(path, lambda file: file.write(content.getvalue()))


def load_statistics(
    path: str | os.PathLike[str], *, features: str | None = None
) -> FeatureStatistics:
    """Return the statistics of a .npz file with `mu` and `sigma`, for `frechet_distance`.

    Files of pytorch-fid and EDM are read too.

    Args:
        path: the file.
        features: the name of the extractor that is expected, if the file states one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, or holds something else or other features.
        TypeError: if features is neither a name nor None.
    """
    if features is not None and not isinstance(features, str):
        raise TypeError(f"features: expected a name or None, got {type(features).__name__}")
    with (
        opened(checked_path(path), _EXPECTED, ZIP) as file,
        np.load(file, allow_pickle=False) as kept,
    ):
        missing = [name for name in ("mu", "sigma") if name not in kept.files]
        if missing:
            held = ", ".join(kept.files) or "nothing"
            raise CheckpointError(f"a file without {' and '.join(missing)}, with {held}")
        mean, covariance = (np.asarray(kept[name], np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise CheckpointError(f"mu {mean.shape} and sigma {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise CheckpointError("NaN or infinity")
        count, stated = _scalar(kept, "count", "iu"), _scalar(kept, "features", "U")
        if features is not None and stated is not None and stated != features:
            raise CheckpointError(f"statistics of other features, {stated} instead of {features}")
    return FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count, stated)


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a .npz file with entries of statistics; images have others."""
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return bool({"mu.npy", "sigma.npy"} & set(archive.namelist()))


def _scalar(kept: Any, name: str, kinds: str) -> Any:
    """Return a number or a string of a file, None if it has none."""
    if name not in kept.files:
        return None
    value = kept[name]
    return value.item() if value.ndim == 0 and value.dtype.kind in kinds else None
