"""Sample quality metrics of features, streaming and mergeable across processes."""

from ._features import all_gather
from .dataset import gather_features, stream_features
from .extract import extract_features, inception_features
from .extractors import features, register_features
from .frechet import FeatureMoments, FeatureStatistics, frechet_distance
from .inception_score import InceptionScore, InceptionScoreResult
from .kernel import KernelDistance, kernel_distance
from .neighbors import Nearest, PrecisionRecall, nearest, precision_recall
from .quality import SampleQuality, evaluate_samples
from .shards import load_shards, sample_to_shards, to_uint8
from .statistics import load_statistics, save_statistics

__all__ = [
    "FeatureMoments",
    "FeatureStatistics",
    "InceptionScore",
    "InceptionScoreResult",
    "KernelDistance",
    "Nearest",
    "PrecisionRecall",
    "SampleQuality",
    "all_gather",
    "evaluate_samples",
    "extract_features",
    "features",
    "frechet_distance",
    "gather_features",
    "inception_features",
    "kernel_distance",
    "load_shards",
    "load_statistics",
    "nearest",
    "precision_recall",
    "register_features",
    "sample_to_shards",
    "save_statistics",
    "stream_features",
    "to_uint8",
]
