"""``internevo plan``: finds the fastest layouts for a config on a cluster, without that cluster."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.write import check_own, check_writable, write_config
from ..errors import UsageError
from ..observe.units import amount
from ..parallel.launcher import local_world_size, read_launcher
from ..train.config import load_config
from ..wording import counted
from .launch import default_processes, launch

if TYPE_CHECKING:  # these import PyTorch, which takes seconds
    from ..planner.search import Candidate, Search

FRONT = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
"""Shares of the limit whose fastest layouts are in the picture."""


@dataclass(frozen=True)
class Question:
    """What is asked besides the config."""

    gpus: int
    gpu: str
    nodes: int | None = None
    calibration: Path | None = None
    memory: int | None = None
    """Bytes that a rank may have."""
    tokens: float | None = None
    imbalance: float = 1.0
    out: Path | None = None
    picture: Path | None = None
    json: bool = False


def plan(path: Path, overrides: list[str], question: Question) -> None:
    """Prints the fastest layouts of a config, and writes the first one and a picture if that is asked for.

    Raises:
        UsageError: if something that was asked for cannot be, or no layout is legal or fits.
    """
    for file, check in ((question.out, check_writable), (question.picture, _check_picture)):
        if file is not None:
            check(file)
    config = load_config(path, overrides)
    from ..planner.plan import plan as find

    found = find(
        config, question.gpus, question.gpu, nodes=question.nodes, calibration=question.calibration,
        memory_limit=question.memory, imbalance=question.imbalance,
    )  # fmt: skip
    search, best, own = found.search, found.best, found.own
    if not best:
        raise UsageError(_nothing(search, question.gpus))
    if question.json:
        print(json.dumps(_json(best, own, search, question), indent=1))
    else:
        print("\n".join(_text(best, own, search, question)))
    _write(best, own, search, question)


def _text(best: list[Candidate], own: Candidate | list[str], search: Search, question: Question) -> list[str]:
    from ..planner import report

    gpu, decoder = search.gpu, search.decoder
    seq_len, rows = search.config.data.seq_len, search.rows
    lines = [
        f"{search.config.JOB_NAME}: {amount(decoder.parameters())} parameters, {counted(rows, 'row')} of {seq_len:,} tokens "
        f"a step = {rows * seq_len:,} tokens",
        f"{search.world:,} x {gpu.name} ({gpu.gpus_per_node} in a node), {search.limit / 2**30:.1f} of {gpu.memory_gib:g} GiB "
        "may be used, " + (f"calibration {question.calibration}" if question.calibration else "calibration: defaults"),
        "",
        *report.table(best),
    ]
    if isinstance(own, list):
        lines += [
            f"  the config's own layout cannot be trained on {counted(search.world, 'GPU')}:",
            *(f"    {line}" for line in own),
        ]
    else:
        fits = "" if own.memory.total <= search.limit else " (does not fit)"
        lines += [report.table([own], "own")[0] + fits]
    lines += ["", "1  " + "\n".join(report.in_full(best[0], gpu, search.calibration, search.limit, question.tokens))]
    if len(best) > 1:
        lines += ["", "Why 1 is faster than 2:", *report.why(best[0], best[1], gpu, search.calibration)]
    return lines


def _json(best: list[Candidate], own: Candidate | list[str], search: Search, question: Question) -> dict[str, Any]:
    from ..planner.report import to_dict, why

    def values(candidate: Candidate) -> dict[str, Any]:
        return to_dict(candidate, search.gpu, search.calibration, question.tokens)

    gpu, calibration = search.gpu, search.calibration
    reasons = [line.strip() for line in why(best[0], best[1], gpu, calibration)] if len(best) > 1 else []
    return {
        "name": search.config.JOB_NAME, "parameters": search.decoder.parameters(), "gpus": search.world,
        "gpu": gpu.name, "machine": asdict(gpu), "calibration": asdict(calibration), "limit": search.limit,
        "rows": search.rows, "seq_len": search.config.data.seq_len,
        "best": [values(candidate) for candidate in best], "why": reasons,
        "own": {"problems": own} if isinstance(own, list) else {**values(own), "fits": own.memory.total <= search.limit},
    }  # fmt: skip


def _write(best: list[Candidate], own: Candidate | list[str], search: Search, question: Question) -> None:
    from ..planner.picture import draw
    from ..planner.report import describe

    where = sys.stderr if question.json else sys.stdout
    if question.out is not None:
        about = f"{describe(best[0].choice)}, for {search.world} x {search.gpu.name}"
        write_config(best[0].choice.apply(search.config, search.rows), question.out, f"{about}.")
        print(f"\nwritten to {question.out}: the config with layout 1", file=where)
    if question.picture is not None:
        front = [c for share in FRONT for c in replace(search, limit=int(search.limit * share)).best(1)]
        title = f"{search.config.JOB_NAME} on {search.world:,} x {search.gpu.name}: memory against throughput, predicted"
        picture = draw(title, front, best, None if isinstance(own, list) else own, search.limit)
        question.picture.parent.mkdir(parents=True, exist_ok=True)
        question.picture.write_text(PICTURE + picture, encoding="utf-8")
        print(f"written to {question.picture}: memory against throughput", file=where)


PICTURE = "<!-- Written by internevo plan -->\n"


def _check_picture(path: Path) -> None:
    if path.suffix != ".svg":
        raise UsageError(f"{path}: a picture is an SVG file; give it a name that ends with .svg")
    check_own(path, PICTURE, "a picture that internevo plan has written")


def _nothing(search: Search, gpus: int) -> str:
    """Says why no layout is there: none is legal, or none fits, and what would help."""
    from ..planner.report import GIB, describe, memory_parts

    least = search.least()
    if least is None:
        ramp = search.config.data.rampup_batch_size
        also, or_ramp = (f" (and each of the ramp-up {ramp!r})", " or data.rampup_batch_size") if ramp else ("", "")
        return (
            f"no layout of {counted(gpus, 'GPU')} can have a global batch of {counted(search.rows, 'row')}: "
            f"{search.rows}{also} must be a multiple of the number of data ranks, which is the number of GPUs divided by those "
            "of the pipeline and tensor axes; change "
            f"--gpus or data.global_batch_size{or_ramp}"
        )
    lacking = least.memory.total - search.limit
    parts = ", ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in memory_parts(least).items())
    return (
        f"no layout fits: {lacking:,} bytes ({lacking / GIB:.1f} GiB) are missing on each GPU. The one that needs the least,\n"
        f"  {describe(least.choice)},\n"
        f"needs {least.memory.total / GIB:.1f} GiB on its most loaded rank ({parts}); {search.limit / GIB:.1f} GiB may be "
        "used.\n"
        f"It would fit {', or '.join(_what_helps(least, search))}"
    )


def _what_helps(least: Candidate, search: Search) -> Iterator[str]:
    """Yields what can make the layout that needs the least memory fit: not what would save less than is missing."""
    from ..planner.hardware import GPUS
    from ..planner.plan import RESERVE
    from ..planner.report import GIB, memory_parts

    lacking, parts = least.memory.total - search.limit, memory_parts(least)
    large = least.memory.total / GIB / (1 - RESERVE)
    yield "with more GPUs"
    larger = [gpu for gpu in GPUS.values() if gpu.memory_gib >= large]
    if least.memory.total <= search.gpu.memory_gib * GIB * (1 - RESERVE):
        yield f"with --memory {math.ceil(least.memory.total / GIB)}GiB"
    elif larger:
        example = min(larger, key=lambda gpu: gpu.memory_gib).name
        yield f"with GPUs of at least {large:.0f} GiB (for example --gpu {example})"
    if lacking < parts["activations"] + parts["temporary buffers"]:  # what grows with the length of a row
        yield "with a shorter data.seq_len"
    if search.config.hybrid_zero_optimizer.grad_dtype == "float32" and lacking < parts["weights and gradients"] / 2:
        yield "with hybrid_zero_optimizer.grad_dtype = 'bfloat16'"


MEASURED = "Measured by internevo plan --calibrate"


def calibrate(out: Path, gpu: str | None, processes: int | None) -> int:
    """Measures this machine, and writes the calibration to a file. For a GPU that is not in the table, or a CPU, it also writes
    a file that describes it.

    Args:
        out: the file of the calibration.
        gpu: whose peaks the measurements are compared with; None: those of the GPU that is found.
        processes: number of local processes, if no launcher has started this one; None: one per GPU, or 1.

    Returns:
        The exit code.
    """
    from ..planner import hardware

    described = out.with_name(f"{out.stem}-gpu.toml")
    for path in (out, described):
        check_own(path, f"# {MEASURED}", "what internevo plan --calibrate has written")
    given = hardware.find(gpu) if gpu else None
    info = read_launcher(os.environ)
    if info.address is None:
        processes = processes or default_processes()
        if processes > 1:
            arguments = ["plan", "--calibrate", "--out", str(out), *(["--gpu", gpu] if gpu else [])]
            with tempfile.TemporaryDirectory() as log:
                return launch(arguments, processes, Path(log))
    from ..parallel.world import join
    from ..planner import calibrate as measuring

    with join(info) as world:
        if given in hardware.GPUS.values() and world.device.type != "cuda":
            raise UsageError(f"--gpu {gpu}: this machine has no GPU that could be compared with its peaks; leave out --gpu")
        measured = measuring.measure(world, local_world_size(os.environ) if info.address else 1)
        if world.rank == 0:
            known = given or measuring.known_gpu(world.device)
            machine = known or measuring.as_gpu(measured, world.device)
            found = measuring.calibration(measured, machine)
            of = counted(world.size, "process")
            print("\n".join([f"{machine.name}, {of}", *measuring.lines(measured, machine, found)]))
            out.parent.mkdir(parents=True, exist_ok=True)
            about = f"{MEASURED}: {machine.name}, {of}"
            found.save(out, about)
            name = machine.name if known else str(described)
            if known is None:
                hardware.save(
                    machine, described, f"{about}.\nPeaks are what was reached; links without a measurement are a guess."
                )
                print(f"written to {described}: the GPU, which is not in the table; correct what the maker says about it")
            print(f"written to {out}: use it with internevo plan CONFIG --gpus N --gpu {name} --calibration {out}")
    return 0
