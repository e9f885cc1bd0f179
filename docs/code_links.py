"""A sphinx extension: inline code that names a documented object links to the reference."""

from typing import Any

from code_names import finder
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

NO_LINK = (nodes.reference, nodes.title, nodes.term)  # links already, or headings


class CodeLinks(SphinxPostTransform):
    """Put a reference around each literal that names exactly one object."""

    default_priority = 200
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Change the document."""
        find = finder(self.env.domains["py"].objects)
        for node in list(self.document.findall(nodes.literal)):
            entry = find(node.astext())
            if entry and not any(isinstance(parent, NO_LINK) for parent in ancestors(node)):
                target = (entry.docname, entry.node_id, node.deepcopy())
                node.replace_self(make_refnode(self.app.builder, self.env.docname, *target))


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
