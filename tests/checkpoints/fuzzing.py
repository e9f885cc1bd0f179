"""Mutate files and read them under audit; run by test_fuzzing.py in a separate process.

    python fuzzing.py FOLDER SEED COUNT

FOLDER holds whole files, named READER-anything. Each file is mutated COUNT times. The results are
printed as JSON.
"""

import codecs
import contextlib
import io
import json
import pickletools
import random
import resource
import struct
import sys
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import torch

from diffusionkit._files import CheckpointError, read_torch
from diffusionkit.checkpoints._edm_keys import read_edm_pickle
from diffusionkit.checkpoints._safetensors import read_safetensors

READERS = {
    "zip": read_torch,
    "legacy": read_torch,
    "edm": read_edm_pickle,
    "safetensors": read_safetensors,
}
GLOBALS = [
    b"posix\nsystem\n", b"builtins\neval\n", b"builtins\nexec\n", b"builtins\ngetattr\n",
    b"torch\nload\n", b"builtins\nbytearray\n", b"torch\nTensor\n", b"torch\nSize\n",
    b"numpy\ndtype\n", b"collections\nOrderedDict\n", b"torch\nFloatStorage\n",
    b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_parameter\n",
    b"torch.storage\n_load_from_bytes\n", b"_codecs\nencode\n", b"builtins\nset\n",
]  # fmt: skip
NUMBERS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
EVENTS = ("exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pickle.")


def cut(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    far = draw.random() < 0.5
    return data[: draw.randrange(len(data)) if far else -draw.randint(1, min(64, len(data)))]


def flip(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def insert(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(draw.choice([1, 2, 4, 64, 1000])) + data[place:]


def remove(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + data[place + draw.choice([1, 2, 4, 64]) :]


def splice(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    other = draw.choice(others)
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def renumber(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Overwrite bytes, perhaps of headers, sizes or offsets, with an extreme number."""
    form = draw.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
    size = struct.calcsize(form)
    number = draw.choice(NUMBERS) % 2 ** (8 * size)
    edge = draw.choice([0, max(0, len(data) - 200), draw.randrange(len(data))])
    place = min(edge + draw.randrange(200), len(data) - size)
    return data[:place] + struct.pack(form, number) + data[place + size :]


def operations(data: bytes) -> list[tuple[str, int, int]]:
    """Return name, start and end of the operations of all pickles in a file, at most 5000."""
    found, source = [], io.BytesIO(data)
    try:
        while len(found) < 5000:
            base = source.tell()
            for operation, _, position in pickletools.genops(source):
                found.append((operation.name, position, source.tell()))
            if source.tell() == base:
                break
    except (ValueError, UnicodeDecodeError):
        pass
    return found


def reoperate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Replace, repeat, drop or swap whole operations of a pickle."""
    places = operations(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        name, start, end = draw.choice(places)
        mine, (_, other, stop) = data[start:end], draw.choice(places)
        if name == "GLOBAL" and draw.random() < 0.7:
            mine = b"c" + draw.choice(GLOBALS)
        elif name.startswith("BININT") and draw.random() < 0.7:
            mine = b"\x8a\x09" + struct.pack("<Q", draw.choice(NUMBERS)) + b"\0"
        elif draw.random() < 0.1:
            mine = b"c" + draw.choice(GLOBALS)
        else:
            mine = draw.choice([b"", mine * 2, data[other:stop], draw.randbytes(1) + mine[1:]])
        data = data[:start] + mine + data[end:]
        places = [place for place in places if place[2] <= start] or places[:1]
    return data


def repickle(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Change the pickle or the records in a zip file, with correct checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl"):
                record = draw.choice([reoperate, reoperate, flip, cut])(record, draw, others)
            elif draw.random() < 0.05:
                record = draw.choice([b"", record * 2, record[:-1], b"little", b"1"])
            if draw.random() > 0.01:
                new.writestr(name, record)
    return file.getvalue()


MUTATIONS = [cut, flip, insert, remove, splice, renumber]
OWN = {"zip": [repickle] * 4, "legacy": [reoperate] * 4, "edm": [reoperate] * 4, "safetensors": []}


def main(folder: Path, seed: int, count: int) -> None:
    draw, path = random.Random(seed), folder / "mutated"
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    for name in files:  # trigger all late imports
        READERS[name.split("-")[0]](folder / name)
        path.write_bytes(files[name][: len(files[name]) // 2])
        with contextlib.suppress(CheckpointError):
            READERS[name.split("-")[0]](path)
    for encoding in ("cp437", "raw_unicode_escape"):
        codecs.lookup(encoding)
    repr(torch.ones(1))
    seen: list[str] = []
    watching = False

    def watch(event: str, args: tuple) -> None:
        writes = event == "open" and args[1] and set(str(args[1])) & set("wax+")
        if watching and (writes or event == "import" or event.startswith(EVENTS)):
            seen.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(watch)
    results: Counter[str] = Counter()
    failures: list[str] = []
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in files.items():
        kind = name.split("-")[0]
        for _ in range(count):
            mutation = draw.choice(MUTATIONS + OWN[kind])
            changed = mutation(data, draw, list(files.values()))
            path.write_bytes(changed)
            began, watching = time.process_time(), True
            try:
                READERS[kind](path)
                results[f"{kind} read"] += 1
            except CheckpointError as error:
                watching = False
                results[f"{kind} rejected"] += 1
                if len(str(error)) > 2000 or str(path) not in str(error):
                    failures.append(f"{name} {mutation.__name__}: {error}"[:2000])
            except BaseException:
                failures.append(f"{name} {mutation.__name__}: {traceback.format_exc()[-1500:]}")
                (folder / f"failure-{len(failures)}").write_bytes(changed)
            watching = False
            slowest = max(slowest, time.process_time() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {"results": results, "failures": failures[:5], "seen": seen[:20], "slowest": slowest}
    sys.stdout.write(json.dumps({**report, "grown": (after - before) * 1024}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
