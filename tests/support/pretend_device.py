"""A device that is not there: tensors with values on the CPU that say they are on "cuda" or "mps".

Inside `with PretendDevice("cuda") as device:` the calls `x.to("cuda")` and `torch.zeros(3,
device="cuda")` return such tensors. `device.events` counts, by kind and line of the library, what
makes the host wait ("read") and what copies from the host ("upload"). An operation on tensors of
both the device and the host raises, as on a real device, and so does float64 on "mps".
"""

import contextlib
import sys
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# What the host cannot return before it knows values: numbers, or the shape of the result.
READS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc",
}  # fmt: skip
# What takes tensors of the host beside those of the device, and copies them.
COPIES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}


def line_of_library() -> str:
    """Return the innermost line of the library that is running."""
    frame = sys._getframe()
    while frame is not None:
        _, found, name = frame.f_code.co_filename.partition("/src/diffusionkit/")
        if found:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


class DeviceTensor(Tensor):
    """A tensor of a pretended device, whose values are in a tensor `host` on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        place = cls.current
        if place.device.type == "mps" and host.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"float64 does not exist on MPS: {line_of_library()}")
        self = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, layout=host.layout, device="cpu",
        )  # fmt: skip
        self.host = host
        return self

    current = None  # the device whose block is running
    place = property(lambda self: DeviceTensor.current)
    device = property(lambda self: self.place.device)
    is_cuda = property(lambda self: self.place.device.type == "cuda")
    is_mps = property(lambda self: self.place.device.type == "mps")
    is_cpu = property(lambda self: False)

    def __repr__(self, **options):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo):
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = op._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        place = ours[0].place
        theirs = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim]
        if name in READS or (name == "repeat_interleave" and op._overloadname == "Tensor"):
            place.note("read", name)
        if name in COPIES and name.startswith(("index", "_index")):
            # As many elements as a mask has are selected.
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            place.note("read", "mask", len(masks))
            place.note("upload", name, len(theirs))
        elif name == "copy_" and not isinstance(args[0], DeviceTensor):
            place.note("read", name)
        elif name == "copy_" and theirs:
            place.note("upload", name)
        elif theirs and name not in COPIES:
            raise RuntimeError(
                f"expected all tensors on one device, got {name} of tensors on {place.device} and "
                f"on the CPU, {[tuple(t.shape) for t in theirs]}: {line_of_library()}"
            )
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        wrappers = {id(tensor.host): tensor for tensor in ours}

        def inner(value):
            return value.host if isinstance(value, DeviceTensor) else value

        def outer(value):
            if not isinstance(value, Tensor) or any(value is tensor for tensor in tensors):
                return value
            known = wrappers.get(id(value))
            return DeviceTensor(value) if known is None else known

        return tree_map(outer, op(*tree_map(inner, args), **tree_map(inner, kwargs)))


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return DeviceTensor(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.host


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.host.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return DeviceTensor(gradient)


class PretendDevice(TorchFunctionMode):
    """The pretended device, present inside its `with` block.

    Args:
        kind: "cuda" or "mps".

    Attributes:
        events: how often what happened where, by (kind, operation, line of the library).
    """

    def __init__(self, kind):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.events = Counter()

    def __enter__(self):
        # So that `module.to` replaces parameters, rather than the data inside of them.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        DeviceTensor.current = self
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*error)

    def note(self, kind, name, count=1):
        if count:
            self.events[kind, name, line_of_library()] += count

    @contextlib.contextmanager
    def watched(self):
        """Count the events of a block alone."""
        self.events.clear()
        yield self.events

    def _is_own(self, device):
        return device is not None and torch.device(device).type == self.device.type

    def _moved(self, x, device, dtype):
        """Return a tensor on a device and in a dtype."""
        here = isinstance(x, DeviceTensor)
        if device is None or self._is_own(device) == here:
            return x if dtype is None else x.to(dtype)
        if not here:
            self.note("upload", "to")
            return _Upload.apply(x if dtype is None else x.to(dtype))
        self.note("read", "to")
        x = _Download.apply(x)
        return x if dtype is None else x.to(dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and name in ("to", "cpu", "cuda", "type_as"):
            if name != "to":
                goal = {"cpu": ("cpu", None), "cuda": ("cuda", None)}.get(name)
                return self._moved(first, *(goal or (args[1].device, args[1].dtype)))
            if len(args) > 1 and isinstance(args[1], Tensor):
                return self._moved(first, args[1].device, args[1].dtype)
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is None or isinstance(first, DeviceTensor) == self._is_own(device):
                options = {"copy": kwargs.get("copy", False), "memory_format": memory_format}
                return function(first, dtype or first.dtype, **options)
            return self._moved(first, device, dtype)
        if isinstance(first, DeviceTensor):
            if name in ("tolist", "numpy", "__array__"):
                self.note("read", name)
                return getattr(first.host.detach(), name)(*args[1:], **kwargs)
            if name == "new_tensor":
                self.note("upload", name)
                return DeviceTensor(first.host.new_tensor(*args[1:], **kwargs))
            if self._is_own(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)
        if self._is_own(kwargs.get("device")):
            kwargs["device"] = "cpu"
            self.note("upload", name, name in FROM_HOST)
            out = function(*args, **kwargs)
            return DeviceTensor(out.detach())
        return function(*args, **kwargs)
