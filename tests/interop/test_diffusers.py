"""Against diffusers itself: its schedulers, its pipelines, and folders that it writes."""

import json
import shutil

import pytest
import torch

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    CheckpointError,
    DDPMChain,
    DPMSolver2M,
    EDMModel,
    EpsModel,
    Euler,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
    SASolver,
    ScheduleTransformedModel,
    VModel,
    X0Model,
)
from diffusionkit.interop import (
    chain_from_scheduler,
    from_diffusers,
    load_diffusers,
    sampler_from_scheduler,
    scheduler_config,
    to_diffusers,
)
from diffusionkit.networks import MLP, ADMUNet, DDPMpp

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
SHAPE = (2, 1, 8, 8)
TYPES = {"epsilon": EpsModel, "sample": X0Model, "v_prediction": VModel}
# Some of its schedulers read tensors in a way that numpy 2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unet(out=1, **options):
    """Return a small U-Net whose output changes little with its input.

    An untrained network that predicts the noise makes a sampler chaotic: differences of rounding
    grow from step to step.
    """
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **options,
    )
    with torch.no_grad():
        net.conv_out.weight.mul_(0.1)
    return net.eval()


@torch.no_grad()
def loop(net, scheduler, steps, **step_options):
    """Sample as the pipelines do, without the conversion to [0, 1]."""
    generator = seeded()
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x, generator=generator, **step_options).prev_sample
    return x


def ours(model, scheduler, steps, **options):
    return sampler_from_scheduler(model, scheduler, steps, **options)(SHAPE, generator=seeded())


def assert_same(got, expected, most=1e-4):
    difference = float((got - expected).abs().max())
    assert difference <= most * max(1.0, float(expected.abs().max())), difference


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_noise_levels(schedule):
    for zero in (False, True):
        scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero)
        chain = chain_from_scheduler(scheduler)
        bar = chain.marginal(chain.time(range(1000)))[0].square()
        torch.testing.assert_close(bar.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)
    laplace = diffusers.DDPMScheduler(beta_schedule="laplace")
    assert torch.equal(chain_from_scheduler(laplace).betas.float(), laplace.betas)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("epsilon", {}),
        ("sample", {}),
        ("v_prediction", {}),
        ("epsilon", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}),
        ("sample", {"beta_schedule": "scaled_linear", "clip_sample_range": 0.7}),
        ("epsilon", {"timestep_spacing": "linspace", "variance_type": "fixed_small_log"}),
        ("v_prediction", {"beta_schedule": "sigmoid", "timestep_spacing": "trailing"}),
        (
            "epsilon",
            {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.7},
        ),
        ("sample", {"steps_offset": 1, "clip_sample": False}),
    ],
    ids=str,
)
def test_a_saved_folder_gives_the_images_of_ddpm(tmp_path, kind, settings):
    net, scheduler = unet(), diffusers.DDPMScheduler(prediction_type=kind, **settings)
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(tmp_path)
    model = load_diffusers(tmp_path)
    assert type(model) is TYPES[kind]
    assert not model.training
    assert model.data_range == (-1.0, 1.0)
    assert_same(ours(model, tmp_path, 10), loop(net, scheduler, 10))


@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("epsilon", {}, {}),
        ("sample", {}, {}),
        ("v_prediction", {}, {}),
        ("epsilon", {"beta_schedule": "squaredcos_cap_v2"}, {"eta": 0.5}),
        ("epsilon", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}),
        ("v_prediction", {"clip_sample": False, "set_alpha_to_one": False}, {}),
        ("sample", {"timestep_spacing": "trailing", "clip_sample": False}, {"eta": 1.0}),
        ("epsilon", {"thresholding": True, "sample_max_value": 1.5}, {}),
    ],
    ids=str,
)
def test_ddim(kind, settings, options):
    net, scheduler = unet(), diffusers.DDIMScheduler(prediction_type=kind, **settings)
    model = from_diffusers(net, scheduler)
    assert_same(ours(model, scheduler, 10, **options), loop(net, scheduler, 10, **options))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_zero_terminal_snr(kind):
    net = unet()
    for scheduler in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        made = scheduler(
            rescale_betas_zero_snr=True, prediction_type=kind, timestep_spacing="trailing"
        )
        assert_same(ours(from_diffusers(net, made), made, 5), loop(net, made, 5))


def test_all_steps_of_a_short_chain():
    net, scheduler = unet(), diffusers.DDPMScheduler(25, beta_start=0.01, beta_end=0.4)
    model = from_diffusers(net, scheduler)
    assert_same(ours(model, scheduler, None), loop(net, scheduler, 25))


def test_steps_that_begin_below_the_noise_of_the_prior_need_a_state():
    """With few steps "leading" timesteps begin where signal is left; diffusers draws N(0, 1)."""
    net, scheduler = unet(), diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    sampler = sampler_from_scheduler(from_diffusers(net, scheduler), scheduler, 4)
    with pytest.raises(ValueError, match="expected to begin with the prior's noise"):
        sampler(SHAPE)
    state = torch.randn(SHAPE, generator=seeded())
    assert_same(sampler(state), loop(net, scheduler, 4))


def test_learned_variances():
    net = unet(out=2)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    model = from_diffusers(net, scheduler)
    assert model.variance == "learned_range"
    assert_same(ours(model, scheduler, 10), loop(net, scheduler, 10))
    with pytest.raises(ValueError, match="'learned_range' for a network"):
        from_diffusers(net, diffusers.DDPMScheduler(variance_type="learned"))
    with pytest.raises(ValueError, match="2 output channels"):
        from_diffusers(unet(), scheduler)


def test_class_labels_and_whole_timesteps():
    scheduler = diffusers.DDPMScheduler(100, beta_end=0.2)
    x, labels = torch.randn(SHAPE), torch.tensor([2, 0])
    net = unet(num_class_embeds=3, time_embedding_type="learned", num_train_timesteps=100)
    model = from_diffusers(net, scheduler)
    steps = torch.tensor([0, 71])
    with torch.no_grad():
        expected = net(x, steps, class_labels=labels).sample
        got = model.predict(x, model.sde.time(steps), class_labels=labels).eps
    assert torch.equal(got, expected)
    numbers = unet(class_embed_type="timestep")
    model = from_diffusers(numbers, scheduler)
    with torch.no_grad():
        expected = numbers(x, steps, class_labels=torch.tensor([0.5, 2.0])).sample
        got = model.predict(x, model.sde.time(steps), class_labels=torch.tensor([0.5, 2.0])).eps
    assert torch.equal(got, expected)


def test_the_noise_label_is_the_timestep():
    scheduler = diffusers.DDPMScheduler()
    labels = []

    def network(x, timestep):
        labels.append(timestep)
        return x

    model = from_diffusers(network, scheduler)
    steps = torch.arange(1000)
    model.predict(torch.zeros(1000, 1), model.sde.time(steps).float())
    assert torch.equal(labels[0], steps.float())


def test_networks_that_embed_the_noise_level_are_refused():
    with pytest.raises(ValueError, match="time_embedding_type: expected 'positional'"):
        from_diffusers(unet(time_embedding_type="fourier"), diffusers.DDPMScheduler())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: diffusers.DDIMScheduler(timestep_spacing="linspace"), "timestep_spacing: exp"),
        (
            lambda: diffusers.DDPMScheduler(
                timestep_spacing="trailing", variance_type="fixed_large"
            ),
            "variance_type: expected 'fixed_small'",
        ),
        (lambda: diffusers.DDIMScheduler(set_alpha_to_one=False), "set_alpha_to_one: expected"),
        (diffusers.DPMSolverMultistepScheduler, "counterpart is DPMSolver2M"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), "variance_type: expected one"),
    ],
)
def test_what_no_grid_describes_is_refused(make, words):
    scheduler = make()
    with pytest.raises(ValueError, match=words):
        sampler_from_scheduler(from_diffusers(unet(), scheduler), scheduler, 20)


def test_folders_of_the_first_releases(tmp_path):
    net, scheduler = unet(), diffusers.DDPMScheduler()
    net.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["prediction_type"]
    file.write_text(json.dumps(config | {"predict_epsilon": False}))
    model = load_diffusers(str(tmp_path))
    assert type(model) is X0Model
    x = torch.randn(SHAPE)
    with torch.no_grad():
        got = model.predict(x, torch.tensor([0.2, 0.5])).x0
        assert torch.equal(got, net(x, torch.tensor([199, 499])).sample)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        load_diffusers(tmp_path / "google" / "ddpm-cifar10-32")
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "good")
    shutil.rmtree(tmp_path / "good" / "unet", ignore_errors=True)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_diffusers(tmp_path / "good")
    unet().save_pretrained(tmp_path / "good" / "unet")
    weights = tmp_path / "good" / "unet" / "diffusion_pytorch_model.safetensors"
    config = tmp_path / "good" / "unet" / "config.json"
    written, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(written[: len(written) // 2])
    with pytest.raises(CheckpointError, match="expected the weights of a UNet2DModel"):
        load_diffusers(tmp_path / "good")
    weights.write_bytes(written)
    config.write_text(text.replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(CheckpointError, match=r"conv_in|resnets"):
        load_diffusers(tmp_path / "good")
    config.write_text(text)
    tensors = safetensors.load_file(weights)
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != "conv_in.bias"}, "missing conv_in.bias"),
        (tensors | {"other": torch.ones(2)}, "unexpected other"),
        (tensors | {"conv_in.bias": torch.ones(3)}, "conv_in.bias"),
    ):
        safetensors.save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            load_diffusers(tmp_path / "good")
    weights.write_bytes(written)
    config.write_text(text.replace("UNet2DModel", "AutoencoderKL"))
    with pytest.raises(CheckpointError, match="UNet2DConditionModel"):
        load_diffusers(tmp_path / "good")
    config.write_text(text)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected the weights"):
        load_diffusers(tmp_path / "good")


# our models in its loops


def model_of(kind, sde, **options):
    torch.manual_seed(0)
    network = DDPMpp(channels=1, width=8, multipliers=(1, 2), blocks=1, attention_levels=())
    return kind(network, sde, **options).eval()


@pytest.mark.parametrize(
    ("kind", "sde"),
    [
        (EpsModel, DDPMChain.linear(1000)),
        (VModel, VPSDE()),
        (EDMModel, EDMSDE()),
        (X0Model, DDPMChain.cosine(50)),
    ],
)
def test_pipelines_run_our_models(kind, sde):
    model = model_of(kind, sde)
    config = scheduler_config(model, clip_sample=True, timestep_spacing="trailing")
    scheduler = diffusers.DDPMScheduler.from_config(config)
    adapter = to_diffusers(model, scheduler, sample_size=8, channels=1)
    for pipeline in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        pipe = pipeline(unet=adapter, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            batch_size=2, generator=seeded(), num_inference_steps=5, output_type="pt"
        ).images
        expected = ours(model, pipe.scheduler, 5)
        if isinstance(images, torch.Tensor):
            assert_same(images, (expected / 2 + 0.5).clamp(0, 1), most=3e-4)
        assert pipe.device.type == "cpu"


def test_learned_variances_of_our_models():
    torch.manual_seed(0)
    network = ADMUNet(
        channels=1,
        width=8,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(),
        heads=1,
        learn_sigma=True,
    )
    model = EpsModel(network, DDPMChain.linear(200), variance="learned_range").eval()
    scheduler = diffusers.DDPMScheduler.from_config(scheduler_config(model))
    adapter = to_diffusers(model, scheduler, sample_size=8, channels=1)
    assert adapter.config.out_channels == 2
    assert_same(loop(adapter, scheduler, 5), ours(model, scheduler, 5))


@pytest.mark.parametrize("sde", [DDPMChain.linear(1000), VPSDE(), EDMSDE()], ids=repr)
def test_solvers_run_our_models(sde):
    """On its grid, at whole timesteps, a solver of diffusers is our solver."""
    model = model_of(EDMModel, sde)
    config = scheduler_config(model, timestep_spacing="trailing")
    chain = chain_from_scheduler(config)
    x = torch.randn(SHAPE, generator=seeded())
    for made, predictor in (
        (diffusers.EulerDiscreteScheduler.from_config(config), DDIM()),
        (diffusers.DPMSolverMultistepScheduler.from_config(config), DPMSolver2M()),
    ):
        made.set_timesteps(5)
        adapter, state = to_diffusers(model, made, sample_size=8, channels=1), x
        state = state * made.init_noise_sigma
        with torch.no_grad():
            for t in made.timesteps:
                scaled = made.scale_model_input(state, t)
                state = made.step(adapter(scaled, t).sample, t, state).prev_sample
        steps = [int(t) for t in made.timesteps]
        on_chain = ScheduleTransformedModel(model, chain)
        start = x * made.init_noise_sigma / (1 + made.init_noise_sigma**2) ** 0.5
        start = start if made.init_noise_sigma != 1 else x
        got = PCSampler(on_chain, predictor, grid=chain.time(steps))(start)
        assert_same(got, state, most=2e-3)


@pytest.mark.parametrize("orders", [(2, 2), (3, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 1.0, "interval"])
@pytest.mark.parametrize("lower", [False, True])
def test_sa_solver_takes_the_steps_of_the_scheduler(tau, orders, lower):
    """From the same noise, in float64, on levels of our own."""
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.3], [0.8, -0.5]], [0.2, 0.4])
    times = LogSNRGrid(t_end=0.01)(model.sde, 8).double()
    alpha, sigma = model.sde.marginal(times)
    ratio, x = (sigma / alpha).tolist(), torch.randn(5, 2, generator=seeded()).double()
    noisy = [tau if tau != "interval" else float(0.1 <= level <= 5.0) for level in ratio]
    theirs = diffusers.SASolverScheduler(
        predictor_order=orders[0], corrector_order=orders[1], prediction_type="sample",
        tau_func=lambda k: torch.tensor(noisy[7 - int(k)]), lower_order_final=lower,
    )  # fmt: skip
    theirs.set_timesteps(8)
    theirs.sigmas, theirs.timesteps = sigma / alpha, torch.arange(7, -1, -1)
    y, generator = x, seeded(1)
    for t, k in zip(times, theirs.timesteps, strict=False):
        y = theirs.step(model.predict(y, t.expand(5)).x0, k, y, generator=generator).prev_sample
    limits = {"s_min": 0.1, "s_max": 5.0} if tau == "interval" else {}
    limits |= {"lines": "published", "lower_order_final": lower}
    ours = SASolver(1.0 if tau == "interval" else tau, *orders, **limits)
    got = PCSampler(model, ours, grid=times, denoise=False)(x, generator=seeded(1))
    torch.testing.assert_close(got, y, rtol=1e-8, atol=1e-8)


def test_edm_schedulers_run_our_models():
    model, scheduler = model_of(EDMModel, EDMSDE()), diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    start = torch.randn(SHAPE, generator=seeded()) * scheduler.init_noise_sigma
    for kind in ("epsilon", "v_prediction"):
        scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
        scheduler.set_timesteps(10)
        adapter, x = to_diffusers(model, scheduler, sample_size=8, channels=1), start
        with torch.no_grad():
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                x = scheduler.step(adapter(scaled, t).sample, t, x).prev_sample
        expected = PCSampler(model, Euler(), grid=scheduler.sigmas.double())(start)
        assert_same(x, expected, most=1e-5)


def test_timesteps_of_every_form():
    adapter = to_diffusers(model_of(EpsModel, DDPMChain.linear(100)), sample_size=8, channels=1)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        first = adapter(x, 30).sample
        for t in (torch.tensor(30), torch.tensor([30]), torch.tensor([30, 30]), 30.0):
            assert torch.equal(adapter(x, t).sample, first)
        assert torch.equal(adapter(x, 30, return_dict=False)[0], first)
        assert adapter(x.half(), 30).sample.dtype == torch.float16
    assert (adapter.dtype, adapter.device) == (torch.float32, torch.device("cpu"))
    for bad in (torch.tensor([1, 2, 3]), 100, -2):
        with pytest.raises(ValueError, match="expected"):
            adapter(x, bad)


def test_class_labels_reach_our_models():
    torch.manual_seed(0)
    model = EpsModel(MLP(2, width=8, num_classes=3), DDPMChain.linear(100)).eval()
    adapter, x = to_diffusers(model, sample_size=1), torch.randn(2, 2)
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        got = adapter(x, 10, class_labels=labels).sample
        t = model.sde.time(torch.tensor([10, 10]))
        assert torch.equal(got, model.predict(x, t, class_labels=labels).eps)


def test_schedulers_with_more_noise_than_the_model_are_refused():
    with pytest.raises(ValueError, match="scheduler_config"):
        to_diffusers(model_of(EpsModel, VPSDE()), diffusers.DDPMScheduler(), sample_size=8)
    with pytest.raises(ValueError, match="prediction_type: expected"):
        to_diffusers(
            model_of(EpsModel, VESDE(sigma_max=300.0)),
            {"beta_schedule": "linear", "prediction_type": "flow"},
            sample_size=8,
        )
