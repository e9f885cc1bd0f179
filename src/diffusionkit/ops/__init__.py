"""FIR resampling of signals, images and volumes, independent of networks and SDEs."""

from .fir import fir_conv_downsample, fir_conv_upsample, fir_downsample, fir_upsample, upfirdn

__all__ = [
    "fir_conv_downsample",
    "fir_conv_upsample",
    "fir_downsample",
    "fir_upsample",
    "upfirdn",
]
