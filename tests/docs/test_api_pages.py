"""The API pages name every public object, and every snippet on a page is executed."""

import re
from collections import Counter
from pathlib import Path

import diffusionkit
import diffusionkit.calibration
import diffusionkit.checkpoints
import diffusionkit.control
import diffusionkit.data
import diffusionkit.diagnostics
import diffusionkit.distributed
import diffusionkit.interop
import diffusionkit.metrics
import diffusionkit.networks
import diffusionkit.ops
import diffusionkit.random
import diffusionkit.testing

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(
    r"^\.\. (?:currentmodule:: (?P<module>\S+)|auto(?:class|function|exception):: (?P<name>\S+))",
    re.MULTILINE,
)


def documented() -> list[str]:
    names = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        module = None
        for match in DIRECTIVE.finditer(page.read_text(encoding="utf-8")):
            if match["module"]:
                module = match["module"]
            else:
                names.append(f"{module}.{match['name']}")
    return names


def public() -> list[str]:
    modules = (
        diffusionkit,
        diffusionkit.calibration,
        diffusionkit.checkpoints,
        diffusionkit.control,
        diffusionkit.data,
        diffusionkit.diagnostics,
        diffusionkit.distributed,
        diffusionkit.interop,
        diffusionkit.likelihood,
        diffusionkit.metrics,
        diffusionkit.models,
        diffusionkit.networks,
        diffusionkit.ops,
        diffusionkit.random,
        diffusionkit.sampling,
        diffusionkit.sde,
        diffusionkit.testing,
        diffusionkit.training,
    )
    # A name exported by the package itself is documented under that name only.
    return [
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if name != "Generators"  # a type alias
        if module is diffusionkit or getattr(diffusionkit, name, None) is not getattr(module, name)
    ]


def test_every_public_name_is_on_an_api_page() -> None:
    assert sorted(set(public()) - set(documented())) == []


def test_every_name_on_an_api_page_is_public_and_there_once() -> None:
    assert sorted(set(documented()) - set(public())) == []
    assert [name for name, times in Counter(documented()).items() if times > 1] == []


def test_every_python_snippet_is_executed() -> None:
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        # Programs of other libraries run where these are installed: test_coming_from.py.
        if not {"_build", "coming_from"} & set(page.parts):
            fences = re.findall(r"^```\{?([^\s}]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert not {"python", "py", "pycon"} & set(fences), page
