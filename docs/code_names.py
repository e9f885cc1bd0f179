"""Which documented object inline code on a page names, if it names exactly one."""

import re
from collections.abc import Callable, Mapping
from typing import Any

NAME = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(?P<call>\(.*\))?", re.DOTALL)


def finder(objects: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a function that finds `VPSDE`, `VPSDE(0.1)`, `EMA.update` or `diffusionkit.VPSDE`.

    Args:
        objects: the entries of objects by full name; those that are `aliased` are other names.
    """
    entries: dict[str, list[Any]] = {}
    for full, entry in objects.items():
        if entry.aliased:  # the module that defines what a package exports
            continue
        parts = full.split(".")
        # The shortest ending contains the class of a method: `step` alone names many.
        owner = objects.get(".".join(parts[:-1]))
        shortest = 1 if owner is None or owner.objtype == "module" else 2
        for first in range(len(parts) - shortest + 1):
            entries.setdefault(".".join(parts[first:]), []).append(entry)

    def find(code: str) -> Any:
        match = NAME.fullmatch(code)
        if match is None:
            return None
        name = match["name"]
        if name.isalpha() and name.islower() and not match["call"]:
            return None  # a word such as `features`, more often an argument than a function
        found = entries.get(name, [])
        return found[0] if len(found) == 1 else None

    return find
