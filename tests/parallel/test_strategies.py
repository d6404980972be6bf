"""Every strategy, and compositions of them, train the model that one process trains; their checkpoints load into any other."""

import itertools
import json
import random

import pytest

from internevo.tokenizer import train_bpe
from tests.conftest import metrics, tensors, write_config, write_dataset

STEADY = {"model__vocab_size": 100, "adam__lr": 2e-3, "data__total_steps": 10}
MODELS = {
    "llama": {},
    "padded": {"data__use_packed_dataset": False, "data__micro_bsz": 2},
    "biased, one key/value head": {"model__no_bias": False, "model__mlp_bias": True, "model__num_kv_attention_heads": 1},
    "gemma": {"model_type": "GEMMA", "model__head_dim": 16, "loss__label_smoothing": 0.1},
    "alibi": {"model_type": "BAICHUAN2", "model__use_alibi": True, "model__num_kv_attention_heads": 4},
    "qwen3, windows": {"model_type": "QWEN3", "model__use_sliding_window": True, "model__sliding_window": 9},
    "internlm2, tied": {"model_type": "INTERNLM2", "model__tie_word_embeddings": True},
}


def layout(mode, tensor, weight=1, zero=-1, fsdp=False, **more):
    return {
        "parallel__tensor": {"size": tensor, "mode": mode}, "parallel__weight": {"size": weight, **more.pop("weights", {})},
        "parallel__zero1": {"size": zero, "fsdp": fsdp}, **more,
    }  # fmt: skip


OVERLAP = {"overlap": True, "forward_overlap_per": "module"}
LAYOUTS = {
    "mtp 2": (2, layout("mtp", 2)),
    "mtp 4, recomputed": (4, layout("mtp", 4, model__checkpoint=True)),
    "mtp 2, zero 2": (4, layout("mtp", 2)),
    "msp 2, no zero": (4, layout("msp", 2, zero=1)),
    "msp 2, fsdp, recomputed": (4, layout("msp", 2, fsdp=True, model__checkpoint=True)),
    "fsp 2, zero 2": (4, layout("fsp", 2)),
    "fsp 4": (4, layout("fsp", 4)),
    "isp: sequence over 2": (2, layout("isp", 2)),
    "isp: weights over 2": (2, layout("isp", 1, 2)),
    "isp 2, weights over 4, overlapped": (4, layout("isp", 2, 4, weights={"overlap": True})),
    "isp 4, weights over 2, overlapped, recomputed": (4, layout("isp", 4, 2, weights=OVERLAP, model__checkpoint=True)),
    "isp 2, weights over 2, zero 2, half recomputed": (4, layout("isp", 2, 2, weights=OVERLAP, model__checkpoint=0.5)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, pool):
    """A folder with a dataset, and the runs of one process, each trained once."""
    folder = tmp_path_factory.mktemp("strategies")
    dataset = write_dataset(folder / "data")

    def one(name):
        path = folder / f"one-{list(MODELS).index(name)}"
        if not path.exists():
            pool.train(write_config(folder, dataset, path.name, **STEADY, **MODELS[name]), 1)
        return path

    return folder, dataset, one


def assert_same(many, one, steps=10):
    rows, wanted = metrics(many), metrics(one)
    assert len(rows) == len(wanted) == steps
    for row, reference in zip(rows, wanted, strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(row[key] - reference[key]) <= 1e-5 * reference[key], (row["step"], key, row[key], reference[key])
    mine, theirs = tensors(many, steps), tensors(one, steps)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 1e-5 * max(1.0, tensor.abs().max()), name


def cases():
    """Every layout with one model, every model with some layouts."""
    yield from ((name, "llama") for name in LAYOUTS)
    draw = random.Random(1)
    for model in list(MODELS)[1:]:
        yield from ((name, model) for name in draw.sample(list(LAYOUTS), 2))


@pytest.mark.parametrize(("name", "model"), cases())
def test_a_strategy_trains_the_model_of_one_process(pool, world, tmp_path, name, model):
    _, dataset, one = world
    processes, changes = LAYOUTS[name]
    pool.train(write_config(tmp_path, dataset, "many", **{**STEADY, **MODELS[model], **changes}), processes)
    assert_same(tmp_path / "many", one(model))


def test_a_run_goes_on_in_other_layouts(pool, world, tmp_path):
    """msp over 4, isp 2 x 4, fsdp over 3, one process, fsp: weights, moments and the place in the data go along."""
    _, dataset, one = world
    parts = [(4, layout("msp", 4)), (4, layout("isp", 2, 4)), (3, layout("mtp", 1, fsdp=True)), (1, {}), (2, layout("fsp", 2))]
    for (processes, changes), steps in zip(parts, itertools.count(2, 2), strict=False):
        path = write_config(tmp_path, dataset, "parts", **{**STEADY, **changes, "data__total_steps": steps,
                            "lr_scheduler__total_steps": 20})  # fmt: skip
        pool.train(path, processes)
    assert_same(tmp_path / "parts", one("llama"))


@pytest.mark.parametrize(
    "name", ["mtp 2", "fsp 2, zero 2", "isp: weights over 2", "isp 2, weights over 2, zero 2, half recomputed"]
)
def test_compiled_layers_train_the_same_in_every_mode(pool, world, tmp_path, name):
    _, dataset, one = world
    processes, changes = LAYOUTS[name]
    path = write_config(tmp_path, dataset, "many", **{**STEADY, **changes, "model__compile": True, "data__total_steps": 3,
                        "lr_scheduler__total_steps": 20, "ckpt__enable_save_ckpt": False})  # fmt: skip
    pool.train(path, processes, timeout=280)
    for row, reference in zip(metrics(tmp_path / "many"), metrics(one("llama")), strict=False):
        for key in ("loss", "grad_norm"):
            assert abs(row[key] - reference[key]) <= 1e-5 * reference[key], (row["step"], key)


@pytest.mark.parametrize("mode", ["msp", "isp"])
def test_samples_are_the_text_of_one_process(pool, world, tmp_path, mode):
    """Generation goes token by token, so sequences are not cut then."""
    _, dataset, _ = world
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer")
    changes = {"model__vocab_size": 300, "data__tokenizer_path": str(tmp_path / "tokenizer"), "data__total_steps": 1,
               "monitor__sample_prompts": ["def "], "monitor__sample_tokens": 12, "ckpt__enable_save_ckpt": False}  # fmt: skip
    pool.train(write_config(tmp_path, dataset, "one", **changes))
    pool.train(write_config(tmp_path, dataset, "many", **changes, **layout(mode, 2, 2 if mode == "isp" else 1)), 2)
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "many")]
    assert texts[0] == texts[1] and json.loads(texts[0])["text"]
