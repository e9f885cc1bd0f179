"""Unknown and missing keywords: errors that name the right ones, and the line to write."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

# For names of diffusers, EDM, score_sde, k-diffusion, guided-diffusion and others: names of this
# library, of which the first that is an argument is meant, and the line to write where none is.
_FOREIGN: dict[tuple[str, ...], tuple[str, str]] = {
    ("seed", "random_seed", "random_state", "rng", "manual_seed"): (
        "",
        "generator=torch.Generator().manual_seed(0)",
    ),
    ("num_steps", "n_steps", "nsteps", "num_inference_steps", "sampling_steps", "num_timesteps"): (
        "steps",
        "steps=50 where the sampler is made",
    ),
    ("steps", "step"): ("", "steps=50 where the sampler is made"),
    ("num_train_timesteps",): ("steps", "DDPMChain.linear(1000) as the process"),
    ("timesteps", "sigmas", "t_steps", "schedule"): ("grid steps", "grid=... to PCSampler"),
    ("solver", "integrator"): ("method predictor", ""),
    ("rho",): ("", "grid=KarrasGrid(rho=7.0) to PCSampler"),
    ("guidance_scale", "cfg_scale", "cfg", "guidance"): (
        "scale",
        "ClassifierFreeGuidance(model, scale=3.0) to the sampler",
    ),
    ("classifier_scale",): (
        "scale",
        "ClassifierGuidance(model, classifier, scale=2.0) to the sampler",
    ),
    ("y", "label", "labels", "classes", "class_label", "target", "targets"): (
        "class_labels",
        "",
    ),
    ("num_samples", "n_samples", "batch_size", "sample_shape", "shape", "size", "n"): (
        "",
        "the shape of the samples first: sampler((16, 3, 32, 32))",
    ),
    ("latents", "x_T", "noise", "init"): ("start", "the state at T first: sampler(x)"),
    ("eta",): ("", "DDIM(eta=0.5) as the predictor"),
    ("snr", "target_snr"): ("snr", "Langevin(snr=0.16) as the corrector"),
    ("verbose", "show_progress", "disable"): (
        "progress",
        "progress=True where the sampler is made",
    ),
    ("S_churn", "s_churn"): ("churn", "Heun(churn=40.0) as the predictor"),
    ("S_min", "s_tmin"): ("s_min", "Heun(s_min=0.05) as the predictor"),
    ("S_max", "s_tmax"): ("s_max", "Heun(s_max=50.0) as the predictor"),
    ("S_noise",): ("s_noise", "Heun(s_noise=1.003) as the predictor"),
    ("clip_denoised", "clip_sample", "thresholding"): (
        "",
        "DenoisedModel(model, Clip()) to the sampler",
    ),
    ("return_trajectory", "return_intermediates", "output_type", "return_dict"): (
        "",
        "for state in sampler.iterate(shape): state.x0 is the current estimate",
    ),
    ("prediction_type",): ("", "EpsModel, X0Model or VModel"),
    ("learn_sigma", "learned_variance"): ("learn_sigma variance", ""),
    ("momentum", "beta", "ema_decay", "gamma"): ("decay", ""),
    ("in_channels", "img_channels", "num_channels"): ("channels", ""),
    ("base_channels", "model_channels", "dim", "nf", "ch"): ("width", ""),
    ("hidden_features", "hidden_dim", "hidden_size"): ("width", ""),
    ("in_features", "input_dim"): ("features", ""),
    ("channel_mult", "ch_mult", "dim_mults"): ("multipliers", ""),
    ("num_res_blocks", "layers_per_block", "num_blocks"): ("blocks", ""),
    ("attention_resolutions", "attn_resolutions"): ("attention_levels", ""),
    ("num_heads",): ("heads", ""),
    ("use_checkpoint",): ("activation_checkpointing", ""),
    ("label_dim", "n_classes", "num_class_embeds"): ("num_classes", ""),
    ("num_layers", "n_layers"): ("depth", ""),
    ("embedding_type",): ("embedding", ""),
    ("weight", "loss_weighting"): ("weighting", ""),
}
# Methods and others' classes, in small letters, and what they are here.
_METHODS: dict[tuple[str, ...], str] = {
    ("dps", "dpssampler", "dpsdenoiser"): "GradientGuidance(model, log_likelihood)",
    ("pigdm", "pgdm", "pgdmsampler", "pgdmdenoiser"): "PseudoinverseGuidance(model, A, y, noise)",
    ("mmps", "mmpsdenoiser", "tmpd", "tmpdenoiser"): "LinearGaussianGuidance(model, A, y, noise)",
    ("repaint", "repaintsampler"): "PCSampler(..., constraint=Inpainting(known, mask), "
    "time_travel=TimeTravel(10, 10))",
    ("sdedit",): "PCSampler(...).edit(x0, t)",
    ("cfg", "cfgdenoiser", "classifierfree"): "ClassifierFreeGuidance(model, scale)",
    ("autoguidance", "autoguided"): "Autoguidance(model, weaker, scale)",
    ("apg", "adaptiveprojectedguidance"): "AdaptiveProjection(), projection= of "
    "ClassifierFreeGuidance or Autoguidance",
    ("daps",): "LinearGaussianGuidance or LinearizedGaussianGuidance, which are more accurate at "
    "equal cost",
}
_ADVICE = {name: advice for names, advice in _FOREIGN.items() for name in names}
_SYNONYMS = {name: names for names in _FOREIGN for name in names}
_OF_CALLS = _SYNONYMS["shape"]  # what only a sampler has a line for
_MOST = 12  # parameters that are listed beside advice
_OWN = (
    "; keywords other than a sampler's own, start, generator, device and dtype, or an objective's, "
    "are conditions of the network"
)


def advice(name: str, known: Collection[str], *, condition: bool = False) -> str:
    """Return what to write instead of an unknown keyword, "; ..." or "".

    Args:
        name: the unknown keyword.
        known: the keywords that there are.
        condition: whether they are conditions of a network, which has names of its own.
    """
    ours, line = _ADVICE.get(name, ("", ""))
    meant = (*ours.split(), *(_SYNONYMS.get(name, ()) if condition else ()))
    named = next((one for one in meant if one in known), None)
    sampler = condition or "start" in known or "predictor" in known
    if named is None and line and (sampler or name not in _OF_CALLS):
        return f"; pass {line}"
    guesses = [] if name in _ADVICE else difflib.get_close_matches(name, known, 1)
    close = [named] if named else guesses
    return f"; use {close[0]}=..." if close else ""


def known_method(name: str) -> str | None:
    """Return what a method or another library's class is called here, None for other names."""
    found = (line for names, line in _METHODS.items() if name.lower() in names)
    return next(found, None)


def unknown_condition(
    network: str, unknown: Sequence[str], known: Collection[str], what: str = "network"
) -> str:
    """Return an error about conditions that a network does not take.

    Args:
        network: the name of the network.
        unknown: the keywords that it does not take.
        known: the keywords that it takes.
        what: what it is.
    """
    takes = f"one of {', '.join(known)}" if known else "which takes none"
    hints = "".join(dict.fromkeys(advice(name, known, condition=True) for name in unknown))
    return (
        f"{unknown[0]}: expected a condition of the {what} {network}, {takes}, got "
        f"{', '.join(f'{name}=...' for name in unknown)}{hints or _OWN}"
    )


def check_foreign(model: object, cond: Collection[str]) -> None:
    """Raise if a condition of a model that ignores conditions has a name of another library."""
    if found := [name for name in cond if name in _ADVICE]:
        message = unknown_condition(type(model).__name__, found, (), what="model")
        raise TypeError(message)


def conditions_of(network: object) -> tuple[str, ...] | None:
    """Return the keywords of a network except its input and noise label, None if it takes any."""
    try:
        function: Any = getattr(network, "forward", network)
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    positional = [p for p in free if p.kind is not inspect.Parameter.KEYWORD_ONLY][:2]
    return tuple(p.name for p in free if p not in positional and p.kind in by_keyword)


def explains(function: Function) -> Function:
    """Make errors about missing and unknown arguments say what to write instead.

    The function may be a method. A call that fits pays nothing.
    """

    @functools.wraps(function)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            message = _misfit(function, args, kwargs)
            if message is None:
                raise
            raise TypeError(message) from error

    return explaining  # type: ignore[return-value]


def explained(kind: Class) -> Class:
    """Make the constructor of a class explain unknown and missing arguments, see `explains`."""
    kind.__init__ = explains(kind.__init__)  # type: ignore[misc]
    return kind


def _misfit(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return an error about a call that does not fit a signature, None if it does."""
    parameters = list(inspect.signature(function).parameters.values())
    if args and parameters[0].name == "self":  # a method is called by the name of its class
        return misfit(type(args[0]).__name__, parameters[1:], args[1:], kwargs)
    return misfit(function.__name__, parameters, args, kwargs)


def misfit(
    own: str,
    parameters: Sequence[inspect.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str | None:
    """Return an error about unknown or missing arguments, None if there are neither.

    Args:
        own: the name of what is called.
        parameters: its parameters, in order.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_ONLY, *by_name)]
    known = [p.name for p in named]
    unknown = [name for name in kwargs if name not in known]
    hints = "".join(dict.fromkeys(advice(name, known) for name in unknown))
    takes = (
        f"an argument of {own}({', '.join(known) if len(known) <= _MOST or not hints else '...'})"
    )
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return f"{unknown[0]}: expected {takes}, got an unknown name{hints}"
    for p in named:
        keyword = p.name in kwargs
        given = (keyword and p.kind in by_name) or p.name in known[: len(args)]
        if p.default is p.empty and not given:
            got = "one with its name; pass it first, without the name" if keyword else "none"
            return f"{p.name}: expected {takes}, got {got}{hints}"
    return None
