"""Hostile files: no code runs, memory and time are bounded, and errors give the reason."""

import re
import struct
import time
import tracemalloc

import pytest
from support.pickle_code import (
    BOMBS,
    END,
    KEY,
    OWN,
    START,
    edm,
    laughs,
    legacy,
    named,
    number,
    storage,
    tensor,
    text,
    zipped,
)

from diffusionkit._files import CheckpointError, read_torch
from diffusionkit.checkpoints._edm_keys import read_edm_pickle

NAMES = [
    "posix.system", "os.system", "nt.system", "builtins.eval", "builtins.exec",
    "builtins.getattr", "builtins.__import__", "builtins.open", "builtins.bytearray",
    "__builtin__.eval", "subprocess.Popen", "importlib.import_module", "runpy.run_path",
    "operator.attrgetter", "functools.partial", "copyreg._reconstructor", "copyreg.__newobj__",
    "pickle.loads", "_pickle.loads", "types.FunctionType", "types.CodeType", "codecs.encode",
    "torch.load", "torch.hub.load", "torch.serialization.save",
    "torch.storage._load_from_bytes_", "torch.jit.load", "torch.ones", "torch.Tensor",
    "torch.FloatTensor", "torch.nn.Parameter", "torch.nn.functional.relu", "torch.nn.modules",
    "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_nested_tensor", "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_wrapper_subclass", "torch._tensor._rebuild_from_type_v2",
    "numpy.load", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.fromfile", "numpy.testing._private.utils.runstring",
    "collections.deque", "collections.defaultdict", "dnnlib.util.open_url", "dnnlib.EasyDict",
    "torch_utils.persistence._src_to_module", "torch_utils.persistence.import_hook",
]  # fmt: skip


READERS = {
    "zip": (read_torch, zipped),
    "legacy": (read_torch, legacy),
    "edm": (read_edm_pickle, edm),
}


@pytest.fixture(params=READERS)
def harmless(request, tmp_path, monkeypatch):
    """Check in each format that a pickle is rejected, in little time and memory."""
    read, wrap = READERS[request.param]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.bin"

    def check(body: bytes, match: str) -> None:
        content = wrap(body)
        path.write_bytes(content)
        tracemalloc.start()
        began = time.process_time()
        try:
            with pytest.raises(CheckpointError, match=rf"(?s)x\.bin: expected a .*, got .*{match}"):
                read(path)
            assert tracemalloc.get_traced_memory()[1] < 300 * len(content) + 500_000
        finally:
            tracemalloc.stop()
        assert time.process_time() - began < 10
        assert list(tmp_path.iterdir()) == [path]

    return check


def test_error_names_the_forbidden_global(harmless) -> None:
    args = text("touch victim") + b"\x85"
    for name in NAMES:
        by_stack = b"".join(map(text, name.rsplit(".", 1))) + b"\x93"
        for found in (named(name), by_stack):
            for call in (b"R", b"\x81"):
                refusal = f"the global {re.escape(name)}, which is not among"
                if name.startswith("numpy."):  # pickles of EDM hold arrays, read as placeholders
                    refusal = f"({refusal}|one that cannot be read)"
                harmless(found + args + call, refusal)
        instance = b"(" + text("touch victim") + b"i" + named(name)[1:]
        harmless(instance, "the operation INST")


@pytest.mark.parametrize("code", ["o", "\x82\x01", "\x92", "I1\n", "\x97", "P1\n", "2", "0"])
def test_operations_beyond_plain_data_are_rejected(harmless, code) -> None:
    harmless(b"}}" + code.encode("latin1"), "expected a pickle of plain data, got")


def test_operations_on_values_of_the_wrong_type_are_rejected(harmless) -> None:
    made = "expected a list, set or dictionary, got "
    harmless(b")(Ne", made + "tuple")
    harmless(b"](K\x01\x90", made + "list")
    harmless(b"}(K\x01\x90", made + "dict")
    harmless(b"\x8f(K\x01K\x02u", made + "set")
    harmless(b"\x8fK\x01K\x02s", made + "set")
    harmless(named("builtins.set") + b"]R", "expected a call of an allowed global")
    harmless(b"NNR", "expected a call of an allowed global")
    harmless(b"(}(K\x01ut", "expected pairs of keys and values, got an odd number")


def test_unfinished_pickles_are_rejected(rejected) -> None:
    for body in (b"NN", b"(N", b"N(N"):
        rejected(zipped(body), "expected a pickle of one value")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (3,), (1,)),
        (1, (2,), (1,)),
        (2, (1,), (1,)),
        (0, (2,), (2**40,)),
        (0, (2**40,), (1,)),
        (0, (2**40,), (0,)),
        (0, (2**62, 4), (0, 0)),
        (2**63 - 1, (2,), (1,)),
        (2**70, (1,), (1,)),
        (-1, (2,), (1,)),
        (1, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (1, 2), (1,)),
        (0, (1.0,), (1,)),
        (0.0, (1,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_rejected(rejected, offset, size, stride) -> None:
    match = (
        "expected (a tensor within its 2 v|shape and strides of a t|tensors of the size of the f)"
    )
    rejected(zipped(tensor(storage(), offset, size, stride), **{"0": bytes(8)}), match)
    data = legacy(OWN, keys=KEY, rest=struct.pack("<qff", 2, 1, 2))
    content = b"B" + struct.pack("<I", len(data)) + data + b"\x85R"
    body = named("torch.storage._load_from_bytes") + content
    rejected(edm(tensor(body, offset, size, stride)), match, read_edm_pickle)


def test_handwritten_tensor_within_its_storage_is_read(tmp_path, rejected) -> None:
    path = tmp_path / "x"
    path.write_bytes(zipped(tensor(storage(), 1, (1,), (1,)), **{"0": struct.pack("ff", 1, 2)}))
    assert read_torch(path).tolist() == [2.0]
    body = tensor(OWN, 1, (1,), (1,))
    path.write_bytes(legacy(body, keys=KEY, rest=struct.pack("<qff", 2, 1, 2)))
    assert read_torch(path).tolist() == [2.0]
    rejected(legacy(body), "expected the values of 1 storages")


@pytest.mark.parametrize("numel", [2**20, 2**40, 2**62, 2**70, -1])
def test_storages_larger_than_the_file_are_rejected(rejected, numel) -> None:
    body, count = storage(numel), max(min(numel, 2**62), 0)
    for content in (
        zipped(body, **{"0": bytes(8)}),
        legacy(body.replace(b"tQ", b"NtQ"), keys=KEY, rest=struct.pack("<q", count) + bytes(8)),
    ):
        rejected(content, "expected the size of a storage, got -1" if numel < 0 else "")


def test_malformed_storages_are_rejected(tmp_path, rejected) -> None:
    path, rest = tmp_path / "x", struct.pack("<qff", 2, 1, 2)
    other = storage(1).replace(b"tQ", b"NtQ")
    view = storage().replace(b"tQ", b"K\x01tQ")
    module = OWN.replace(text("storage"), text("module"))
    for content, match in [
        (legacy(b"(" + OWN + other + b"t", keys=KEY, rest=rest), "expected one storage 0, got"),
        (legacy(view, keys=KEY, rest=rest), "expected a whole storage, got a view"),
        (legacy(module, keys=KEY, rest=rest), "expected a storage, got 'module'"),
        (legacy(b"N").replace(b"\xe9\x03", b"\xe9\x04"), "expected the first numbers of a file"),
    ]:
        rejected(content, match)
    path.write_bytes(legacy(OWN, keys=KEY, rest=rest))
    read_torch(path)


@pytest.mark.parametrize("bomb", BOMBS)
def test_exponentially_large_values_are_rejected(harmless, bomb) -> None:
    harmless(BOMBS[bomb], "that contains itself or repeats too often")


def test_errors_abbreviate_large_values(harmless) -> None:
    bomb = b"(" + laughs(b"%%\x86")
    for name, match in [
        ("torch.Size", "expected a shape"),
        ("torch.device", "expected the name of a device"),
        ("builtins.set", "expected a string or a number as key"),
        ("numpy.dtype", "expected the dtype of a number"),
    ]:
        harmless(bomb + named(name) + b"h\x3c\x85Rt", match)
    harmless(bomb + b"h\x3c)Rt", "expected a call of an allowed global")


KEYS = {
    "a deep tuple": b")" + b"\x85" * 5000,
    "a tuple": b"K\x01\x85",
    "a long number": number(2**61 - 1 << 61),
    "a set": b"\x8f",
    "a list": b"]",
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_overflow_or_collide_are_rejected(harmless, key) -> None:
    harmless(b"}" + KEYS[key] + b"Ns", "expected a string or a number as key")
    harmless(b"\x8f(" + KEYS[key] + b"\x90", "expected a string or a number as key")
    body = named("builtins.set") + b"](" + KEYS[key] + b"e\x85R"
    harmless(body, "expected a string or a number as key")


def test_sizes_in_the_pickle_do_not_allocate_memory(harmless) -> None:
    huge = struct.pack("<Q", 2**40)
    for body in (b"\x8e" + huge, b"\x8d" + huge, b"B\xff\xff\xff\xff", b"X\xff\xff\xff\x7f"):
        harmless(body + b"abc", "expected .*, got")
    harmless(b"\x95" + struct.pack("<Q", 2**63) + b"N" + b"N", "expected .*, got")
    harmless(b"Nr\xff\xff\xff\xff" + b"(", "expected .*, got")


@pytest.mark.parametrize("name", ["_codecs.encode", "builtins.set", "torch.Size"])
def test_repeated_use_of_one_large_argument_is_rejected(harmless, name) -> None:
    """Each call would make another copy."""
    first = {
        "_codecs.encode": text("a" * 50_000) + text("latin1") + b"\x86q\x00",
        "builtins.set": b"](" + b"K\x01" * 20_000 + b"e\x85q\x00",
        "torch.Size": b"(" + b"K\x01" * 20_000 + b"t\x85q\x00",
    }[name]
    body = first + named(name) + b"q\x01" + b"](" + b"h\x01h\x00R" * 1000 + b"e\x86\x86"
    harmless(body, "expected each part to be used once")


def test_state_of_plain_objects_is_rejected(harmless) -> None:
    made = named("collections.OrderedDict") + b")R"
    for state in (b"N", b"}" + text("items") + b"K\x01s", b"}" + text("__class__") + b"Ns"):
        harmless(made + state + b"b", "got a state for OrderedDict")
    for odd in (b"N", b"K\x01", b"}" + text("a") + b"K\x01s",
                b"}" + text("a") + b"}" + text("version") + text("1") + b"ss"):  # fmt: skip
        harmless(made + b"}" + text("_metadata") + odd + b"sb", "expected the versions of modules")
    harmless(b"]}b", "got a state for list")
    number = named("numpy.dtype") + text("f8") + b"\x89\x88\x87R"
    harmless(number + b"}b}b", "expected a plain little-endian dtype")


def test_tensors_with_hooks_are_rejected(rejected) -> None:
    plain = named("collections.OrderedDict") + b")R"
    body = tensor(storage(), 1, (1,), (1,)).replace(plain, plain + b"K\x01Ns")
    rejected(zipped(body, **{"0": bytes(8)}), "expected a tensor without hooks")


def test_functions_are_rejected_as_values(harmless) -> None:
    harmless(named("_codecs.encode") + text("a") + text("idna") + b"\x86R", "expected bytes as lat")
    harmless(named("_codecs.encode"), "expected plain data, got a function")
    harmless(b"]" + named("torch.Size") + b"a", "expected plain data, got a function")


@pytest.mark.parametrize(
    ("dtype", "state", "match"),
    [
        ("O8", b"", "expected the dtype of a number"),
        ("V100", b"", "expected the dtype of a number"),
        ("f8", b"N", "expected a plain little-endian dtype"),
        ("f8", b"(K\x03" + text("<") + b"}" + b"NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t",
         "expected a plain little-endian dtype"),
    ],
)  # fmt: skip
def test_hostile_dtypes_are_rejected(harmless, dtype, state, match) -> None:
    body = named("numpy.dtype") + text(dtype) + b"\x89\x88\x87R"
    built = body + state + b"b" if state else body
    data = text("\0" * 8) + text("latin1") + b"\x86"
    value = named("numpy.core.multiarray.scalar") + built + named("_codecs.encode") + data + b"R"
    harmless(value + b"\x86R", match)


def test_nested_pickles_follow_the_same_rules(rejected, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    attack = named("posix.system") + text("touch victim") + b"\x85R"
    inner = [legacy(attack), zipped(attack), START + attack + END, edm(attack), b"", b"PK\x03\x04"]
    for content in inner:
        body = b"B" + struct.pack("<I", len(content)) + content + b"\x85R"
        rejected(edm(named("torch.storage._load_from_bytes") + body), "", read_edm_pickle)
        assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_malformed_persistent_objects_are_rejected(tmp_path) -> None:
    make = named("torch_utils.persistence._reconstruct_persistent_obj")
    good = {
        "type": text("class"),
        "version": b"K\x06",
        "class_name": text("Net"),
        "module_src": text("raise SystemExit"),
        "state": b"}(" + text("_modules") + b"}" + text("_buffers") + b"}" + text("_parameters")
        + b"}u",
    }  # fmt: skip

    def read(**changes: bytes):
        items = b"".join(text(key) + value for key, value in {**good, **changes}.items())
        (tmp_path / "x").write_bytes(edm(make + b"}(" + items + b"u\x85R"))
        return read_edm_pickle(tmp_path / "x")

    assert read()["ema"].class_name == "Net"
    pair = b"}(" + text("_modules") + b"}" + text("_buffers") + b"}" + text("_parameters")
    for changes, match in [
        ({"type": text("function")}, "expected a persistent class instance, got another"),
        ({"class_name": b"N"}, "expected the name and the state"),
        ({"state": b"]"}, "expected the name and the state"),
        ({"version": b"N"}, "expected persistence version 6, got None"),
        ({"state": pair + b"}" + text("a") + b"K\x01su"}, "expected a tensor at a"),
        ({"state": b"}(" + text("_modules") + b"}" + text("a") + b"K\x01s" + text("_buffers")
          + b"}" + text("_parameters") + b"}u"}, "expected a module at 'a.'"),
        ({"state": b"}" + text("_init_args") + b"K\x01s"}, "expected the arguments of Net"),
        ({"state": b"}" + text("_modules") + b"}s"}, "KeyError"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=match):
            read(**changes)
