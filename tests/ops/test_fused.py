"""The fused kernel without a GPU: interpreted, compiled, and not used where unsupported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffusionkit
from diffusionkit.ops import _fused
from diffusionkit.ops._plan import Line

HERE = Path(__file__).parent
X = torch.zeros(1, 1, 4, 4)


def test_values_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the fused kernel needs Triton")
    source = str(Path(diffusionkit.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(number, marks=pytest.mark.slow) for number in (75, 80, 100))]
)
@pytest.mark.parametrize(
    ("dtype", "up", "down", "last", "shape"),
    [
        ("fp32", 2, 1, False, (2, 16, 32, 32)),
        ("fp16", 1, 2, False, (2, 16, 32, 32)),
        ("bf16", 2, 1, True, (2, 16, 32, 32)),
        ("fp32", 1, 2, False, (2, 16, 1024)),
        # Arguments equal to 1 are constants of the kernel.
        ("fp32", 1, 2, False, (16, 128, 2, 2)),
        ("fp32", 2, 1, False, (1, 1024, 1, 1)),
    ],
)
def test_compiles_as_launched(
    monkeypatch, tmp_path, capability, dtype, up, down, last, shape
) -> None:
    pytest.importorskip("triton", minversion="3.4", reason="the fused kernel needs it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffusionkit.ops import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launches = _triton.upfirdn_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *values, **options: launches.append((grid, values, options))

    monkeypatch.setattr(_triton, "upfirdn_kernel", Recorder())
    x = torch.zeros(shape)
    x = x.to(memory_format=torch.channels_last) if last else x
    pads = [(2 // down, 1)] * (x.ndim - 2)
    plan = _fused.plan(x, (0.25, 0.75, 0.75, 0.25), 1.0, up, down, pads)
    y = _triton.launch(x, plan, last)
    assert y.shape == (*shape[:2], *(n * up // down for n in shape[2:]))
    (((programs,), values, options),) = launches
    # A program computes 2048 outputs, fewer if cells extend beyond the image.
    assert y.numel() // 2048 <= programs <= y.numel() // 512

    names = kernel.arg_names
    values = dict(zip(names, values, strict=False))
    compiler = {name: options.pop(name) for name in ("enable_fp_fusion", "num_warps")}
    constants = {**options, **{name: 1 for name, n in values.items() if type(n) is int and n == 1}}
    assert last or "inner" in constants
    signature = {name: "constexpr" if name in constants else "i32" for name in names}
    signature |= {"x_pointer": f"*{dtype}", "y_pointer": f"*{dtype}", "gain": "fp32"}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name.endswith("pointer") or (name not in constants and values[name] % 16 == 0)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=compiler,
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert "f64" not in compiled.asm["ptx"]
    # Each thread stores adjacent outputs together.
    assert last or shape[-1] < 32 or "st.global.v" in compiled.asm["ptx"]


def test_sums_hand_computed() -> None:
    # Upsampled by 2 with (2, 1) zeros around: windows on 0 0 x0 0 x1 0 ...
    line = Line((1.0, 2.0, 3.0, 4.0), 2, 1, 2, 5, 10)
    assert line.sums(4) == ((-1, 0, 0, 1), ((4.0, 2.0), (3.0, 1.0)) * 2)
    line = Line((1.0, 2.0, 3.0), 1, 2, 1, 6, 3)
    assert line.sums(2) == ((-1, 1), ((3.0, 2.0, 1.0),) * 2)
    # A tap too few: every third output is zero.
    line = Line((1.0, 2.0), 3, 1, 0, 2, 5)
    assert line.sums(3) == ((0, 1, 1), ((2.0,), (), (1.0,)))


def test_plans_hold_floats() -> None:
    vertical, horizontal, gain = _fused.plan(X[0], (1, 2), 3, 1, 1, [(1, 0)])
    assert repr((gain, vertical.taps)) == "(3.0, (1.0,))"
    assert repr(tuple(horizontal)) == "((1.0, 2.0), 1, 1, 1, 4, 4)"


def test_the_adjoint_of_the_adjoint_is_the_line() -> None:
    line = Line((1.0, 2.0, 3.0), 2, 3, 4, 10, 8)
    assert line.adjoint() == Line((3.0, 2.0, 1.0), 3, 2, -2, 8, 10)
    assert line.adjoint().adjoint() == line


def test_what_is_ordinary() -> None:
    assert _fused._is_ordinary(X)
    assert _fused._is_ordinary(torch.nn.Parameter(X))
    seen = []

    def note(x):
        seen.append(_fused._is_ordinary(x))
        return x

    torch.func.vmap(note)(X)
    torch.func.vmap(lambda x: x + note(X))(X)  # with a captured tensor
    torch.func.jvp(note, (X,), (X,))
    torch.func.grad(lambda x: note(x).sum())(X)
    with FlopCounterMode(display=False):
        note(X)
    note(X.as_subclass(type("Subclass", (torch.Tensor,), {})))
    assert seen == [False] * 6
    compiled = torch.compile(lambda x: x + _fused._is_ordinary(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X)


@pytest.mark.parametrize("capability", [None, (7, 0), (7, 5)])
def test_plain_torch_without_a_new_gpu(monkeypatch, capability) -> None:
    _fused._is_new_enough.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_fused, "_triton_launches", lambda: True)
    assert _fused._can_launch(0) == (capability == (7, 5))
    _fused._is_new_enough.cache_clear()


def test_plain_torch_without_triton(monkeypatch, caplog) -> None:
    _fused._triton_launches.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _fused._triton_launches()
    assert not caplog.records
    _fused._triton_launches.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can launch kernels")
def test_plain_torch_where_triton_cannot_launch(caplog) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    _fused._triton_launches.cache_clear()
    assert not _fused._triton_launches()
    assert not _fused._triton_launches()
    (record,) = caplog.records
    assert "uses plain torch" in record.getMessage()
    _fused._triton_launches.cache_clear()


@pytest.mark.parametrize("version", ["2.1.0", "3.3.1+git"])
def test_plain_torch_where_triton_cannot_compile_the_kernel(monkeypatch, caplog, version) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr("triton.__version__", version)
    _fused._triton_launches.cache_clear()
    assert not _fused._triton_launches()
    assert f"expected Triton 3.4, got {version}" in caplog.text
    _fused._triton_launches.cache_clear()


def test_triton_is_not_imported_before_it_is_needed() -> None:
    program = (
        "import sys, torch; before = 'triton' in sys.modules; import diffusionkit.ops as ops;"
        "ops.fir_upsample(torch.zeros(1, 1, 4, 4)); print(before or 'triton' not in sys.modules)"
    )
    source = str(Path(diffusionkit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
