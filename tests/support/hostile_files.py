"""Small files made to harm: to read as something else, to take all memory, or never to end."""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator

import torch

from support.pickle_code import (
    BOMBS,
    END,
    KEY,
    OWN,
    START,
    edm,
    legacy,
    named,
    number,
    storage,
    tensor,
    text,
    zipped,
)  # fmt: skip

MANY = 10_000
ORDERED = named("collections.OrderedDict") + b")R"


def pickles() -> Iterator[tuple[str, bytes]]:
    """Yield pickles of values, without start and end."""
    yield from BOMBS.items()
    big = b"](" + b"K\x01" * 2000 + b"eq\x00"
    long = text("a" * MANY) + b"q\x00"
    deep = b")" + b"\x85" * MANY + b"q\x00"
    for name, part in [
        ("lists", b"]"), ("dictionaries", b"}"), ("sets", b"\x8f"), ("marks", b"("),
        ("sets of one", b"\x8f(K\x01\x90"), ("dictionaries of one", b"}NNs"),
        ("ordered dictionaries", b"h\x00)R"), ("memos", b"N\x94"), ("long memos", b"Nr\0\0\0\1"),
    ]:  # fmt: skip
        yield (
            f"many {name}",
            b"(" + named("collections.OrderedDict") + b"q\x00" + part * MANY + b"t",
        )
    yield "a dictionary of itself", b"}q\x00K\x01h\x00s"
    yield "a list of a list of it", b"]q\x00]q\x01h\x00ah\x01a"
    yield "itself often", b"]q\x00(" + b"h\x00" * MANY + b"e"
    yield "a wide tuple often", b"(" + big + b"h\x00" * MANY + b"t"
    yield "a list that doubles", b"]q\x00" + b"(h\x00h\x00eh\x00" * 1000 + b"0" * 1000
    yield "a deep dictionary", b"}" + b"K\x01}" * MANY + b"s" * MANY
    yield "a deep key", b"}" + deep + b"Ns"
    yield "a deep name", deep + b"h\x00\x93"
    yield "a deep call", deep + b"h\x00R"
    yield "a deep state", ORDERED + deep + b"b"
    yield "a deep storage", deep + b"Q"
    yield "joined long names", b"(" + long + b"h\x00h\x00\x93" * MANY + b"t"
    yield "joined long module names", b"(" + text("torch.nn.modules.") + b"q\x01" + (
        text("a" * 60_000) + b"q\x00" + b"h\x01h\x00\x93" * 6000 + b"t"
    )  # fmt: skip
    yield "many classes", b"(" + (named("torch.nn.modules.a.B") + b")\x81") * 2000 + b"t"
    yield "a long line", b"c" + b"a" * MANY + b"\na\n"
    yield "a line without end", b"c" + b"a" * MANY
    yield "a list as a name", b"]]\x93"
    yield "long numbers as keys", b"}(" + b"".join(
        number((2**61 - 1) * i + 1) + b"N" for i in range(5, 2000)
    ) + b"u"  # fmt: skip
    yield "no number as keys", b"}(" + (number(float("nan")) + b"N") * MANY + b"u"
    yield "tuples as keys", b"\x8f(" + b"K\x01K\x02\x86" * 1000 + b"\x90"
    for name in ("_codecs.encode", "builtins.set", "torch.Size", "collections.Counter"):
        for args in (
            b")",
            b"N\x85",
            long + b"h\x00\x86",
            big + b"\x85",
            deep + b"\x85",
            b"}NNs\x85",
        ):
            yield f"{name} of {args[:1]!r}{len(args)}", named(name) + args + b"R"
        yield (
            f"{name} often",
            long + named(name) + b"q\x01" + b"](" + b"h\x01h\x00h\x00\x86R" * MANY,
        )
    yield (
        "a copied counter",
        b"("
        + b"}("
        + b"".join(number(i) + b"K\x01" for i in range(2000))
        + b"u\x85q\x00"
        + named("collections.Counter")
        + b"q\x01"
        + b"h\x01h\x00R" * MANY
        + b"t",
    )
    yield "a shared state", b"}" + text("_metadata") + b"}(" + b"".join(
        number(i) + b"}" for i in range(2000)
    ) + b"usq\x00(" + (ORDERED + b"h\x00b") * 2000 + b"t"  # fmt: skip
    yield (
        "a large state often",
        b"}("
        + b"".join(number(i) + b"N" for i in range(2000))
        + b"uq\x00("
        + ORDERED
        + b"q\x01"
        + b"h\x01h\x00b" * MANY
        + b"t",
    )
    for size in (2**31 - 1, 2**32 - 1):
        for code in (b"X", b"B"):
            yield f"{size} bytes by {code!r}", code + struct.pack("<I", size) + b"abc"
    for size in (2**40, 2**63, 2**64 - 1):
        for code in (b"\x8d", b"\x8e", b"\x95"):
            yield f"{size} bytes by {code!r}", code + struct.pack("<Q", size) + b"abc"
    for code in (
        b"0",
        b"1",
        b"2",
        b"i",
        b"o",
        b"I1\n",
        b"F1\n",
        b"L1L\n",
        b"S'a'\n",
        b"V\n",
        b"P1\n",
        b"\x82\x01",
        b"\x83\1\1",
        b"\x84\1\1\1\1",
        b"\x8b\1\1\1\1",
        b"\x91",
        b"\x92",
        b"\x96" + bytes(8),
        b"\x97",
        b"\x98",
        b"\xff",
        b"",
        b"a",
        b"s",
        b"u",
        b"e",
        b"t",
        b"h\x07",
        b"q\x07",
        b"b",
        b"R",
        b"Q",
        b"\x85",
        b"\x87",
        b"\x90",
        b"\x93",
        b"\x94",
    ):
        yield f"the operation {code!r}", code


def tensors() -> Iterator[tuple[str, bytes, bytes]]:
    """Yield pickles of tensors, and the bytes of storage 0; each storage has two float32."""
    data, made = struct.pack("ff", 1, 2), storage() + b"q\x05"
    one = tensor(b"h\x05", 0, (2,), (1,))
    wide = tensor(b"h\x05", 0, (250_000,), (0,))
    yield "one wide tensor", b"(" + made + tensor(b"h\x05", 0, (10**9,), (0,)) + b"t", data
    yield "wide in two dimensions", tensor(storage(), 0, (30_000, 30_000), (0, 0)), data
    yield "wide tensors in sum", b"(" + made + wide * 20 + b"t", data
    yield "a wide tensor often", b"(" + made + wide + b"q\x06" + b"h\x06" * 1000 + b"t", data
    yield "a wide tensor by name", b"}(" + b"".join(
        number(i) + (made + wide + b"q\x06" if i == 0 else b"h\x06") for i in range(100)
    ) + b"u", data  # fmt: skip
    yield "overlapping rows", tensor(storage(), 0, (10**5, 2), (0, 1)), data
    yield "many dimensions", tensor(storage(), 0, (1,) * 2000, (1,) * 2000), data
    yield "a large empty tensor", tensor(storage(), 0, (0, 2**62, 2**62), (1, 1, 1)), data
    yield "an empty tensor far away", tensor(storage(), 2**62, (0,), (1,)), data
    yield "sizes that overflow", tensor(storage(), 0, (2**32, 2**32), (0, 0)), data
    yield "a tensor as storage", tensor(tensor(storage(), 1, (1,), (1,)), 0, (2,), (1,)), data
    yield "a list as storage", tensor(b"]", 0, (2,), (1,)), data
    yield "many lists", b"(" + made + (one + b"0") * 3 + b"]" * MANY + b"t", data
    yield "a storage type as value", named("torch.FloatStorage"), data
    yield "another dtype", tensor(storage(1, "DoubleStorage"), 0, (9,), (1,)), data
    yield "a complex storage", tensor(storage(2, "ComplexDoubleStorage"), 0, (2,), (1,)), data
    yield "a quantized storage", tensor(storage(8, "QInt8Storage"), 0, (2,), (1,)), data
    yield "integers with gradients", tensor(storage(1, "LongStorage"), 0, (1,), (1,)).replace(
        b"\x89", b"\x88"
    ), data  # fmt: skip
    for numel in (0, 1, 3, 2**31, 2**62, 2**63, 2**80):
        yield f"a storage of {numel}", tensor(storage(numel), 0, (1,), (1,)), data
    for dtype in ("float4_e2m1fn_x2", "quint8", "bits8", "float32"):
        yield (
            f"untyped {dtype}",
            tensor(storage(8, "storage.UntypedStorage"), 0, (2,), (1,))
            .replace(b"_v2", b"_v3")
            .replace(ORDERED + b"tR", ORDERED + named(f"torch.{dtype}") + b"tR"),
            data,
        )


def whole(value: object = None) -> bytes:
    """Return a file of torch, of a tensor if no value is given."""
    file = io.BytesIO()
    torch.save(torch.arange(3.0) if value is None else value, file)
    return file.getvalue()


def rezip(content: bytes, edit: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """Write the records of a zip file again by a function of the new file, a name and bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            edit(new, name, old.read(name))
    return file.getvalue()


def headers(content: bytes, signature: bytes) -> list[int]:
    found, place = [], content.find(signature)
    while place >= 0:
        found.append(place)
        place = content.find(signature, place + 1)
    return found


def patched(content: bytes, place: int, data: bytes) -> bytes:
    return content[:place] + data + content[place + len(data) :]


def archives() -> Iterator[tuple[str, bytes]]:
    """Yield zip files."""
    good, other = whole(), whole(torch.ones(3))
    plain = rezip(good, lambda new, name, data: new.writestr(name, data))
    last, first = len(good) - 22, headers(good, b"PK\1\2")[0]
    yield "two files, the second last", good + other
    yield "two files in a comment", good[:-2] + struct.pack("<H", len(other)) + other
    yield "a comment", good[:-2] + b"\3\0abc"
    yield "a comment that lies", good[:-2] + b"\3\0"
    yield "a comment with an end", good[:-2] + b"\x16\0" + good[-22:]
    yield "bytes at the end", good + bytes(3)
    yield "many bytes at the end", good + bytes(70_000)
    yield "a second directory", patched(good, last, b"")[:last] + good[first:last] + good[last:]
    yield "bytes before the directory", good[:first] + bytes(9) + good[first:]
    yield "a record before", b"PK\3\4" + bytes(26) + good
    yield "another end before", good[:first] + good[-22:] + good[first:]
    for cut in (1, 22, 23, 50, 100, 500, len(good) - 30, len(good) - 5):
        yield f"without {cut} bytes", good[:-cut]
    for name, content in (("torch", good), ("Python", plain)):
        local, central = headers(content, b"PK\3\4"), headers(content, b"PK\1\2")
        for k in (0, len(local) - 1):
            for what, offset in [
                ("signature", 0),
                ("flags", 6),
                ("method", 8),
                ("crc", 14),
                ("stored", 18),
                ("size", 22),
                ("name", 26),
                ("extra", 28),
            ]:
                place = local[k] + offset
                yield f"{name}: local {what} {k}", patched(content, place, b"\x07\x01")
            for what, offset in [
                ("flags", 8),
                ("method", 10),
                ("crc", 16),
                ("stored", 20),
                ("size", 24),
                ("name", 28),
                ("extra", 30),
                ("comment", 32),
                ("disk", 34),
                ("offset", 42),
            ]:
                place = central[k] + offset
                yield f"{name}: central {what} {k}", patched(content, place, b"\x07\x01")
            yield f"{name}: huge {k}", patched(content, central[k] + 20, b"\xfe\xff\xff\xff" * 2)
            yield f"{name}: wide {k}", patched(content, central[k] + 20, b"\xff\xff\xff\xff" * 2)
            yield f"{name}: local name {k}", patched(content, local[k] + 31, b"X")
        end = headers(content, b"PK\5\6")[-1]
        for what, offset in [("disk", 4), ("count", 8), ("size", 12), ("offset", 16)]:
            yield f"{name}: end {what}", patched(content, end + offset, b"\x07\x01")
    place = headers(good, b"PK\6\6")[-1]
    for offset in (16, 20, 24, 32, 40, 48, 56, 60, 64, 72):
        yield f"long end {offset}", patched(good, place + offset, b"\x07\x01")
        yield f"huge long end {offset}", patched(good, place + offset, b"\xff" * 4)
    for name in ("archive/Data/0", "archive/DATA.PKL", "archive/data/0", "Archive/data/0",
                 "x/data/0", "data.pkl", "../archive/data/1", "/archive/data/1"):  # fmt: skip
        yield f"also {name}", appended(good, name, bytes(12))
        yield f"first {name}", b"".join([appended(b"", name, bytes(12), good)])
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield (
            f"compressed by {kind}",
            rezip(good, lambda new, name, data, kind=kind: new.writestr(name, data, kind)),
        )
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", START + b"N" + b"." + bytes(100 << 20))
    yield "a bomb", bomb.getvalue()
    yield "a lying bomb", patched(bomb.getvalue(), 8, b"\0\0")

    def changed(record: str, data: bytes) -> bytes:
        return rezip(good, lambda new, name, old: new.writestr(
            name, data if name.endswith("/" + record) else old))  # fmt: skip

    for order in (b"big", b"little ", b"", b"\xff" * 1000):
        yield f"byte order {order[:8]!r}", changed("byteorder", order)
    for data in (b"", bytes(11), bytes(13), bytes(4000)):
        yield f"{len(data)} bytes for 12", changed("data/0", data)
    for data in (b"", b".", b"\x80", b"PK\5\6" + bytes(18), good):
        yield f"a pickle of {len(data)} bytes", changed("data.pkl", data)
    yield "no storage", rezip(good, lambda new, name, data: name.endswith("/0") or new.writestr(
        name, data))  # fmt: skip
    yield "no pickle", rezip(good, lambda new, name, data: name.endswith("pkl") or new.writestr(
        name, data))  # fmt: skip
    yield "a program", appended(good, "archive/constants.pkl", b"N")
    yield "only an end", b"PK\3\4" + good[-22:]
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    yield "empty", empty.getvalue()
    yield "empty with a record", b"PK\3\4" + bytes(26) + empty.getvalue()
    yield "flags of encryption", rezip(good, encrypted)


def appended(content: bytes, name: str, data: bytes, then: bytes = b"") -> bytes:
    """Return a zip file with one more record, before those of another one."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two records of one name
        archive.writestr(name, data)
        if then:
            with zipfile.ZipFile(io.BytesIO(then)) as old:
                for other in old.namelist():
                    archive.writestr(other, old.read(other))
    return file.getvalue()


def encrypted(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)
    info.flag_bits |= 1
    new.writestr(info, data)


def legacies() -> Iterator[tuple[str, bytes]]:
    """Yield files of torch before 1.6."""
    rest, body = struct.pack("<qff", 2, 1, 2), tensor(OWN, 0, (2,), (1,))
    other = OWN.replace(text("0"), text("1"))
    for numel in (-1, 0, 1, 3, 2**31, 2**62):
        yield f"{numel} values", legacy(body, keys=KEY, rest=struct.pack("<qff", numel, 1, 2))
        if numel != 3:
            lying = OWN.replace(number(2) + b"N", number(numel) + b"N")
            claimed = struct.pack("<qff", numel, 1, 2)
            yield f"claims {numel}", legacy(tensor(lying, 0, (2,), (1,)), keys=KEY, rest=claimed)
    for keys in (
        b"N",
        b"]",
        b"}",
        b"]K\0a",
        KEY + KEY[1:],
        b"]" + text("1") + b"a",
        b"]]]aa",
        b"](" + b"K\0" * MANY + b"e",
    ):
        yield f"keys {keys[:9]!r}", legacy(body, keys=keys, rest=rest)
    yield "a storage too many", legacy(b"(" + OWN + other + b"t", keys=KEY, rest=rest)
    yield "a view of a storage", legacy(OWN.replace(b"NtQ", b"(" + text("0") + b"K\0K\1ttQ"))
    yield "nothing after", legacy(body, keys=KEY)
    yield "more after", legacy(body, keys=KEY, rest=rest * 2)
    yield (
        "another magic number",
        legacy(body).replace(b"\xfc\x9c", b"\xfc\x9d"),
    )
    yield "one pickle", START + b"N" + END
    many = b"(" + b"".join(OWN.replace(text("0"), text(str(n))) for n in range(3000)) + b"t"
    yield "many storages", legacy(many, keys=b"]")
    large = b"(" + b"".join(
        storage(2**10).replace(b"tQ", b"NtQ").replace(text("0"), text(str(n))) for n in range(2000)
    ) + b"t"  # fmt: skip
    yield "storages of more than the file", legacy(large, keys=b"]")


def safetensors() -> Iterator[tuple[str, bytes]]:
    """Yield files of safetensors."""

    def file(header: object, data: bytes = bytes(8), size: int | None = None) -> bytes:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(raw) if size is None else size) + raw + data

    def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> object:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    for size in (0, 1, 10**6, 2**31, 2**62, 2**64 - 1):
        yield f"a header of {size}", file({"a": one()}, size=size)
    for shape in ([], [3], [-2], [2**63, 2], [2**32, 2**32], [1] * 2000, "2", [2.0], None, [[2]]):
        yield f"shape {str(shape)[:20]}", file({"a": one(shape=shape)})
    for offsets in ([0, 4], [4, 8], [8, 0], [0, 9], [0, 2**62], [-8, 0], [0], "08", [0.0, 8]):
        yield f"offsets {offsets}", file({"a": one(offsets=offsets)})
    for dtype in ("F128", "", 7, None, "f32", "F32 "):
        yield f"dtype {dtype!r}", file({"a": one(dtype=dtype)})
    yield "overlapping tensors", file({"a": one(), "b": one()})
    yield "the same tensor often", file({str(n): one() for n in range(1000)})
    yield (
        "two of one name",
        file(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
        ),
    )
    yield "a deep header", file(b'{"a":' + b"[" * MANY)
    yield "a deep note", file(b'{"__metadata__":' + b'{"a":' * MANY)
    yield "a number as note", file({"__metadata__": {"a": 1}, "a": one()})
    yield "a list", file([one()])
    yield "broken text", file(b'{"\xff": 1}')
    yield "a gap", file({"a": one()}, bytes(16))


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Yield the names, KIND: ANYTHING, and the contents of all of them."""
    for name, body in pickles():
        for kind, wrap in (("zip", zipped), ("legacy", legacy), ("edm", edm)):
            yield f"{kind}: {name}", wrap(body)
    for name, body, data in tensors():
        yield f"zip: {name}", zipped(body, **{"0": data})
        old = body.replace(b"tQ", b"NtQ")
        rest = struct.pack("<q", 2) + data
        inner = legacy(old, keys=KEY, rest=rest)
        yield f"legacy: {name}", inner
        content = b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R"
        yield f"edm: {name}", edm(named("torch.storage._load_from_bytes") + content)
    for kind, files in (
        ("archive", archives()), ("legacy", legacies()), ("safetensors", safetensors())
    ):  # fmt: skip
        yield from ((f"{kind}: {name}", content) for name, content in files)
