"""Networks that record their constructor arguments, so that they can be rebuilt from a file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .._keywords import misfit

Init = TypeVar("Init", bound=Callable[..., None])


def remembers(init: Init) -> Init:
    """Make a constructor record its arguments, defaults included, in ``self.config``.

    A parameter ``**options`` is flattened. If a decorated constructor calls another, the
    arguments of the outer one take precedence.

    Args:
        init: the ``__init__`` of a network.

    Returns:
        The same constructor, which sets ``config`` first.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            parameters = list(signature.parameters.values())[1:]
            message = misfit(type(self).__name__, parameters, args, kwargs)
            raise (error if message is None else TypeError(message)) from error
        bound.apply_defaults()
        arguments: dict[str, Any] = dict(list(bound.arguments.items())[1:])
        arguments |= arguments.pop("options", {})
        # Written to __dict__ because Module.__init__ has not run yet.
        outer = self.__dict__.get("config", {})
        self.__dict__["config"] = arguments | outer
        init(self, *args, **kwargs)

    return cast(Init, remembering)
