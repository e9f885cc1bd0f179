"""Tables that are made once: of every place where one may be made, those that last."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap

from diffusionkit._kept import Kept


def used(kept, x):
    return (x * kept.get("table", lambda: torch.arange(3.0).sin())).sum()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(f)(x),
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(f)(x[None]),
        lambda f, x: vmap(grad(f))(x[None]),
    ],
)
def test_nothing_is_kept_of_a_transform(transform) -> None:
    kept, x = Kept(), torch.ones(3)
    transform(lambda x: used(kept, x), x)
    assert not kept._made
    used(kept, x)
    first = kept._made["table"]
    transform(lambda x: used(kept, x), x)  # what is there is used
    assert kept._made["table"] is first
    assert type(first) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(first)


def test_nothing_is_kept_of_a_traced_graph() -> None:
    kept = Kept()
    with FakeTensorMode():
        used(kept, torch.ones(3))
    assert not kept._made


def test_tables_made_in_inference_mode_serve_gradients() -> None:
    kept, x = Kept(), torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        used(kept, torch.ones(3))
    used(kept, x).backward()
    torch.testing.assert_close(x.grad, torch.arange(3.0).sin())
