"""Images to train on: readers, a real data set without a download, endless batches."""

from .endless import Batch, EndlessBatches
from .images import ImageData, ImageTensors
from .saved_images import save_grid, save_images
from .typefaces import glyphs

__all__ = [
    "Batch",
    "EndlessBatches",
    "ImageData",
    "ImageTensors",
    "glyphs",
    "save_grid",
    "save_images",
]
