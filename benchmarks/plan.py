"""The planner against measurements that others published: ``python benchmarks/plan.py --measurements FILE.csv``.

One calibration is fitted for each pair of source and GPU, by least squares on the logarithms of the errors. No row is predicted
with a calibration that has seen it: the rows of a pair are dealt into folds, and each fold is predicted with a calibration of
the others. ``--together`` makes it harder: a model, or a number of GPUs, is predicted with a calibration that has only seen
others. Few rows say little about ten numbers, so that each fit is drawn to a calibration of the rows of all other pairs, those
of the same GPU above all.

``--folds 0`` fits and predicts the same rows: what the formulas could reach at best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import plan_pictures as pictures
import published
from published import Measured

from internevo.parallel.layout import Layout
from internevo.planner import counts, memory, step
from internevo.planner.calibration import EFFICIENCIES, Calibration
from internevo.planner.job import Job

SPREAD = {"launch": 0.5, "step": 1.0, "hop_inside": 0.5, "hop_across": 1.0}
"""How far the logarithm of a number may move, in one standard deviation; of the others: 0.3."""
NOISE = 0.03
"""Of a measurement, and of the formulas."""
NAMES = [field.name for field in fields(Calibration)]
Array = np.ndarray


@dataclass
class Case:
    """A row, counted once and priced often."""

    measured: Measured
    counted: counts.Counts

    def error(self, calibration: Calibration) -> float:
        """Returns the logarithm of prediction / measurement."""
        return math.log(step.price(self.counted, self.measured.gpu, calibration).tgs / self.measured.tgs)


def to_vector(calibration: Calibration) -> Array:
    """Returns its numbers so that every vector is a calibration: logits of shares, logarithms of seconds."""
    values = [getattr(calibration, name) for name in NAMES]
    return np.array(
        [math.log(v / (1.02 - v)) if n in EFFICIENCIES else math.log(v) for n, v in zip(NAMES, values, strict=True)]
    )


def from_vector(vector: Array) -> Calibration:
    """The inverse of ``to_vector``."""
    values = (
        1.02 / (1 + math.exp(-v)) if n in EFFICIENCIES else math.exp(v) for n, v in zip(NAMES, vector.tolist(), strict=True)
    )
    return Calibration(*(min(v, 1.0) if n in EFFICIENCIES else v for n, v in zip(NAMES, values, strict=True)))


def fit(cases: Sequence[Case], prior: Calibration, spread: float = 1.0, rounds: int = 8) -> Calibration:
    """Returns the calibration with the smallest sum of squared errors and of squared distances to ``prior``.

    Errors are weighed as in Huber's loss, so that a row that fits nothing does not pull at everything (Gauss-Newton steps).
    """
    centre = to_vector(prior)
    widths = np.array([2.0 if n in EFFICIENCIES and n == "overlap" else SPREAD.get(n, 0.6) for n in NAMES]) * spread
    x, damping = centre.copy(), 0.1
    errors = np.array([case.error(prior) for case in cases])

    def cost(errors: Array, x: Array) -> float:
        scaled = np.abs(errors) / NOISE
        huber = np.where(scaled < 2, scaled**2, 4 * scaled - 4)
        return float(huber.sum() + (((x - centre) / widths) ** 2).sum())

    now = cost(errors, x)
    for _ in range(rounds):
        jacobian = np.empty((len(cases), len(x)))
        for column in range(len(x)):
            moved = x.copy()
            moved[column] += 0.02
            near = from_vector(moved)
            jacobian[:, column] = [(case.error(near) - error) / 0.02 for case, error in zip(cases, errors, strict=True)]
        weights = np.sqrt(np.minimum(1.0, 2 * NOISE / np.maximum(np.abs(errors), 1e-9))) / NOISE
        left = np.vstack([jacobian * weights[:, None], np.diag(1 / widths), damping * np.diag(1 / widths)])
        right = np.concatenate([-errors * weights, -(x - centre) / widths, np.zeros(len(x))])
        new = x + np.linalg.lstsq(left, right, rcond=None)[0]
        new_errors = np.array([case.error(from_vector(new)) for case in cases])
        if (then := cost(new_errors, new)) < now:
            done, x, errors, now, damping = now - then < 1e-3 * now, new, new_errors, then, damping / 3
            if done:
                break
        else:
            damping *= 10
    return from_vector(x)


TOGETHER: dict[str, Callable[[Measured], object]] = {
    "row": lambda measured: measured.name,
    "model": lambda measured: measured.row["model"],
    "gpus": lambda measured: measured.job.work.layout.world,
}
"""What can be left out together -> what rows have in common then."""


def folds_of(cases: Sequence[Case], count: int, together: str = "row") -> list[list[int]]:
    """Deals the rows of a pair into folds. Rows that have in common what ``together`` says are in the same one, unless all of
    the pair have it in common."""
    keys = [TOGETHER[together](case.measured) for case in cases]
    known = list(dict.fromkeys(keys))
    if len(known) < 2:
        known = keys = list(range(len(cases)))
    folds: list[list[int]] = [[] for _ in range(min(count, len(known)))]
    for number, key in enumerate(keys):
        folds[known.index(key) % len(folds)].append(number)
    return folds


def cross_validated(
    groups: dict[tuple[str, str], list[Case]], folds: int, together: str, say: Callable[[str], None]
) -> dict[str, float]:
    """Returns row -> the logarithm of prediction / measurement, predicted without the row."""
    errors = dict[str, float]()
    for group, cases in groups.items():
        prior = prior_of(groups, group)
        if folds == 0:
            calibration = fit(cases, prior)
            errors |= {case.measured.name: case.error(calibration) for case in cases}
            say(f"{group}: {calibration}")
            continue
        for fold in folds_of(cases, folds, together):
            seen = [case for number, case in enumerate(cases) if number not in fold]
            calibration = fit(seen, prior) if seen else prior
            errors |= {cases[number].measured.name: cases[number].error(calibration) for number in fold}
    return errors


def prior_of(groups: dict[tuple[str, str], list[Case]], group: tuple[str, str]) -> Calibration:
    """Returns what all other pairs say about a pair: those of the same GPU, drawn to those of all GPUs.

    How much communication hides is a matter of each program, so that others say nothing about it. (Most programs in the table
    hide none, and a fit to all of them ends near 0, where its logit hardly moves any more.)
    """
    others = [case for other, of in groups.items() if other != group for case in _some(of, 6)]
    same = [case for case in others if case.measured.gpu.name.partition("-")[0] == group[1].partition("-")[0]]
    prior = fit(others, Calibration(), 2.0, 4)
    found = fit(same, prior, 1.0, 4) if len(same) >= 3 else prior
    return replace(found, overlap=Calibration().overlap)


def _some(cases: Sequence[Case], count: int) -> list[Case]:
    """Returns ``count`` of them, evenly spaced, so that no source outweighs the others."""
    return [cases[n * len(cases) // count] for n in range(count)] if len(cases) > count else list(cases)


def table(title: str, errors: dict[str, float], key: Callable[[str], str]) -> None:
    """Prints the errors by group: rows, median, 90th percentile, share within 10 %, worst."""
    by = defaultdict[str, list[str]](list)
    for name in errors:
        by[key(name)].append(name)
    print(f"\n{title:<28}{'rows':>5}{'median':>9}{'90 %':>8}{'within 10 %':>13}  worst")
    for group, names in [*sorted(by.items()), ("all", list(errors))]:
        sizes = sorted(abs(math.expm1(errors[name])) for name in names)
        worst = max(names, key=lambda name: abs(math.expm1(errors[name])))
        within = sum(size <= 0.1 for size in sizes) / len(sizes)
        ninety = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
        print(
            f"{group:<28}{len(sizes):>5}{statistics.median(sizes):>9.1%}{ninety:>8.1%}{within:>13.0%}  "
            f"{worst} {math.expm1(errors[worst]):+.0%}"
        )


OWN = ("internevo", "a100")
"""The pair of InternEvo's own table."""


def own_columns(groups: dict[tuple[str, str], list[Case]]) -> dict[int, list[Case]]:
    """Returns number of GPUs -> the rows of InternEvo's table of layouts."""
    columns = defaultdict[int, list[Case]](list)
    for case in groups.get(OWN, []):
        if "pack_sample_into_one=False" in case.measured.row["note"]:
            columns[case.measured.job.work.layout.world].append(case)
    return dict(sorted(columns.items()))


def winners(groups: dict[tuple[str, str], list[Case]]) -> None:
    """Prints, for each number of GPUs of InternEvo's table, the fastest layout, and the one that is predicted to be, with a
    calibration that has seen no row with this number of GPUs."""
    print("\nInternEvo's layouts: GPUs, layouts, the fastest, the one that is predicted to be, what it loses; largest error")
    prior = prior_of(groups, OWN)
    for gpus, rows in own_columns(groups).items():
        if len(rows) < 2:
            continue
        calibration = fit([case for case in groups[OWN] if case.measured.job.work.layout.world != gpus], prior)
        errors = {id(case): case.error(calibration) for case in rows}
        best = max(rows, key=lambda case: case.measured.tgs)
        chosen = max(rows, key=lambda case: case.measured.tgs * math.exp(errors[id(case)]))
        names = [f"tp {of.tensor} zero {of.zero}" for of in (case.measured.job.work.layout for case in (best, chosen))]
        loss, worst = 1 - chosen.measured.tgs / best.measured.tgs, max(abs(math.expm1(e)) for e in errors.values())
        print(f"{gpus:>6}{len(rows):>3}  {names[0]:<15}{names[1]:<15}{loss:>6.1%}{worst:>8.1%}")


def scaling(groups: dict[tuple[str, str], list[Case]]) -> list[pictures.Curve]:
    """Prints throughput per GPU from 8 to 3,072 GPUs: of the best layout in InternEvo's table, and of the one that is predicted
    to be best in this program, with the same model, GPUs and tokens per GPU and step."""
    calibration, columns = fit(groups[OWN], prior_of(groups, OWN)), own_columns(groups)
    example = next(iter(columns.values()))[0].measured
    print("\nscaling: GPUs, the best of InternEvo's table, our best (predicted), what is left of 8 GPUs; its layout")
    measured, predicted = list[tuple[int, float]](), list[tuple[int, float]]()
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072):
        jobs = sorted(_ours(example, gpus), key=lambda job: -step.predict(job, example.gpu, calibration).tgs)
        limit = MOST * example.gpu.memory_gib * 2**30
        job = next(job for job in jobs if memory.most_loaded(job).total < limit)
        tgs, layout, of = step.predict(job, example.gpu, calibration).tgs, job.work.layout, job.work
        predicted.append((gpus, tgs))
        if gpus in columns:
            measured.append((gpus, max(case.measured.tgs for case in columns[gpus])))
        text = f"{measured[-1][1]:>8,.0f}" if gpus in columns else " " * 8
        name = f"tp {layout.tensor} {'FSDP' if layout.fsdp else 'ZeRO-1.5'} {layout.zero}"
        batch = f"{of.micro_batches} micro-batches of {of.tokens // job.seq_len} rows"
        print(f"{gpus:>6}{text}{tgs:>8,.0f}{tgs / predicted[0][1]:>8.1%}  {name}, {batch}")
    return [
        pictures.Curve("InternEvo's table, its best layout: measured", False, measured),
        pictures.Curve("this program, its best layout: predicted", True, predicted),
    ]


def _ours(example: Measured, gpus: int) -> Iterator[Job]:
    """Yields a few layouts with as many tokens per step, whether they fit into memory or not."""
    work, rows = example.job.work, 8  # of 2,048 tokens, for each GPU and step
    choices = itertools.product((1, 2), sorted({8, 16, 32, gpus}), (False, True), (1, 2, 4), (None, 2**29))
    for tensor, zero, fsdp, micro, bucket in choices:
        if zero > gpus // tensor or gpus // tensor % zero or (fsdp and bucket):
            continue
        layout = Layout(gpus, tensor, "fsp" if tensor > 1 else "mtp", 1, 1, zero, fsdp)
        tokens, micro_batches = micro * example.job.seq_len, rows * tensor // micro
        of = replace(work, layout=layout, tokens=tokens, micro_batches=micro_batches, bucket_elements=bucket)
        yield replace(example.job, work=of, overlaps_weights=True)


MOST = 0.9
"""The share of a GPU's memory that a layout may need."""


def worst(errors: dict[str, float], limit: float, known: dict[str, str]) -> None:
    """Prints the rows with the largest errors, and what is known about them."""
    print(f"\nrows that are more than {limit:.0%} off:")
    for name, error in sorted(errors.items()):
        if abs(math.expm1(error)) > limit:
            print(f"  {name:<18}{math.expm1(error):>+6.0%}  {known.get(name, 'not explained')}")


def memories(path: Path, say: bool) -> None:
    """Prints how far predicted memory is from measured memory."""
    errors, reasons = dict[str, float](), Counter[str]()
    for row in published.rows(path):
        if row["metric_memory_gb"]:
            try:
                predicted, measured = published.memory(row)
            except published.NotExpressibleError as reason:
                reasons[str(reason)] += 1
            else:
                errors[row["id"]] = math.log(predicted / measured)
                if say:
                    print(f"{row['id']:<20}{measured / 1e9:>8.1f} GB{math.expm1(errors[row['id']]):>+8.1%}")
    table("memory", errors, lambda name: name.rpartition("-")[0])
    worst(errors, 0.1, published.MEMORY_EXPLANATIONS)
    print(f"\n{reasons.total()} rows of memory do not count:")
    for text, count in reasons.most_common():
        print(f"{count:>6}  {text}")


def draw(folder: Path, errors: dict[str, float], of: dict[str, Measured], groups: dict[tuple[str, str], list[Case]]) -> None:
    """Writes the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    dots = [pictures.Dot(of[name].source, name, of[name].tgs, of[name].tgs * math.exp(error)) for name, error in errors.items()]
    title = f"Training throughput that others measured, and the planner: {len(dots)} rows"
    (folder / "planner-accuracy.svg").write_text(pictures.accuracy(dots, title))
    if OWN in groups:
        title = "A 7B model on A100: 2,048 tokens a row, 16,384 tokens per GPU and step"
        (folder / "planner-scaling.svg").write_text(pictures.scaling(scaling(groups), title))
    print(f"\npictures: {folder}/planner-*.svg")


def main() -> None:
    """Reads the table, fits, predicts and prints."""
    parser = argparse.ArgumentParser(description="Compares the planner with published measurements.")
    parser.add_argument("--measurements", type=Path, required=True, help="CSV file, one measurement a row")
    parser.add_argument("--folds", type=int, default=10, help="folds of the cross-validation; 0: fit and predict the same rows")
    parser.add_argument(
        "--together", choices=TOGETHER, default="row", help="rows of one model, or number of GPUs, are left out together"
    )
    parser.add_argument("--source", default="", help="only sources whose name begins so; the others are still fitted to")
    parser.add_argument("--pictures", type=Path, help="a folder to write pictures to")
    parser.add_argument("--rows", action="store_true", help="print every row")
    arguments = parser.parse_args()
    if not arguments.measurements.is_file():
        sys.exit(f"error: {arguments.measurements} is no file; give the published table with --measurements FILE.csv")
    found, reasons = published.read(arguments.measurements)
    groups = defaultdict[tuple[str, str], list[Case]](list)
    for measured in found:
        groups[measured.group].append(Case(measured, counts.count(measured.job)))
    errors = cross_validated(dict(groups), arguments.folds, arguments.together, print)
    of = {measured.name: measured for measured in found}
    errors = {name: error for name, error in errors.items() if of[name].source.startswith(arguments.source)}
    if arguments.rows:
        for name, error in sorted(errors.items()):
            print(
                f"{name:<20}{of[name].gpu.name:<12}{of[name].row['model']:<22}{of[name].tgs:>10.1f}{math.expm1(error):>+8.1%}"
            )
    table("source and GPU", errors, lambda name: " ".join(of[name].group))
    table("precision", errors, lambda name: of[name].job.precision)
    table("model", errors, lambda name: "experts" if of[name].job.work.decoder.experts else "dense")
    worst(errors, 0.15, published.EXPLANATIONS)
    print(f"\n{len(reasons)} rows do not count:")
    for reason, count in Counter(reasons.values()).most_common():
        print(f"{count:>6}  {reason}")
    if OWN[0].startswith(arguments.source) and OWN in groups:
        winners(dict(groups))
    if arguments.pictures:
        draw(arguments.pictures, errors, of, dict(groups))
    memories(arguments.measurements, arguments.rows)


if __name__ == "__main__":
    main()
