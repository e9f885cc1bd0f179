"""Images to train on: readers, a real data set without a download, endless batches."""

from .augmentation import EDMAugmentation
from .endless import Batch, EndlessBatches
from .image_files import ImageFiles, open_images
from .images import ImageData, ImageTensors
from .saved_images import save_grid, save_images
from .typefaces import glyphs

__all__ = [
    "Batch",
    "EDMAugmentation",
    "EndlessBatches",
    "ImageData",
    "ImageFiles",
    "ImageTensors",
    "glyphs",
    "open_images",
    "save_grid",
    "save_images",
]
