"""Contents of checkpoints as earlier versions wrote them."""

from typing import Any


def as_version(version: int, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of one process as an earlier version had it."""
    older = content | {"version": version}
    later = ["description"]
    if version < 3:
        generators = {name: by_rank[0] for name, by_rank in content["generators"].items()}
        older |= {"random": content["random"][0], "generators": generators}
        later += ["world_size"]
    if version == 1:
        later += ["about", "objective", "optimizer_names", "optimizer_entries"]
    return {name: part for name, part in older.items() if name not in later}
