"""A sphinx extension: inline code that names a documented object links to the reference."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

NAME = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(?:\(.*\))?", re.DOTALL)
NO_LINK = (nodes.reference, nodes.title, nodes.term)  # links already, or headings


class CodeLinks(SphinxPostTransform):
    """Link `VPSDE`, `VPSDE(beta_max=20.0)`, `PCSampler.edit` and `diffusionkit.VPSDE`."""

    default_priority = 200
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Put a reference around each literal that names exactly one object."""
        known = documented(self.env.domains["py"].objects)
        for node in list(self.document.findall(nodes.literal)):
            match = NAME.fullmatch(node.astext())
            entry = known.get(match["name"]) if match else None
            if entry is None or any(isinstance(parent, NO_LINK) for parent in ancestors(node)):
                continue
            target = (entry.docname, entry.node_id, node.deepcopy())
            node.replace_self(make_refnode(self.app.builder, self.env.docname, *target))


def documented(objects: dict[str, Any]) -> dict[str, Any]:
    """Map each unambiguous ending of the objects' names that starts at an object to its entry."""
    entries: dict[str, list[Any]] = {}
    for full, entry in objects.items():
        if entry.aliased:  # the module that defines what a package exports
            continue
        parts = full.split(".")
        # The shortest ending contains the class of a method: `step` alone names many.
        shortest = 2 if ".".join(parts[:-1]) in objects else 1
        for first in range(len(parts) - shortest + 1):
            entries.setdefault(".".join(parts[first:]), []).append(entry)
    return {end: found[0] for end, found in entries.items() if len(found) == 1}


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    """Return the nodes that contain a node."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform."""
    app.add_post_transform(CodeLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
