"""The files of a run: its checkpoints in a folder, and signals to stop."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from .._checks import check_count, check_sequence
from .._files import CheckpointError
from .._repr import Described
from .._writing import checked_path
from ..distributed._group import broadcast_object, rank_and_world_size
from .reading import read_checkpoint

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})\.pt")


class CheckpointFolder(Described):
    """The checkpoints of a run in one folder, named after their steps; the last ones are kept.

    A run resumes automatically if it begins with `newest`, and calls `keep_last` after each
    `save_checkpoint`::

        checkpoints = CheckpointFolder("run/checkpoints", keep=3)
        if (path := checkpoints.newest()) is not None:
            step = load_checkpoint(path, model, optimizer=optimizer, ema=ema).step
        ...
            save_checkpoint(checkpoints.path(step), model, optimizer=optimizer, ema=ema, step=step)
            checkpoints.keep_last(step)

    Args:
        folder: the folder, made by `path` if it does not exist.
        keep: the number of checkpoints to keep.

    Raises:
        ValueError: if keep < 1.
        TypeError: if folder is not a path, or keep not an integer.

    >>> import tempfile
    >>> from diffusionkit.training import CheckpointFolder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = CheckpointFolder(folder)
    ...     checkpoints.path(1000).name, checkpoints.newest()
    ('step-00001000.pt', None)
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        """Check the arguments; nothing is written yet."""
        check_count(keep, "keep")
        self.folder = Path(checked_path(folder))
        self.keep = keep

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after a step, in the folder, which now exists."""
        check_count(step, "step", least=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """Return the steps of the files in the folder, intact or not, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))

    def newest(self) -> Path | None:
        """Return the intact checkpoint of the latest step, None if there is none.

        Files are read, the newest first, until one is intact. The others are named in a warning in
        the log. In several processes all must call this, and get the result of the first.
        """
        found = self._newest() if rank_and_world_size()[0] == 0 else None
        return broadcast_object(found)

    def _newest(self) -> Path | None:
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                read_checkpoint(path)
            except (CheckpointError, OSError) as error:
                logger.warning("skipped a damaged checkpoint: %s", error)
            else:
                return path
        return None

    def keep_last(self, step: int) -> None:
        """Remove all but the last `keep` checkpoints up to a step, which has just been saved.

        Files of later steps, which a run that resumed from an earlier one has skipped, do not count
        and are kept. In several processes the first removes the files.
        """
        check_count(step, "step", least=0)
        if rank_and_world_size()[0] == 0:
            earlier = [saved for saved in self.steps() if saved <= step]
            for saved in earlier[: -self.keep]:
                self.path(saved).unlink(missing_ok=True)


class StopSignals(Described):
    """Catch signals in a block, so that a loop can end after a step instead of within one.

    The first signal is recorded in `received`; the next one acts as it did before the block. Only
    the main thread can catch signals. In several processes they need not arrive at the same
    step: let all processes agree, for example by a sum over them.

        with StopSignals() as stop:
            while step < steps and stop.received is None:
                ...

    Args:
        signals: the signals, by default SIGTERM, which schedulers of clusters send, and SIGINT,
            which is ctrl-C.

    Attributes:
        received: the name of the signal, None before one arrives.

    Raises:
        ValueError: if there is no signal, or no such one.
        TypeError: if a signal is not an integer.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Check the signals; none is caught yet."""
        check_sequence(signals, "signals")
        if not signals:
            raise ValueError("signals: expected at least one, got none")
        for one in signals:
            check_count(one, "signals", most=signal.NSIG - 1)
        self.signals = tuple(signals)
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Catch the signals."""
        for one in self.signals:
            self._before[one] = signal.signal(one, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore what signals did before."""
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
