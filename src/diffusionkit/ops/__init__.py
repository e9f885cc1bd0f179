"""FIR resampling of signals, images and volumes; it knows no network and no SDE."""

from .fir import fir_conv_downsample, fir_conv_upsample, fir_downsample, fir_upsample, upfirdn

__all__ = [
    "fir_conv_downsample",
    "fir_conv_upsample",
    "fir_downsample",
    "fir_upsample",
    "upfirdn",
]
