"""Let a torch that was built for CUDA be imported without the CUDA libraries, on Linux.

    pip install --no-deps torch==2.6.0
    python tests/scripts/cuda_stubs.py stubs
    LD_LIBRARY_PATH=stubs python -c "import torch"

Wheels of old versions without CUDA are not on every index, and the libraries of those with CUDA
take gigabytes. This writes a library for each one that torch asks for and the system lacks: every
function in it returns an error, and torch reports that there is no GPU. Needs gcc and binutils.
"""

import argparse
import importlib.util
import re
import subprocess
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE of the driver
FOREIGN = re.compile(r"(cu|nv|nccl|pnccl|__cuda|__nv|CUPTI)")
SYSTEM = re.compile(r"ld-linux|lib(c|dl|gcc_s|m|pthread|rt|stdc\+\+|util)\.so")


def output(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(files: list[Path]) -> tuple[set[str], dict[str, str], dict[str, str]]:
    """Return the libraries needed, the owner of each version, the version of each symbol needed."""
    needed, owners, undefined, defined = set(), {}, {}, set()
    for file in files:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-W", "-d", file)))
        for line in output("readelf", "-W", "-V", file).splitlines():
            if found := re.search(r"Version: 1\s+File: (\S+)", line):
                library = found[1]
            elif found := re.search(r"Name: (\S+)\s+Flags", line):
                owners[found[1]] = library
        for line in output("nm", "-D", file).splitlines():
            *_, kind, symbol = line.split()
            name, _, version = symbol.partition("@")
            if kind not in "Uw":
                defined.add(name)
            elif FOREIGN.match(name):
                undefined[name] = version.lstrip("@")
    return needed, owners, {n: v for n, v in undefined.items() if n not in defined}


def write(library: Path, symbols: dict[str, set[str]]) -> None:
    """Compile a library that defines symbols, by version; the version "" is none."""
    names = sorted({name for some in symbols.values() for name in some})
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names)
    script = library.with_suffix(".map")
    script.write_text(
        "".join(
            f"{version} {{ global: {' '.join(f'{name};' for name in sorted(some))} }};\n"
            for version, some in symbols.items()
            if version
        )
    )
    options = [f"-Wl,--version-script,{script}"] if script.stat().st_size else []
    command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", *options]
    subprocess.run([*command, "-o", library, "-xc", "-"], input=source, text=True, check=True)
    script.unlink()


def main() -> None:
    """Write the libraries that the installed torch lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the libraries")
    folder = parser.parse_args().folder
    torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    needed, owners, undefined = read(sorted(torch.glob("*.so*")))
    here = output("ldconfig", "-p")
    missing = {
        name
        for name in needed
        if not (torch / name).exists() and not SYSTEM.match(name) and f"\t{name} " not in here
    }
    folder.mkdir(parents=True, exist_ok=True)
    for library in sorted(missing):
        symbols = defaultdict(set, {v: set() for v, owner in owners.items() if owner == library})
        for name, version in undefined.items():
            # A symbol without a version is in no library by name: any one that is loaded will do.
            if owners.get(version, library) == library:
                symbols[version].add(name)
        write(folder / library, symbols)
    print(f"wrote {len(missing)} libraries to {folder}")


if __name__ == "__main__":
    main()
