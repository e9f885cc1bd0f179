"""The DiT of diffusers: its outputs are those of ours on the same weights; its folders load."""

import json

import pytest
import torch

from diffusionkit import (
    Ancestral,
    ClassifierFreeGuidance,
    DDPMChain,
    EpsModel,
    PCSampler,
    StepLabel,
)
from diffusionkit.interop import from_diffusers, load_diffusers
from diffusionkit.networks import DiT
from diffusionkit.networks.embeddings import PositionalEmbedding

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors.torch")


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_eps=1e-6,  # that of the release
    ).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            # Every block has a copy of the embedding, which are equal in converted networks.
            torch.manual_seed(sum(map(ord, name.partition("norm1.emb.")[2])) or len(name))
            p.normal_(0.0, 0.15)
    return net


NAMES = {
    "modulation": "norm1.linear",
    "attention.out": "attn1.to_out.0",
    "feed_forward.linear_1": "ff.net.0.proj",
    "feed_forward.linear_2": "ff.net.2",
}


def converted(net) -> DiT:
    """Our network with the weights of theirs."""
    theirs, state = net.state_dict(), {}
    first = "transformer_blocks.0.norm1.emb."
    for part in ("weight", "bias"):
        state[f"input.{part}"] = theirs[f"pos_embed.proj.{part}"].flatten(
            1 if part == "weight" else 0
        )
        for i in (1, 2):
            state[f"embedding.linear_{i}.{part}"] = theirs[
                f"{first}timestep_embedder.linear_{i}.{part}"
            ]
        state[f"head.modulation.{part}"] = theirs[f"proj_out_1.{part}"]
        state[f"head.linear.{part}"] = theirs[f"proj_out_2.{part}"]
        for i in range(2):
            block = f"transformer_blocks.{i}."
            for ours, name in NAMES.items():
                state[f"blocks.{i}.{ours}.{part}"] = theirs[f"{block}{name}.{part}"]
            pieces = [theirs[f"{block}attn1.to_{kind}.{part}"] for kind in "qkv"]
            state[f"blocks.{i}.attention.qkv.{part}"] = torch.cat(pieces)
    weight = state["embedding.linear_1.weight"]
    state["embedding.linear_1.weight"] = weight.roll(128, 1)  # theirs has the cosines first
    state["embedding.classes.weight"] = theirs[f"{first}class_embedder.embedding_table.weight"]
    ours = DiT(4, width=24, depth=2, heads=2, num_classes=11, learn_sigma=True)
    ours.load_state_dict(state)
    # Theirs divides the exponents of the frequencies by 127 where the release does by 128.
    ours.embedding.noise_features = PositionalEmbedding(256, endpoint=True)
    return ours


@torch.no_grad()
def test_outputs_are_those_of_ours(theirs) -> None:
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 250.0, 999.0]), torch.tensor([4, 10, 0])
    expected = theirs(x, t, class_labels=y).sample
    torch.testing.assert_close(converted(theirs)(x, t, y), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1

    scheduler = diffusers.DDIMScheduler()
    model = from_diffusers(theirs, scheduler, data_range=None)
    ours = EpsModel(
        converted(theirs), DDPMChain.linear(1000), label=StepLabel(1000), variance="learned_range"
    )
    for attribute in ("eps", "log_var_fraction"):
        got, wanted = (
            getattr(m.predict(x, (t + 1) / 1000, class_labels=y), attribute) for m in (model, ours)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_folder_of_the_pipeline(theirs, tmp_path, name) -> None:
    theirs.save_pretrained(tmp_path / "transformer")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "transformer" / "config.json"
    content = json.loads(config.read_text()) | {"_class_name": name}
    config.write_text(json.dumps(content))
    model = load_diffusers(tmp_path, data_range=None)
    assert not model.training
    assert (model.variance, model.data_range) == ("learned_range", None)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    labels = {"class_labels": torch.tensor([1, 10])}
    with torch.no_grad():
        got = model.predict(x, t, **labels).eps
        wanted = from_diffusers(theirs, diffusers.DDIMScheduler()).predict(x, t, **labels).eps
        guided = ClassifierFreeGuidance(model, 2.0, null={"class_labels": 10})
        sampler = PCSampler(guided, Ancestral(variance="model"), steps=2)
        assert sampler((2, 4, 8, 8), class_labels=torch.tensor([3, 4])).shape == (2, 4, 8, 8)
    torch.testing.assert_close(got, wanted)
