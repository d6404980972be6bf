"""The answers to lm-eval's requests are those that transformers computes for each request alone. lm-eval itself is not needed:
a small package of the same shape takes its place."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import internevo
from internevo.errors import ConfigError, UsageError
from internevo.inference.tasks import Requests, _sampling, run_tasks
from internevo.inference.text import TextModel
from internevo.models.config import DecoderConfig
from internevo.text.tokenizer import Tokenizer, train_bpe
from internevo.train.check import check
from tests.conftest import random_model, tiny, write_dataset

FAKE = {
    "__init__.py": """
        from types import SimpleNamespace
        from .api.model import LM

        def simple_evaluate(model, tasks, num_fewshot, limit, task_manager, log_samples, apply_chat_template):
            assert isinstance(model, LM) and model.rank == 0 and model.world_size == 1 and model.ready
            texts = ["the cat", "a mat", "purred and sat"][:limit]
            ask = lambda *pairs: [SimpleNamespace(args=pair) for pair in pairs]
            found = model.loglikelihood(ask(*((text, " on") for text in texts)))
            answers = model.generate_until(ask(*((text, {"until": ["\\\\n"], "max_gen_toks": 3}) for text in texts)))
            values = {"acc,none": sum(value for value, _ in found), "acc_stderr,none": "N/A", "f1,strict": float(len(answers))}
            return {"results": {task: {"alias": task, **values} for task in tasks}}
    """,
    "tasks.py": """
        class TaskManager:
            def __init__(self, include_path=None):
                self.names = {"arc", "own"} if include_path else {"arc"}

            def match_tasks(self, names):
                return [name for name in names if name in self.names]
    """,
    "api/__init__.py": "",
    "api/model.py": """
        class LM:
            rank, world_size = 0, 1

            def __init__(self):
                self.ready = True
    """,
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import textwrap

    for name, text in FAKE.items():
        path = tmp_path / "packages" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "lm_eval"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]
    sys.modules.update(loaded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    train_bpe(["the cat sat on the mat and purred\n"] * 9, 280, folder / "tokenizer")
    model = random_model(DecoderConfig("LLAMA2", 300, 24, 40, 2, 4, 2, 6, max_position_embeddings=32))
    internevo.save_hf(model, folder / "hf", tokenizer=folder / "tokenizer")
    return folder / "hf"


def load(folder: Path) -> tuple[Requests, Any, Tokenizer]:
    loader: Any = transformers.AutoModelForCausalLM
    text = TextModel.open(folder)
    return Requests(text, 3, 40), loader.from_pretrained(folder, dtype=torch.float32), text.tokenizer


def ask(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


@torch.no_grad()
def reference(model: Any, ids: list[int], count: int) -> tuple[float, bool]:
    """The log-likelihood of the last ``count`` ids, and whether each is the most likely one."""
    scores = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-count:]
    wanted = torch.tensor(ids[-count:])
    return float(scores[torch.arange(count), wanted].sum()), bool((scores.argmax(-1) == wanted).all())


def test_log_likelihoods_of_pairs_are_those_of_transformers(folder: Path) -> None:
    requests, model, tokenizer = load(folder)
    context = tokenizer.encode("the cat")
    best = int(model(torch.tensor([context])).logits[0, -1, :280].argmax())
    pairs = [("the cat", " sat on"), ("the cat ", "sat on"), ("a", " mat"), ("", "purred"), ("!" * 60, " on the mat")]
    found = requests.loglikelihood(ask(*pairs, ("the cat", tokenizer.decode([best]))))
    for (before, after), (value, greedy) in zip(pairs, found, strict=False):
        whole = tokenizer.encode(before + after) if before else [tokenizer.eos_id or 0, *tokenizer.encode(after)]
        count = len(whole) - (len(tokenizer.encode(before.rstrip())) if before else 1)
        wanted = reference(model, whole[-33:], count)
        assert value == pytest.approx(wanted[0], rel=1e-4) and greedy == wanted[1]
    assert found[0] == pytest.approx(found[1])  # the space belongs to the continuation
    if tokenizer.encode("the cat" + tokenizer.decode([best])) == [*context, best]:
        assert found[-1][1] is reference(model, [*context, best], 1)[1]


def test_an_empty_continuation_is_certain(folder: Path) -> None:
    requests, *_ = load(folder)
    pairs = [("the cat", ""), ("", ""), ("a", " mat"), ("the cat ", "")]
    empty, nothing, other, space = requests.loglikelihood(ask(*pairs))
    assert empty == nothing == (0.0, True)
    for found, pair in ((other, ("a", " mat")), (space, ("the cat", " "))):
        assert found[0] == pytest.approx(requests.loglikelihood(ask(pair))[0][0], rel=1e-5)
    assert requests.loglikelihood_rolling(ask(("",))) == [0.0]


def test_rolling_log_likelihoods_predict_each_token_once_with_the_most_context(folder: Path) -> None:
    requests, model, tokenizer = load(folder)
    texts = ["the cat", "the cat sat on the mat and purred " * 4, ""]
    found = requests.loglikelihood_rolling(ask(*((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        ids, total = tokenizer.encode(text), 0.0
        whole = [tokenizer.eos_id or 0, *ids]
        for done in range(0, len(ids), 32):  # the model sees 32 tokens
            end = min(done + 32, len(ids))
            total += reference(model, whole[max(0, end - 32) : end + 1], end - done)[0]
        assert value == pytest.approx(total, rel=1e-4)


def test_texts_are_generated_until_a_stop_text_as_by_transformers(folder: Path) -> None:
    requests, model, tokenizer = load(folder)
    contexts = ["the cat", "a mat and", "purred", "on the cat sat"]
    limits = [9, 3, 7, 5]
    found = requests.generate_until(
        ask(
            *(
                (text, {"until": ["\n"], "max_gen_toks": n, "do_sample": False})
                for text, n in zip(contexts, limits, strict=True)
            )
        )
    )
    for context, limit, text in zip(contexts, limits, found, strict=True):
        prompt = torch.tensor([tokenizer.encode(context)])
        ids = model.generate(
            prompt, max_new_tokens=limit, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0,
            suppress_tokens=list(range(tokenizer.vocab_size, 300)),
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        whole = tokenizer.decode([id_ for id_ in ids if id_ != tokenizer.eos_id])
        assert text == whole.partition("\n")[0]
    stop = found[0][2:4]
    assert (
        requests.generate_until(ask((contexts[0], {"until": stop, "max_gen_toks": 9})))[0] == found[0][: found[0].index(stop)]
    )


def test_sampling_follows_the_options_of_a_task() -> None:
    assert _sampling({}).temperature == _sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert _sampling({"do_sample": True}).temperature == 1 and _sampling({"temperature": 0.7}).temperature == 0.7
    assert _sampling({"do_sample": True, "top_p": 0.5, "top_k": 3}).top_p == 0.5


@pytest.mark.usefixtures("fake")
def test_scores_of_tasks_have_their_metrics_by_name(folder: Path, tmp_path: Path) -> None:
    requests, _, _ = load(folder)
    before = torch.rand(1)
    torch.manual_seed(3)
    found = run_tasks(requests, ["arc", "own"], tmp_path, limit=2)
    assert found["arc"].keys() == {"acc", "f1 (strict)"} == found["own"].keys() and found["arc"]["f1 (strict)"] == 2
    after = torch.rand(1)
    torch.manual_seed(3)
    assert after == torch.rand(1) != before  # the random numbers of whoever calls it are the same as without
    with pytest.raises(UsageError, match="lm-eval has no task own, what; the folder"):
        run_tasks(requests, ["arc", "own", "what"])
    with pytest.raises(UsageError, match="the folder of tasks .* does not exist"):
        run_tasks(requests, ["arc"], tmp_path / "nothing")
    result = internevo.evaluate(folder, tasks=["arc"], limit=2)
    assert result.tasks["arc"] == pytest.approx(found["arc"]) and result.data is None


@pytest.mark.usefixtures("fake")
def test_a_run_evaluates_on_tasks_with_the_numbers_of_its_checkpoint(tmp_path: Path) -> None:
    train_bpe(["the cat sat on the mat and purred\n"] * 9, 280, tmp_path / "tokenizer")
    changes = {
        "model__vocab_size": 280, "data__train_folder": str(write_dataset(tmp_path / "data")), "data__total_steps": 3,
        "data__tokenizer_path": str(tmp_path / "tokenizer"), "monitor__tasks": ["arc"], "monitor__evaluate_every": 2,
        "ckpt": {"save_ckpt_folder": str(tmp_path / "run")},
    }  # fmt: skip
    run = internevo.train(internevo.load_config(tiny(**changes)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "tasks" in row] == [2, 3]
    assert rows[-1]["tasks"]["arc"] == pytest.approx(internevo.evaluate(run, tasks=["arc"]).tasks["arc"], rel=1e-5)


def test_tasks_without_lm_eval_or_a_tokenizer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(write_dataset(tmp_path / "data"))
    monkeypatch.setattr("internevo.train.check.find_spec", lambda name: None if name == "lm_eval" else object())
    config = internevo.load_config(tiny(data__train_folder=data, monitor__tasks=["arc"]))
    with pytest.raises(ConfigError, match=r"(?s)monitor\.tasks needs data\.tokenizer_path.*needs the package lm-eval"):
        check(config, 1)
