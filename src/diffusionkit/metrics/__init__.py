"""How good samples are: features in, numbers out, streaming and mergeable over processes."""

from ._features import gather
from .extract import extract_features, inception_features
from .frechet import FeatureMoments, frechet_distance
from .inception_score import InceptionScore, Score
from .kernel import KernelDistance, kernel_distance
from .neighbors import PrecisionRecall, precision_recall
from .quality import SampleQuality, evaluate_samples
from .shards import load_shards, sample_to_shards, to_uint8

__all__ = [
    "FeatureMoments",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "SampleQuality",
    "Score",
    "evaluate_samples",
    "extract_features",
    "frechet_distance",
    "gather",
    "inception_features",
    "kernel_distance",
    "load_shards",
    "precision_recall",
    "sample_to_shards",
    "to_uint8",
]
