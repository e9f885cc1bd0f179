"""The names of NCSNv2's tensors in the released code of its paper and in score_sde."""

from ..networks.ncsnv2 import NCSNv2

# The network for 256 pixels came last, its new level was given a number between the old ones.
_NUMBERS = {
    4: ("1", "2", "3", "4"),
    5: ("1", "2", "3", "4", "5"),
    6: ("1", "2", "3", "31", "4", "5"),
}
_REFINEMENT_NUMBERS = {**_NUMBERS, 6: ("1", "2", "31", "3", "4", "5")}


def ncsnv2_keys(network: NCSNv2) -> dict[str, str]:
    """Say what the tensors of a network are called in a released state dict.

    The released buffer ``sigmas`` is part of our configuration, not of our state.

    Args:
        network: The network.

    Returns:
        Released names by the names of our tensors.

    Raises:
        ValueError: If the number of levels is not a released one.
    """
    count = len(network.levels)
    if count not in _NUMBERS:
        raise ValueError(f"expected a network of 4, 5 or 6 levels, got {count}")
    modules = {"input": "begin_conv", "norm": "normalizer", "output": "end_conv"}
    for i, number in enumerate(_NUMBERS[count]):
        for j in range(2):
            modules |= _block(f"levels.{i}.{j}", f"res{number}.{j}", network)
    for i, number in enumerate(_REFINEMENT_NUMBERS[count]):
        modules |= _refinement(f"refinements.{i}", f"refine{number}")
    keys = {}
    for key in network.state_dict():
        module, _, part = key.rpartition(".")
        keys[key] = f"{modules[module]}.{part}"
    return keys


def _block(ours: str, theirs: str, network: NCSNv2) -> dict[str, str]:
    inner = ".conv" if network.get_submodule(ours).pools else ""
    return {
        f"{ours}.norm_1": f"{theirs}.normalize1",
        f"{ours}.conv_1": f"{theirs}.conv1",
        f"{ours}.norm_2": f"{theirs}.normalize2",
        f"{ours}.conv_2": f"{theirs}.conv2{inner}",
        f"{ours}.shortcut": f"{theirs}.shortcut{inner}",
    }


def _refinement(ours: str, theirs: str) -> dict[str, str]:
    modules = _units(f"{ours}.units", f"{theirs}.output_convs")
    for i in range(2):
        modules |= _units(f"{ours}.adapt.{i}", f"{theirs}.adapt_convs.{i}")
        modules[f"{ours}.fuse.{i}"] = f"{theirs}.msf.convs.{i}"
        modules[f"{ours}.pooling.convs.{i}"] = f"{theirs}.crp.convs.{i}"
    return modules


def _units(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{i}.conv_{j}": f"{theirs}.{i + 1}_{j}_conv" for i in range(3) for j in (1, 2)}
