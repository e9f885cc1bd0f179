"""The work of the fused kernel along each dimension."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """`upfirdn` along one dimension.

    Attributes:
        taps: the kernel.
        up: upsampling factor.
        down: downsampling factor.
        before: zeros before the first sample.
        inputs: number of samples.
        outputs: number of filtered samples.
    """

    taps: tuple[float, ...]
    up: int
    down: int
    before: int
    inputs: int
    outputs: int

    def after(self) -> int:
        """Return the number of zeros needed after the last sample."""
        reached = (self.outputs - 1) * self.down + len(self.taps)
        return reached - self.before - self.inputs * self.up

    def adjoint(self) -> Line:
        """Return the transpose of this linear map: factors swapped, kernel flipped."""
        before = len(self.taps) - 1 - self.before
        return Line(self.taps[::-1], self.down, self.up, before, self.outputs, self.inputs)

    def sums(self, count: int) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
        """Return the first outputs as weighted sums of samples.

        The next `count` outputs are the same sums, `count * down / up` samples later.

        Args:
            count: number of outputs, a multiple of `up`.

        Returns:
            For each output, the index of the first sample (negative before the input), and the
            weights of this and the following samples. Zeros between samples have no weight.
        """
        starts = [output * self.down - self.before for output in range(count)]  # of the windows
        first = [-(-start // self.up) for start in starts]
        weights = [
            self.taps[::-1][sample * self.up - start :: self.up]
            for sample, start in zip(first, starts, strict=True)
        ]
        return tuple(first), tuple(weights)


class Plan(NamedTuple):
    """`upfirdn` of images.

    Attributes:
        vertical: `upfirdn` along the columns of pixels.
        horizontal: `upfirdn` along the rows.
        gain: factor of the output.
    """

    vertical: Line
    horizontal: Line
    gain: float

    def longest(self) -> int:
        """Return a bound of the indices of samples along either dimension."""
        return max(
            line.inputs * line.up + abs(line.before) + abs(line.after())
            for line in (self.vertical, self.horizontal)
        )

    def adjoint(self) -> Plan:
        """Return the transpose of this linear map."""
        return Plan(self.vertical.adjoint(), self.horizontal.adjoint(), self.gain)
