"""Machines by name or from a file: what a GPU can do at most, and what connects the GPUs of a node, and the nodes.

Peaks are those of the makers' data sheets, without sparsity. What is reached of them is a matter of ``Calibration``.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ..errors import UsageError
from . import tomlfile

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class GPU:
    """One GPU."""

    name: str
    bf16_tflops: float
    """Peak of matrix products in bf16 and fp16, in 10^12 FLOPs per second."""
    fp8_tflops: float
    """The same in fp8; 0: it has none."""
    memory_gib: float
    memory_gb_per_s: float
    """Bandwidth of its memory, in 10^9 bytes per second."""
    gpus_per_node: int
    """Number of GPUs that are connected by ``node_gb_per_s``."""
    node_gb_per_s: float
    """What a GPU can send to the others of its node, and receive at the same time (NVLink, PCIe), in 10^9 bytes per second."""
    network_gb_per_s: float
    """What a GPU can send to other nodes, if all of its node do so (InfiniBand, RoCE), in 10^9 bytes per second."""
    watts: float
    """Power that it draws in training."""
    dollars_per_hour: float
    """Price of an hour, with its share of the node. A round number to change: prices differ between sellers, and change."""

    def peak(self, precision: str) -> float:
        """Returns the peak of matrix products in a precision ("bf16" or "fp8"), in FLOPs per second.

        Raises:
            UsageError: if the GPU cannot compute in it.
        """
        tflops = self.fp8_tflops if precision == "fp8" else self.bf16_tflops
        if tflops <= 0:
            raise UsageError(f"{self.name} does not compute in {precision}")
        return tflops * TERA

    def in_world(self, ranks: int) -> GPU:
        """Returns the same in a world of this number of ranks, which may be less than a node has."""
        return self if ranks >= self.gpus_per_node else replace(self, gpus_per_node=ranks)


def _gpu(name: str, bf16: float, fp8: float, gib: float, memory: float, node: float, watts: float, price: float) -> GPU:
    """A GPU in a node of eight, with a network card of 400 Gbit/s for each (A100 and A800: 200 Gbit/s)."""
    return GPU(name, bf16, fp8, gib, memory, 8, node, 25.0 if name.startswith("a") else 50.0, watts, price)


# Data sheets of NVIDIA and AMD: tensor core peaks without sparsity, memory, and NVLink in one direction (half of the print).
_ALL = (
    # name, bf16, fp8, GiB, memory GB/s, NVLink GB/s, W, dollars
    _gpu("a100", 312, 0, 80, 2039, 300, 400, 2.0),
    _gpu("a100-40gb", 312, 0, 40, 1555, 300, 400, 1.5),
    _gpu("a800", 312, 0, 80, 2039, 200, 400, 2.0),
    _gpu("h100", 989.4, 1978.9, 80, 3350, 450, 700, 3.0),
    _gpu("h100-hbm2e", 989.4, 1978.9, 96, 2400, 450, 500, 3.0),
    _gpu("h800", 989.4, 1978.9, 80, 3350, 200, 700, 3.0),
    _gpu("h20", 148, 296, 96, 4000, 450, 400, 1.5),
    _gpu("h200", 989.4, 1978.9, 141, 4800, 450, 700, 3.5),
    _gpu("b200", 2250, 4500, 180, 7700, 900, 1000, 5.0),
    _gpu("b300", 2250, 4500, 270, 7700, 900, 1100, 6.0),
    replace(_gpu("gb200", 2500, 5000, 186, 8000, 900, 1200, 6.0), gpus_per_node=72),
    replace(_gpu("gb300", 2500, 5000, 279, 8000, 900, 1400, 7.0), gpus_per_node=72),
    _gpu("mi300x", 1307.4, 2614.9, 192, 5300, 448, 750, 2.5),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
"""Name -> GPU, in nodes as they are usually built."""

EXAMPLE = "\n".join(
    f"  {key} = {value!r}".replace("'", '"') for key, value in asdict(replace(GPUS["h100"], name="my-h100")).items()
)
"""The format of a file."""


def find(name: str) -> GPU:
    """Returns a GPU by its name, or from a TOML file (a name that ends with ``.toml``).

    Raises:
        UsageError: if there is none of this name, or the file cannot be used. The message says what is possible.
    """
    if name.endswith(".toml"):
        return read(Path(name))
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, 1, 0.4)
    meant = f"; did you mean {near[0]}?" if near else "."
    raise UsageError(
        f"unknown GPU {name!r}{meant} Known are {', '.join(GPUS)}. For any other, write a file NAME.toml:\n{EXAMPLE}"
    )


def read(path: Path) -> GPU:
    """Reads a GPU from a TOML file. Keys that are not there are those of ``based_on``, if the file names a known GPU.

    Raises:
        UsageError: if the file cannot be read, or a key is missing, unknown or not what it must be.
    """
    try:
        values = tomlfile.read(path)
    except ValueError as error:
        raise UsageError(f"{path} cannot be read as a description of a GPU: {error}. The format is\n{EXAMPLE}") from error
    known = [field.name for field in fields(GPU)]
    based_on = values.pop("based_on", None)
    base = asdict(GPUS[based_on.lower()]) if isinstance(based_on, str) and based_on.lower() in GPUS else {}
    wrong = [f"based_on = {based_on!r} must be one of {', '.join(GPUS)}"] if based_on is not None and not base else []
    problems = wrong + [tomlfile.unknown(key, known) for key in values if key not in known]
    values = {"name": path.stem, **base, **values}
    problems += [f"{key} is missing" for key in known if key not in values and not wrong]
    if not (isinstance(values["name"], str) and values["name"] and values["name"].isprintable()):
        problems.append(f"name = {values['name']!r} must be a text in one line")
    for key in known[1:]:
        if key in values:
            least, most = (0 if key in FREE else LEAST), MOST
            whole = key == "gpus_per_node"
            problems.append(tomlfile.wrong_number(key, values[key], 1 if whole else least, most, whole=whole))
    problems = [problem for problem in problems if problem]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UsageError(f"{path} does not describe a GPU:\n{lines}\nThe format is\n{EXAMPLE}")
    return GPU(**values)


def save(gpu: GPU, path: Path, comment: str) -> None:
    """Writes a GPU to a file that ``read`` reads."""
    tomlfile.save(path, asdict(gpu), comment)


FREE = ("fp8_tflops", "watts", "dollars_per_hour")
"""Keys that may be 0."""
LEAST, MOST = 1e-6, 1e9
"""The range of all other numbers, in their units: far beyond any machine."""
