"""Networks that remember how they were built, so that a file can build them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

Init = TypeVar("Init", bound=Callable[..., None])


def remembers(init: Init) -> Init:
    """Let a constructor keep its arguments, defaults included, in ``self.config``.

    A parameter ``**options`` is unfolded. Where a constructor calls another of this kind, the
    arguments of the outer one win.

    Args:
        init: the ``__init__`` of a network.

    Returns:
        The same constructor, which sets ``config`` first.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = dict(list(bound.arguments.items())[1:])
        arguments |= arguments.pop("options", {})
        # Straight into the dictionary: the module is not initialised yet.
        outer = self.__dict__.get("config", {})
        self.__dict__["config"] = arguments | outer
        init(self, *args, **kwargs)

    return cast(Init, remembering)
