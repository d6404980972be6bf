"""Runs on one process, and how others are compared with them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import metrics, tensors, write_config, write_dataset
from tests.parallel.layouts import COMMON, FAMILIES, MODELS, PADDED, STEPS, layout
from tests.pool import Pool

Runs = tuple[Path, Path, Callable[..., Path]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Runs:
    """A folder, a dataset, and a function that returns the run folder of one process; each model is trained once."""
    folder = tmp_path_factory.mktemp("strategies")
    dataset = write_dataset(folder / "data")

    def one(model: str, packed: bool = True, steps: int = STEPS) -> Path:
        models = {**MODELS, **FAMILIES}
        path = folder / f"one-{list(models).index(model)}-{packed}-{steps}"
        if not path.exists():
            changes = {**COMMON, **layout(1)[1], **models[model], **({} if packed else PADDED), "data__total_steps": steps}
            pool.train(write_config(folder, dataset, path.name, **changes), 1)
        return path

    return folder, dataset, one


def assert_same_rows(many: Path, one: Path, steps: int) -> None:
    """Compares the metrics of the first steps. ``one`` may have more steps."""
    rows, wanted = metrics(many), metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted[:steps]] == list(range(1, steps + 1))
    for row, reference in zip(rows, wanted[:steps], strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(row[key] - reference[key]) <= 1e-5 * reference[key], (row["step"], key, row[key], reference[key])


def assert_same(many: Path, one: Path, steps: int = STEPS) -> None:
    assert_same_rows(many, one, steps)
    mine, theirs = tensors(many, steps), tensors(one, steps)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name
