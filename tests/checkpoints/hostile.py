"""Read files made to harm in little memory; run by test_fuzzing.py in a separate process.

    python hostile.py FOLDER LOADERS

LOADERS is "readers" or "loaders": the functions under test. The results are printed as JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.hostile_files import hostile_files
from torch import nn

from diffusionkit import VPSDE, CheckpointError, EpsModel, load_checkpoint
from diffusionkit._files import read_torch
from diffusionkit.checkpoints import (
    load_edm,
    load_edm2,
    load_improved_diffusion,
    load_network,
    load_score_sde,
)
from diffusionkit.checkpoints._edm_keys import read_edm_pickle
from diffusionkit.checkpoints._safetensors import read_safetensors

READERS = {
    "zip": read_torch,
    "archive": read_torch,
    "legacy": read_torch,
    "edm": read_edm_pickle,
    "safetensors": read_safetensors,
}
SUFFIXES = {"edm": ".pkl", "safetensors": ".safetensors"}
MEMORY = 256 << 20


def functions(kind: str, loaders: str) -> list[Callable[[Path], Any]]:
    if loaders == "readers":
        return [READERS[kind]]
    checkpoints = [load_network, load_score_sde, load_improved_diffusion, load_edm, load_edm2]
    model = EpsModel(nn.Linear(1, 1), VPSDE())
    return [*checkpoints, partial(load_checkpoint, model=model)]


def main(folder: Path, loaders: str) -> None:
    status = Path("/proc/self/status").read_text()
    (used,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    read, failures, slow, count = [], [], [], 0
    for name, content in hostile_files():
        kind = name.split(":")[0]
        path = folder / f"x{SUFFIXES.get(kind, '.pt')}"
        path.write_bytes(content)
        count += 1
        resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + MEMORY,) * 2)
        for load in functions(kind, loaders):
            began = time.process_time()
            try:
                value = load(path)
                read.append(name)
                if kind == "archive" and not torch.equal(value, torch.arange(3.0)):
                    failures.append(f"{name}: read as {value!r:.100}")
            except CheckpointError as error:
                if str(path) not in str(error) or len(str(error)) > 2000 or "MemoryE" in str(error):
                    failures.append(f"{name}: {error}")
            except BaseException as error:
                failures.append(f"{name}: {type(error).__name__} {error}")
            if (seconds := time.process_time() - began) > 1.0:
                slow.append((name, round(seconds, 2), len(content)))
    report = {"count": count, "read": read, "failures": failures, "slow": slow}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
