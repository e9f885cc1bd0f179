"""What the fused kernel does along each dimension."""

from typing import NamedTuple

Sums = tuple[tuple[int, tuple[float, ...]], ...]


class Line(NamedTuple):
    """`upfirdn` along one dimension.

    Attributes:
        taps: The kernel.
        up: Upsampling factor.
        down: Downsampling factor.
        before: Zeros before the first sample.
        inputs: Number of samples.
        outputs: Number of filtered samples.
    """

    taps: tuple[float, ...]
    up: int
    down: int
    before: int
    inputs: int
    outputs: int

    def after(self) -> int:
        """Zeros after the last sample: as many as are needed."""
        reached = (self.outputs - 1) * self.down + len(self.taps)
        return reached - self.before - self.inputs * self.up

    def adjoint(self) -> "Line":
        """The transpose of this linear map: it exchanges the factors and turns the kernel."""
        before = len(self.taps) - 1 - self.before
        return Line(self.taps[::-1], self.down, self.up, before, self.outputs, self.inputs)

    def sums(self, count: int) -> Sums:
        """The first outputs as weighted sums of samples.

        The next `count` outputs are the same sums, `count * down / up` samples on.

        Args:
            count: Number of outputs, a multiple of `up`.

        Returns:
            For each output the index of a sample, negative before the first one, and the weights
            of this and the following samples. The zeros between samples need no weight.
        """
        sums = []
        for output in range(count):
            start = output * self.down - self.before  # of the window, on the upsampled signal
            first = -(-start // self.up)
            sums.append((first, self.taps[::-1][first * self.up - start :: self.up]))
        return tuple(sums)


class Plan(NamedTuple):
    """`upfirdn` of images.

    Attributes:
        vertical: What to do along the columns of pixels.
        horizontal: What to do along the rows.
        gain: Factor of the output.
    """

    vertical: Line
    horizontal: Line
    gain: float

    def adjoint(self) -> "Plan":
        """The transpose of this linear map."""
        return Plan(self.vertical.adjoint(), self.horizontal.adjoint(), self.gain)
