"""Images to train on: readers, a real data set without a download, endless batches."""

from .endless import Batch, EndlessBatches
from .image_files import ImageFiles, open_images
from .images import ImageData, ImageTensors
from .typefaces import glyphs

__all__ = [
    "Batch",
    "EndlessBatches",
    "ImageData",
    "ImageFiles",
    "ImageTensors",
    "glyphs",
    "open_images",
]
