"""Load files that ask for more than they bring; run by test_every_loader.py in a process.

    python demanding.py FOLDER

FOLDER holds files named LOADER-anything. The process may use 1 GiB beyond what its imports use.
Seconds and messages by file are printed as JSON.
"""

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch

from diffusionkit import CheckpointError
from diffusionkit.checkpoints import (
    load_dit,
    load_edm,
    load_edm2,
    load_improved_diffusion,
    load_network,
    load_score_sde,
)

LOADERS = {
    "dit": partial(load_dit, heads=4),
    "edm": load_edm,
    "edm2": load_edm2,
    "improved": load_improved_diffusion,
    "own": load_network,
    "score": load_score_sde,
}


def configured(path: Path) -> object:
    """Load a file with the configuration beside it."""
    return load_score_sde(path, json.loads(path.with_suffix(".json").read_text()))


def used() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    limit = used() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            continue
        name = path.name.split("-")[0]
        load = configured if name == "configured" else LOADERS[name]
        began = time.process_time()
        try:
            load(path)
            said = "loaded"
        except CheckpointError as error:
            said = f"CheckpointError: {error}"[:500]
        except (ValueError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"[:500]
        except BaseException as error:
            said = f"raw {type(error).__name__}: {error}"[:500]
        report[path.name] = (time.process_time() - began, said)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
