"""Pickles, and files of torch and EDM around them, written operation by operation."""

import io
import pickle
import struct
import zipfile

START, END = b"\x80\x02", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: float) -> bytes:
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    module, member = name.rsplit(".", 1)
    return b"c" + module.encode() + b"\n" + member.encode() + b"\n"


def zipped(body: bytes, **records: bytes) -> bytes:
    """Return a file of torch with a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", START + body + END)
        archive.writestr("x/version", "3\n")
        for key, data in records.items():
            archive.writestr(f"x/data/{key}", data)
    return file.getvalue()


def legacy(body: bytes, *, keys: bytes = b"]", rest: bytes = b"") -> bytes:
    """Return a file of torch before 1.6 with a pickle."""
    head = [number(0x1950A86A20F9469CFC6C), number(1001), b"}", body, keys]
    return b"".join(START + part + END for part in head) + rest


def edm(body: bytes) -> bytes:
    """Return a pickle of a dictionary with a value."""
    return START + b"}" + text("ema") + body + b"s" + END


def storage(numel: int = 2, kind: str = "FloatStorage") -> bytes:
    pid = text("storage") + named(f"torch.{kind}") + text("0") + text("cpu") + number(numel)
    return b"(" + pid + b"tQ"


# The earlier format has the viewed storage, None if there is none; the keys follow.
OWN, KEY = storage().replace(b"tQ", b"NtQ"), b"]" + text("0") + b"a"


def tensor(body: bytes, offset: int, size: tuple, stride: tuple) -> bytes:
    def shape(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    hooks = named("collections.OrderedDict") + b")R"
    args = body + number(offset) + shape(size) + shape(stride) + b"\x89" + hooks
    return named("torch._utils._rebuild_tensor_v2") + b"(" + args + b"tR"


def laughs(pair: bytes) -> bytes:
    """Return 60 values, each with the previous one twice; the last is number 60 of the memo."""
    values = [pair.replace(b"%", b"h" + bytes([n])) + b"q" + bytes([n + 1]) for n in range(60)]
    return b"]q\x00" + b"".join(values)


BOMBS = {
    "lists": b"(" + laughs(b"](%%e") + b"t",
    "tuples": b"(" + laughs(b"%%\x86") + b"t",
    "dictionaries": b"(" + laughs(b"}(K\x01%K\x02%u") + b"t",
    "a list of itself": b"]q\x00h\x00a",
    "a deep list": b"]" * 5000 + b"a" * 4999,
    "a deep tuple": b")" + b"\x85" * 5000,
    "a wide list often": b"(](" + b"N" * 3000 + b"eq\x00" + b"](" + b"h\x00" * 3000 + b"et",
}
