"""Read files made to harm in little memory; run by test_fuzzing.py in a separate process.

    python hostile.py FOLDER

The results are printed as JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from support.hostile_files import hostile_files

from diffusionkit._files import CheckpointError, read_torch
from diffusionkit.checkpoints._edm_keys import read_edm_pickle
from diffusionkit.checkpoints._safetensors import read_safetensors

READERS = {
    "zip": read_torch,
    "archive": read_torch,
    "legacy": read_torch,
    "edm": read_edm_pickle,
    "safetensors": read_safetensors,
}
MEMORY = 256 << 20


def main(folder: Path) -> None:
    status = Path("/proc/self/status").read_text()
    (used,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    read, failures, slow, count = [], [], [], 0
    path = folder / "x"
    for name, content in hostile_files():
        path.write_bytes(content)
        count += 1
        began = time.process_time()
        resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + MEMORY,) * 2)
        try:
            value = READERS[name.split(":")[0]](path)
            read.append(name)
            if name.startswith("archive") and not torch.equal(value, torch.arange(3.0)):
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
    main(Path(sys.argv[1]))
