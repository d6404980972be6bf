"""The collectives of a step are those of the strategies' formulas: kinds, groups, counts and bytes."""

import gzip
import json
import math

import pytest

from internevo.config import load_config
from internevo.models.decoder import parameter_shapes
from internevo.models.families.registry import decoder_config
from internevo.parallel import isp, tensor
from internevo.parallel.layout import Layout
from tests.conftest import run, write_config, write_dataset
from tests.parallel.layouts import layout

MICRO_BATCHES, TOKENS = 3, 32


def counted(pool, tmp_path, processes, changes):
    """Rows of comm.json by (kind, axis), and the config's decoder and layout."""
    dataset = write_dataset(tmp_path / "data")
    ranks = processes // changes["parallel__tensor"]["size"]
    path = write_config(
        tmp_path, dataset, "run", **{"model__vocab_size": 96 + 4, "data__total_steps": 2, "ckpt__enable_save_ckpt": False,
        "monitor__comm": True, **changes, "data__micro_bsz": 1, "data__global_batch_size": MICRO_BATCHES * ranks},
    )  # fmt: skip
    pool.train(path, processes)
    config = load_config(path)
    rows = json.loads((tmp_path / "run" / "comm.json").read_text())
    found = {(row["kind"], row["axis"]): (row["count"], row["nbytes"]) for row in rows}
    return found, decoder_config(config.model_type, config.model), Layout.of(config, processes)


def times(rows, number):
    return {(row.kind, row.axis): (row.count * number, row.nbytes * number) for row in rows}


@pytest.mark.parametrize(("mode", "recomputed"), [("mtp", False), ("msp", False), ("fsp", True)])
def test_tensor_modes_move_what_their_table_says(pool, tmp_path, mode, recomputed):
    found, decoder, _ = counted(pool, tmp_path, *layout(4, mode, 2, model__checkpoint=recomputed))
    rows = tensor.traffic(decoder, mode, 2, TOKENS, 4, decoder.num_layers if recomputed else 0)
    mine = {key: value for key, value in found.items() if key[1] == "tensor"}
    wanted = times(rows, MICRO_BATCHES)
    if mode != "mtp":  # gradients of norms, once per step
        count, nbytes = mine.pop(("all-reduce", "tensor"))
        norms = (2 * decoder.num_layers + 1) * decoder.hidden_size * 4
        assert count == 1 and nbytes == norms // 2  # this rank's half under ZeRO
    if recomputed:  # nothing of a layer is needed behind its last linear: the second forward stops there
        assert mine[("all-gather", "tensor")] == wanted[("all-gather", "tensor")]
    else:
        assert mine == wanted


@pytest.mark.parametrize(("t", "w", "recomputed"), [(1, 2, False), (2, 4, False), (4, 2, True)])
def test_isp_moves_what_its_table_says(pool, tmp_path, t, w, recomputed):
    changes = layout(4, "isp", t, w, weights={"overlap": True}, model__checkpoint=recomputed)
    found, decoder, _ = counted(pool, tmp_path, *changes)
    wanted = times(isp.traffic(decoder, t, w, TOKENS, 4, decoder.num_layers if recomputed else 0), MICRO_BATCHES)
    assert {key: found[key] for key in wanted} == wanted
    # Gradients of norms once per step; losses and counts once per step, over the world, which may be the weight group.
    assert found[("all-reduce", "weight")][0] == (2 if w == 4 else 1)


@pytest.mark.parametrize(("zero", "fsdp"), [(-1, False), (2, False), (2, True)])
@pytest.mark.parametrize("inner", [1, 2])
def test_the_data_axis_moves_what_its_table_says(pool, tmp_path, zero, fsdp, inner):
    """ZeRO-1.5: every weight gathered and every gradient scattered once per step. FSDP: twice and once per micro-batch."""
    found, decoder, spread = counted(pool, tmp_path, *layout(4, "mtp", inner, zero=zero, fsdp=fsdp))
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(decoder).items()}
    whole = sum(n for name, n in sizes.items() if "norm" in name)
    nbytes = 4 * (whole + (sum(sizes.values()) - whole) // inner)
    units, passes = decoder.num_layers + 2, MICRO_BATCHES if fsdp else 1
    axis = "zero"
    assert found[("all-gather", axis)] == (units * passes * (2 if fsdp else 1), nbytes * passes * (2 if fsdp else 1))
    assert found[("reduce-scatter", axis)] == (units * passes, nbytes * passes)
    if spread.replicate > 1:
        assert found[("all-reduce", "replicate")] == (units * passes, nbytes * passes // spread.zero)
    world = "zero" if spread.zero == 4 else "data" if spread.data == 4 else "world"
    assert found[("all-reduce", world)][0] == 1  # losses, counts, the norm, requests to stop: one message


def test_the_console_shows_the_table(tmp_path):
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), **layout(2, "msp", 2)[1], model__vocab_size=100,
                        data__total_steps=2, monitor__comm=True)  # fmt: skip
    lines = run("train", path, "--nproc", 2).stdout.splitlines()
    assert any(line.split()[:3] == ["reduce-scatter", "tensor", "2"] for line in lines)


@pytest.mark.parametrize(
    ("unit", "fsdp", "compiled"),
    [
        ("layer", False, False),
        ("module", False, False),
        ("layer", True, False),
        ("module", True, False),
        ("layer", False, True),
    ],
)
def test_isp_gathers_weights_before_they_are_needed(pool, tmp_path, unit, fsdp, compiled):
    """Also in the first pass of a step, when the data axis gathers the weights as well."""
    weights = {"overlap": True, "forward_overlap_per": unit}
    processes, changes = layout(4, "isp", 1, 2, fsdp=fsdp, weights=weights, model__num_layers=4, monitor__trace=True)
    dataset = write_dataset(tmp_path / "data")
    more = {"data__total_steps": 3, "ckpt__enable_save_ckpt": False, "data__micro_bsz": 3, "model__vocab_size": 100,
            "model__compile": compiled}  # fmt: skip
    pool.train(write_config(tmp_path, dataset, "run", **{**changes, **more}), processes)
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    signs = {"all_gather_into_tensor": "g", "all_gather_into_tensor_coalesced": "g", "wait_tensor": "w"}
    signs = {f"_c10d_functional::{name}": sign for name, sign in signs.items()} | {"aten::mm": "."}
    events = sorted((event["ts"], signs[event["name"]]) for event in trace if event.get("name") in signs)
    order = "".join(sign for _, sign in events)
    if unit == "layer":  # in every layer but the last all of the next one's
        assert order.count("gggg") == 3, order
    else:  # always the next one; two at once only where a pass begins
        assert order.count("gg") == 2, order
