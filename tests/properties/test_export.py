"""Networks, score models and sampler steps as graphs, with any batch size."""

import warnings
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    DPMSolver2S,
    EDMModel,
    EpsModel,
    Euler,
    Heun,
    PCSampler,
    Predictor,
    ScoreModel,
)
from diffusionkit.networks import MLP, DDPMpp

BATCH = {0: Dim("batch", max=4096)}


def filled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    return network.eval()


VECTORS = EpsModel(filled(MLP(2, width=16, depth=1, condition_features=3)), VPSDE())
IMAGES = EDMModel(
    filled(DDPMpp(channels=1, width=8, multipliers=(1,), blocks=1, attention_levels=())), EDMSDE()
)


class Denoiser(nn.Module):
    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.model.predict(x, t, condition=condition).x0


class Step(nn.Module):
    def __init__(self, model: ScoreModel, predictor: Predictor) -> None:
        super().__init__()
        self.model, self.predictor = model, predictor

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        return self.predictor.step(self.model, x, t, s, condition=condition).x


def vectors(n: int) -> tuple[Tensor, ...]:
    t = torch.rand(n) * 0.5 + 0.4
    return torch.randn(n, 2), t, t - 0.1, torch.randn(n, 3)


def check(graph: nn.Module, module: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        got, expected = graph(*inputs), module(*inputs)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "predictor",
    [Heun(), pytest.param(DDIM(), marks=pytest.mark.slow),
     pytest.param(Euler(), marks=pytest.mark.slow),
     pytest.param(DPMSolver2S(), marks=pytest.mark.slow)],
    ids=repr,
)  # fmt: skip
def test_a_step_is_exported_with_any_batch_size(predictor: Predictor) -> None:
    step = Step(VECTORS, predictor)
    graph = export(step, vectors(4), dynamic_shapes=(BATCH,) * 4).module()
    check(graph, step, *vectors(7))
    check(graph, step, *vectors(3))  # as many as the condition has features


def test_the_last_step_of_heun_in_a_graph_is_an_euler_step() -> None:
    # The second stage would be at a time without noise; the graph weights it by 0.
    model = EpsModel(VECTORS.network, EDMSDE())
    x, t, _, condition = vectors(4)
    step, s = Step(model, Heun()), torch.zeros(4)
    check(export(step, (x, t, s, condition)).module(), step, x, t, s, condition)


def test_a_score_model_is_exported_with_one_condition_for_all() -> None:
    x, t, _, _ = vectors(4)
    denoiser, shapes = Denoiser(VECTORS), (BATCH, BATCH, None)
    graph = export(denoiser, (x, t, torch.randn(3)), dynamic_shapes=shapes).module()
    x, t, _, _ = vectors(3)
    check(graph, denoiser, x, t, torch.randn(3))


@pytest.mark.slow
def test_a_score_model_of_images_is_exported() -> None:
    t = torch.rand(4) + 0.5
    graph = export(IMAGES, (torch.randn(4, 1, 8, 8), t), dynamic_shapes=(BATCH,) * 2).module()
    check(graph, IMAGES, torch.randn(1, 1, 8, 8), t[:1])


def test_a_loop_over_a_graph_is_the_sampler() -> None:
    step, z = Step(VECTORS, DDIM()), torch.randn(5, 2)
    condition = torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        graph = torch.jit.trace(step, vectors(4), check_trace=False)
    sampler = PCSampler(VECTORS, DDIM(), steps=6, denoise=False)
    x, times = z, sampler.times.float()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = graph(x, t.expand(5), s.expand(5), condition)
    torch.testing.assert_close(x, sampler(z, condition=condition), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
def test_a_step_in_onnx_runtime(tmp_path) -> None:
    import onnxruntime

    step = Step(VECTORS, Heun())
    program = torch.onnx.export(
        step, vectors(4), dynamic_shapes=(BATCH,) * 4, dynamo=True, verbose=False
    )
    program.save(tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "step.onnx", providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]
    for n in (7, 3):
        inputs = vectors(n)
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        got = torch.from_numpy(session.run(None, values)[0])
        with torch.no_grad():
            torch.testing.assert_close(got, step(*inputs), rtol=1e-4, atol=1e-5)
