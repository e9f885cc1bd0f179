"""Score models made of a network, one class for each quantity that a network may predict."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_callable, check_choice, check_data_range, check_part
from .._coefficients import Coefficient
from .._grid_times import kernel_tensors, label_at, with_values
from .._keywords import explained
from .._precision import NetworkDtype, narrowed, state_dtype
from .._units import keep_unit
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Prediction
from ._exact_labels import LabelGuard
from ._network_labels import check_network_labels
from .labels import Label, LogSigmaLabel, SigmaLabel, TimeLabel, checked_label

_LEARNED = ("learned_range", "learned")
_VARIANCES = (*_LEARNED, "fixed_small", "fixed_large")
_OVERFLOW = (
    "use bfloat16, or a model that scales the network's input, such as EDMModel, or a process with "
    "less noise"
)


@explained
class NetworkModel(ScoreModel):
    r"""A score model made of a network, whose output F predicts a x0 + b eps.

    A subclass defines the `parameterization`, a and b. The variance of reverse steps may be
    learned as well. The output is then (B, 2 C, ...): C channels for F, and C channels v with

    .. math::
        \log \mathrm{var} = u \log v_{forward} + (1 - u) \log v_{posterior}, \quad
        u = (v + 1) / 2,

    for "learned_range", valid for steps of any length, or log var = v for "learned", valid for the
    steps that the network was trained on. A variance that is not learned is v_posterior, for None
    and "fixed_small", or v_forward, for "fixed_large". The bounds of a chain (`VLB`, `HybridLoss`,
    `ChainNELBO`) are those of reverse steps with this variance. Samplers add the noise of their
    predictor: `Ancestral("model")` reads a learned variance from the prediction;
    `Ancestral("posterior")` and `Ancestral("forward")` use the fixed variances, whatever that of
    the model.

    The state is in float32 or float64; the network is called in its own dtype, that of most of its
    parameters, and its output is converted back. Noise labels are in float32 at least, even if
    `fully_shard` or another wrapper casts the inputs of the network.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D), or to an object
            with that tensor in `.sample`, like diffusers' networks.
        sde: the forward process.
        label: the noise label that the network is conditioned on, a callable (sde, t) -> (B,).
        data_range: the range of the training data. Data outside it raise an error in objectives and
            likelihoods; use it to convert samples to images.
        variance: "learned_range", "learned", "fixed_small", "fixed_large" or None.

    Raises:
        TypeError: if the network or the label is not callable, sde is not a ForwardSDE, or
            data_range is not a pair of numbers.
        ValueError: if variance is none of these, data_range not low < high, or a network of the
            library cannot embed the noise labels or should not divide its output by them.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (section 3.1).
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sde: ForwardSDE,
        *,
        label: Label | None = None,
        data_range: tuple[float, float] | None = None,
        variance: str | None = None,
    ) -> None:
        """Join the network and its process."""
        super().__init__()
        label = self._default_label() if label is None else label
        check_part(sde, ForwardSDE, "sde")
        check_callable(network, "network")
        check_callable(label, "label")
        check_choice("variance", variance, (*_VARIANCES, None))
        self.network = network
        self.sde = sde
        self.label = label
        self.data_range = None if data_range is None else check_data_range(data_range)
        self.variance = variance
        self._dtype = NetworkDtype(network)
        self._guard = LabelGuard(network)
        check_network_labels(self)

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name no output where a subclass has another parameterization."""
        super().__init_subclass__(**kwargs)
        keep_unit(cls, "parameterization")

    @property
    def _unit(self) -> Hashable:
        """The name of the output where a weighting has one, see _units.py."""
        return None

    @staticmethod
    def _default_label() -> Label:
        return TimeLabel()

    @abc.abstractmethod
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        """Return a and b of the output a x0 + b eps, (B,) or constants.

        The values are elementwise functions of alpha and sigma, each (B,).
        """

    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's input (B, *D) for a state x (B, *D); by default the state."""
        return x

    def _unscaled(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return a network's output (B, *D) in the parameterization, one for all channels."""
        return output

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict the data and the noise in a state x (B, *D) at times t (B,).

        Raises:
            ValueError: if t is not (B,), is outside [0, T] or on another device, the network's
                output has another shape than x, or its input overflows float16 (read on the CPU
                only).
            TypeError: if x or t is not a floating-point tensor.
        """
        sde, network = self.sde, self.network
        kernel = kernel_tensors(sde, x, t)
        x = x if x.dtype.itemsize >= 4 else x.float()
        dtype = self._dtype(network)
        inputs = self.scale_input(x, *kernel)
        if dtype is None:
            dtype = x.dtype
        elif dtype is not inputs.dtype:
            inputs = narrowed(inputs, dtype, "x", _OVERFLOW)
            cond = {name: _like_weights(value, dtype) for name, value in cond.items()}
        # In half precision a label could not distinguish a thousand times.
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        noise_label = label_at(self.label, sde, t, wide)
        if noise_label is None:
            noise_label = checked_label(self.label(sde, t), t)
            if noise_label.dtype is not wide:
                noise_label = noise_label.to(dtype=wide)
        output = self._guard(network, inputs, noise_label, cond)
        learned = self.variance in _LEARNED
        if learned or not isinstance(output, Tensor) or output.shape != x.shape:
            output = self._tensor(output, x)
        alpha, sigma, (a, b) = with_values(self, "parameterization", *kernel)
        variances = {}
        if learned:
            output, v = output.to(x.dtype).chunk(2, 1)
            raw = self.variance == "learned"
            variances = {"log_var": v} if raw else {"log_var_fraction": (v + 1) / 2}
        output = self._unscaled(output, x, *kernel)
        prediction = Prediction.from_output(x, output, alpha, sigma, a=a, b=b, **variances)
        if (unit := self._unit) is not None:
            prediction._unit = unit
        return prediction

    def _tensor(self, output: Any, x: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"network: expected a tensor of shape {tuple(x.shape)}, "
                    f"got {type(output).__name__}"
                )
        shape, learned = tuple(x.shape), ""
        if self.variance in _LEARNED:
            if x.ndim < 2:
                raise ValueError(f"x: expected channels (B, C, ...), with a learned variance, "
                                 f"got shape {shape}")  # fmt: skip
            shape, learned = (len(x), 2 * x.shape[1], *x.shape[2:]), ", with a learned variance"
        if output.shape != shape:
            got = f"{tuple(output.shape)}"
            if x.ndim > 1 and output.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
                got += (
                    "; for a network that also predicts a variance, such as ADMUNet, pass the "
                    'model variance="learned_range", or make the network with learn_sigma=False'
                )
            elif learned and output.shape == x.shape:
                got += "; make the network with twice the channels, or the model with variance=None"
            raise ValueError(f"network: expected an output of shape {shape}{learned}, got {got}")
        return output


def _like_weights(value: Any, dtype: torch.dtype) -> Any:
    """Return a condition in float32 if it is in float64 and the weights are not."""
    wide = isinstance(value, Tensor) and value.dtype == torch.float64
    return value.to(state_dtype(dtype)) if wide else value


class EpsModel(NetworkModel):
    r"""A network that predicts the noise: F = eps, score = -F / sigma.

    The default label is 999 t / T.

    Args: those of `NetworkModel`.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> import torch
    >>> from diffusionkit import VPSDE, EpsModel
    >>> model = EpsModel(lambda x, noise_label: 0 * x, VPSDE())
    >>> model.predict(torch.ones(2, 3), torch.tensor([0.1, 0.9])).eps.shape
    torch.Size([2, 3])
    """

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, 1.0


class X0Model(NetworkModel):
    r"""A network that predicts the data: F = x0, score = (alpha F - x) / sigma^2.

    The default label is 999 t / T.

    Args: those of `NetworkModel`.

    Source: Salimans and Ho, Progressive Distillation, 2022, arXiv 2202.00512.
    """

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0


class VModel(NetworkModel):
    r"""A network that predicts the velocity: F = alpha eps - sigma x0.

    The default label is 999 t / T.

    Args: those of `NetworkModel`.

    Source: Salimans and Ho, Progressive Distillation, 2022, arXiv 2202.00512.
    """

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -sigma, alpha


class VelocityModel(NetworkModel):
    r"""A network that predicts the velocity of flow matching: F = eps - x0.

    .. math::
        x_0 = \frac{x - \sigma F}{\alpha + \sigma}, \quad
        \epsilon = \frac{x + \alpha F}{\alpha + \sigma},

    so that F determines both at all noise levels, of any process. With a `FlowMatchingSDE` it is
    dx_t / dt; `VModel` predicts another velocity, alpha eps - sigma x0.

    The default label is 999 t / T, for networks that embed time as those of DDPM do, with
    sinusoids of periods up to 1e4. Published networks of diffusers, such as Stable Diffusion 3 and
    Flux, were trained with TimeLabel(1000.0), and those that embed t itself with TimeLabel(1.0).

    Args: those of `NetworkModel`.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, arXiv 2210.02747; Liu et
    al., Flow Straight and Fast, 2023, arXiv 2209.03003.

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, VelocityModel
    >>> model = VelocityModel(lambda x, noise_label: -x, FlowMatchingSDE())
    >>> model.predict(torch.ones(1, 2), torch.tensor([1.0])).x0
    tensor([[2., 2.]])
    """

    @property
    @override
    def _unit(self) -> Hashable:
        return "velocity"

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -1.0, 1.0


class RawScoreModel(NetworkModel):
    r"""A network that predicts the score itself: F = -eps / sigma.

    Its output spans as many decades as sigma does, so the network is expected to divide by
    sigma, as the NCSN++ of VE does. The default label is sigma / alpha.

    Args: those of `NetworkModel`.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.
    """

    @staticmethod
    @override
    def _default_label() -> Label:
        return SigmaLabel()

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, -1.0 / sigma


class ScaledScoreModel(NetworkModel):
    r"""A network that predicts sigma times the score: F = sigma score = -eps.

    The default label is log(sigma / (2 alpha)), with which this is EDM's VE preconditioning.

    Args: those of `NetworkModel`.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (table 1).
    """

    @staticmethod
    @override
    def _default_label() -> Label:
        return LogSigmaLabel(1.0, reference=2.0)

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, -1.0
