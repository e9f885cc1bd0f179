"""Work that processes share: each takes the next piece that no other has, and waits for none.

A collective at the end would let fast processes wait for slow ones until the group's timeout. Here
processes see by the results (files, or entries of the group's store) what is done. They claim
pieces in the store, which counts atomically with every backend and leaves nothing behind. Claims
only save work: a result depends on the number of its piece, not on the process.
"""

from __future__ import annotations

import contextlib
import io
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import distributed as dist

from ._group import broadcast_object, rank_and_world_size

T = TypeVar("T")

_POLL = 0.2  # seconds between looks at the results of others
_SHORTEST = 2.0  # seconds until a process helps others
_PATIENCE = 3.0  # times the longest piece, until an unfinished one is done again
_UNKNOWN = 60.0  # seconds until then, for a process that has done none
_LEAVING = 10.0  # seconds that a process with all results waits for the others

# Whether ranks evaluate models independently of each other in this context.
_independent: ContextVar[bool] = ContextVar("independent", default=False)


def ranks_are_independent() -> bool:
    """Whether ranks evaluate models at times and as often as they like, in `independent_ranks`."""
    return _independent.get()


@contextlib.contextmanager
def independent_ranks(several: bool = True) -> Iterator[None]:
    """Declare that ranks evaluate models independently, if there are several."""
    token = _independent.set(several or _independent.get())
    try:
        yield
    finally:
        _independent.reset(token)


def share_of(pieces: int, rank: int, world_size: int) -> list[int]:
    """Return the numbers of the pieces of one process, which depend on nothing else.

    Of each `world_size` consecutive pieces every process has one, in a random order: whatever
    processes of another number left undone is shared about evenly.
    """
    found = []
    for block, start in enumerate(range(0, pieces, world_size)):
        order = np.random.default_rng((world_size, block)).permutation(world_size)
        number = start + int(np.flatnonzero(order == rank)[0])
        if number < pieces:
            found.append(number)
    return found


def of_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, in every process; its error is raised in all."""
    made, error = cast(T, None), None
    if rank_and_world_size()[0] == 0:
        try:
            made = make()
        except Exception as problem:  # the others must not wait for this one
            error = problem
    made, error = broadcast_object((made, error))
    if error is not None:
        raise error
    return made


class Dealer:
    """Deals out pieces of work to the processes of a group; all must construct it together.

    Args:
        list_pieces: returns the numbers of the pieces to do. The first process calls it, so that
            all have the same list.

    Attributes:
        pieces: the numbers of the pieces.
    """

    def __init__(self, list_pieces: Callable[[], Sequence[int]]) -> None:
        self._name, self.pieces = of_first(lambda: (uuid.uuid4().hex, list(list_pieces())))
        self._rank, self._world = rank_and_world_size()
        self._longest: float | None = None

    @property
    def own(self) -> list[int]:
        """The pieces that this process does unless others are faster."""
        return self.pieces[self._rank :: self._world]

    def take(self, pieces: Iterable[int], attempt: int = 0) -> Iterator[int]:
        """Yield those of some pieces that no other process has taken."""
        for piece in pieces:
            if self._claimed(piece, attempt):
                started = time.monotonic()
                yield piece
                self._longest = max(self._longest or 0.0, time.monotonic() - started)

    def left(self, is_done: Callable[[int], bool]) -> Iterator[int]:
        """Yield pieces that others have not taken, or not finished, until all are done.

        The pieces of others are taken after a pause, so that equally fast processes do equal
        shares. A process that died does not finish its piece: if there is no new result for three
        times as long as the longest piece took here, the piece is done again.
        """
        if self._world == 1:
            return
        longest = self._longest
        helps = time.monotonic() + max(_SHORTEST, longest or 0.0)
        patience = _UNKNOWN if longest is None else max(_SHORTEST, _PATIENCE * longest)
        waiting, since, attempt = self.pieces, time.monotonic(), 0
        while left := [piece for piece in waiting if not is_done(piece)]:
            now = time.monotonic()
            since = now if len(left) < len(waiting) else since
            waiting = left
            if attempt == 0 and now >= helps:
                yield from self.take(left[::-1])
                since, attempt = time.monotonic(), 1
            elif attempt and now - since >= patience:
                yield from self.take(left[self._rank % len(left) :][:1], attempt)
                since, attempt = time.monotonic(), attempt + 1
            else:
                time.sleep(_POLL)

    def _claimed(self, piece: int, attempt: int) -> bool:
        if self._world == 1:
            return True
        try:
            return int(_store().add(f"{self._name}/claim/{attempt}/{piece}", 1)) == 1
        except RuntimeError:  # the process that holds the store is gone
            return True

    def publish(self, piece: int, result: Any) -> None:
        """Give a result to the other processes."""
        if self._world > 1:
            content = io.BytesIO()
            torch.save(result, content)
            _store().set(self._key(piece), content.getvalue())

    def is_published(self, piece: int) -> bool:
        """Whether a process has published the result of a piece."""
        return bool(_store().check([self._key(piece)]))

    def published(self, piece: int) -> Any:
        """Return the published result of a piece."""
        return torch.load(io.BytesIO(_store().get(self._key(piece))), weights_only=True)

    def leave(self) -> None:
        """Wait a little for processes that still need results: one of them may hold the store."""
        if self._world == 1:
            return
        with contextlib.suppress(RuntimeError):
            key, since = f"{self._name}/left", time.monotonic()
            gone = _store().add(key, 1)
            while gone < self._world and time.monotonic() - since < _LEAVING:
                time.sleep(_POLL)
                gone = _store().add(key, 0)

    def _key(self, piece: int) -> str:
        return f"{self._name}/result/{piece}"


def _store() -> Any:
    """Return the key-value store of the process group."""
    return dist.distributed_c10d._get_default_store()
