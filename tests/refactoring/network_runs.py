"""Runs of networks, filters, averages of weights, checkpoints and metrics."""

import tempfile
from pathlib import Path

import torch
from run_parts import PROCESSES, fill, flat, model_on, network, randn, seeded
from torch import nn

from diffusionkit import (
    EMA,
    EpsModel,
    LossSecondMomentTimes,
    PowerEMA,
    ScoreMatching,
    clipped_step,
    linear_warmup,
    load_checkpoint,
    reconstruct_ema,
    save_checkpoint,
)
from diffusionkit.checkpoints import load_network, save_network
from diffusionkit.metrics import (
    FeatureMoments,
    InceptionScore,
    evaluate_samples,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_shards,
    precision_recall,
    sample_to_shards,
)
from diffusionkit.networks import (
    MLP,
    ADMUNet,
    DDPMpp,
    DDPMUNet,
    FourierFeatures,
    NCSNpp,
    NCSNv2,
)
from diffusionkit.ops import (
    fir_conv_downsample,
    fir_conv_upsample,
    fir_downsample,
    fir_upsample,
    upfirdn,
)
from diffusionkit.training import power_coefficients, power_exponent

TINY = {
    "channels": 2,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (1,),
}
MORE = {"num_classes": 3, "condition_features": 5, "low_res_channels": 2}


def _images(net, features=2, dims=2, **more):
    """Return the initial weights, outputs of two settings of the weights, and a gradient."""
    x = randn(2, features, *(4, 6, 2)[:dims])
    label = torch.tensor([1.5, 2.0])
    initial = flat(net.parameters())
    first = net.eval()(x, label, **more).detach()
    x.requires_grad_()
    y = fill(net, 0.2)(x, label, **more)
    y.square().mean().backward()
    weights = flat(p.grad for p in net.parameters() if p.grad is not None)
    return {"initial": initial, "first": first, "output": y, "input": x.grad, "weights": weights}


def _trained(cls, **options):
    """Return the output in training mode, where dropout draws from the global generator."""
    net = fill(cls(**TINY, dropout=0.3, **options).train(), 0.2)
    torch.manual_seed(5)
    return net(randn(2, 2, 4, 6), torch.tensor([1.5, 2.0]))


def ncsnpp_networks():
    """NCSN++ with each kind of pyramid."""
    small = {**TINY, "group_channels": 2}
    return {
        "plain": _images(NCSNpp(**TINY)),
        "skips": _images(
            NCSNpp(
                **small,
                progressive="output_skip",
                progressive_input="input_skip",
                progressive_combine="cat",
                data_range=(0.0, 1.0),
            )
        ),
        "residuals": _images(
            NCSNpp(**small, progressive="residual", embedding="positional", sigmas=(9.0, 3.0, 1.0))
        ),
        "training": _trained(NCSNpp),
    }


def conditional_networks():
    """NCSN++ and ADM with every condition: classes, vectors and images of low resolution."""
    more = {
        "condition": randn(2, 5),
        "low_res": randn(2, 2, 2, 3),
    }
    nets = {
        "NCSN++": NCSNpp(**TINY, adaptive_scale=True, embedding="fourier_linear", **MORE),
        "ADM": ADMUNet(**TINY, resblock_updown=True, head_channels=4, heads=1, **MORE),
    }
    x, label, classes = randn(2, 2, 4, 6), torch.tensor([1.5, 2.0]), torch.tensor([2, 0])
    return {
        name: (flat(net.parameters()), fill(net.eval(), 0.2)(x, label, classes, **more))
        for name, net in nets.items()
    }


def ddpm_networks():
    """DDPM++ and the network of DDPM, also on series and volumes."""
    return {
        "DDPM++": _images(DDPMpp(**TINY)),
        "DDPM": _images(DDPMUNet(**TINY, group_channels=2)),
        "series": _images(DDPMpp(**TINY, dims=1), dims=1),
        "volumes": _images(DDPMUNet(**TINY, dims=3), dims=3),
        "FIR": _images(DDPMUNet(**TINY, fir_kernel=(1, 3, 3, 1), embedding=None)),
        "training": _trained(DDPMUNet),
    }


def adm_networks():
    """The network of ADM, with learned variances and without."""
    return {
        "plain": _images(ADMUNet(**TINY, heads=2)),
        "fixed": _images(ADMUNet(**TINY, heads=1, learn_sigma=False, scale_shift=False)),
        "training": _trained(ADMUNet, heads=2),
    }


def other_networks():
    """NCSNv2, the network of vectors, and Fourier features."""
    levels = ((1, 1), (2, 1), (2, 2))
    net = NCSNv2(2, sigmas=(3.0, 2.0, 1.0, 0.5), width=8, levels=levels)
    numbers = FourierFeatures(MLP(10, out_features=2, width=8, depth=1), exponents=(1, 2))
    plain, classes = MLP(2, width=8, depth=2), MLP(2, width=8, depth=1, num_classes=3)
    x, label = randn(4, 2), torch.tensor([-3.0, 0.0, 1.5, 900.0])
    found = {"NCSNv2": fill(net, 0.2)(randn(2, 2, 4, 8), torch.tensor([3.0, 0.0]))}
    for name, one in (("numbers", numbers), ("plain", plain)):
        found[name] = flat(one.parameters()), one(x, label), fill(one)(x, label)
    found["classes"] = fill(classes)(x, label, torch.tensor([0, 2, 1, 1]))
    return found


def filters():
    """Resampling by filters, and its gradients."""
    x, weight = randn(2, 3, 6, 8).requires_grad_(), randn(4, 3, 3, 3, seed=2)
    outputs = {
        "up": fir_upsample(x),
        "down": fir_downsample(x, (1, 2, 1), gain=2.0),
        "conv up": fir_conv_upsample(x, weight, randn(4)),
        "conv down": fir_conv_downsample(x, weight),
        "both": upfirdn(x, (1.0, 2.0, 3.0), up=3, down=2, padding=(2, 1)),
        "series": fir_upsample(randn(2, 3, 7)),
    }
    total = sum(y.square().mean() for y in outputs.values())
    return {**outputs, "gradient": torch.autograd.grad(total, x)[0]}


def training():
    """Steps of an optimizer, and averages of the weights."""
    model = model_on("vp")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    warmup = linear_warmup(optimizer, 4)
    averages = EMA(model, 0.9), EMA(model, 0.5, warmup=False)
    powers, norms = PowerEMA(model), []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(4):
            optimizer.zero_grad()
            ScoreMatching()(model, randn(6, 2), generator=seeded(step)).mean().backward()
            norms.append(clipped_step(optimizer, 0.5).norm)
            warmup.step()
            for average in (*averages, powers):
                average.update(model)
            if step % 2:
                powers.save(folder)
        between = reconstruct_ema(folder, 0.07)
    second = PowerEMA(model_on("vp"))
    second.load_state_dict(powers.state_dict())
    second.update(model)
    with averages[0].applied(model):
        y = model(randn(6, 2), torch.full((6,), 0.5))
    followed = [average.model for average in (*averages, *second.averages.values())]
    return {
        "norms": torch.tensor(norms, dtype=torch.float64),
        "weights": flat(model.parameters()),
        "applied": y,
        "averages": [flat(one.parameters()) for one in followed],
        "between": flat(between.values()),
        "coefficients": power_coefficients([(4, 0.05), (4, 0.1), (8, 0.1)], (8, 0.07)),
        "exponent": power_exponent(0.1),
    }


def checkpoints():
    """What comes back from a checkpoint, and the next step from there."""
    sde = PROCESSES["ddpm"]

    def parts():
        model = EpsModel(network(), sde)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return model, optimizer, EMA(model, 0.5), LossSecondMomentTimes(history=1)

    def step(model, optimizer, ema, times, generator):
        optimizer.zero_grad()
        ScoreMatching(times=times)(model, randn(6, 2), generator=generator).mean().backward()
        optimizer.step()
        ema.update(model)

    first, generator = parts(), seeded(3)
    for _ in range(2):
        step(*first, generator)
    model, optimizer, ema, times = first
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.pt"
        save_checkpoint(
            path, model, ema=ema, optimizer=optimizer, step=2, stateful={"times": times},
            generators={"own": generator}, extra={"note": 5},
        )  # fmt: skip
        model, optimizer, ema, times = second = parts()
        generator = torch.Generator()
        read = load_checkpoint(
            path, model, ema=ema, optimizer=optimizer, stateful={"times": times},
            generators={"own": generator},
        )  # fmt: skip
        save_network(Path(folder) / "network.pt", fill(DDPMpp(**TINY)))
        net = load_network(Path(folder) / "network.pt")
    found = {"weights": flat(model.parameters()), "average": flat(ema.model.parameters())}
    found["network"] = flat(net.parameters())
    step(*second, generator)
    return {**found, "next": flat(model.parameters()), "counts": [read.step, read.extra["note"]]}


def metrics():
    """Distances of fixed features, in one piece and in parts."""
    real, fake = randn(40, 4), 0.8 * randn(30, 4, seed=2) + 0.3
    logits = randn(30, 5, seed=3)
    moments, other = FeatureMoments(), FeatureMoments()
    for some in real.split(15):
        part = FeatureMoments()
        part.update(some)
        moments.merge(part)
    other.update(fake)
    score = InceptionScore(splits=3)
    score.update(logits=logits)
    quality = evaluate_samples(real, fake, logits=logits, splits=3)
    return {
        "Frechet": (frechet_distance(moments, other), frechet_distance(real, fake)),
        "kernel": tuple(kernel_distance(real, fake)),
        "neighbors": tuple(precision_recall(real, fake)),
        "score": tuple(score.compute()),
        "together": (quality.frechet, *quality.kernel, *quality.neighbors),
    }


def shards():
    """Samples in files, and features of them."""

    def draw(n, generators):
        return torch.stack([torch.randn(3, 2, 2, generator=one) for one in generators])

    with tempfile.TemporaryDirectory() as folder:
        sample_to_shards(draw, 7, folder, batch_size=3, seed=5, progress=False)
        images = torch.cat(list(load_shards(folder)))
    extractor = fill(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    floats = images.float() / 255
    return {"images": images, "features": extract_features(floats, extractor, progress=False)}
