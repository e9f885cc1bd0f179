"""Sample quality metrics of features, streaming and mergeable across processes."""

from ._features import all_gather
from .extract import extract_features, inception_features
from .frechet import FeatureMoments, frechet_distance
from .inception_score import InceptionScore, InceptionScoreResult
from .kernel import KernelDistance, kernel_distance
from .neighbors import PrecisionRecall, precision_recall
from .quality import SampleQuality, evaluate_samples
from .shards import load_shards, sample_to_shards, to_uint8

__all__ = [
    "FeatureMoments",
    "InceptionScore",
    "InceptionScoreResult",
    "KernelDistance",
    "PrecisionRecall",
    "SampleQuality",
    "all_gather",
    "evaluate_samples",
    "extract_features",
    "frechet_distance",
    "inception_features",
    "kernel_distance",
    "load_shards",
    "precision_recall",
    "sample_to_shards",
    "to_uint8",
]
