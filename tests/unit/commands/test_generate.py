"""``internevo generate``: what does not fit the model is refused by name, and only what the tokenizer knows is generated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internevo import save_hf
from internevo.commands.generate import continue_text
from internevo.errors import InternEvoError, UsageError
from internevo.models.config import DecoderConfig, Rope
from internevo.models.decoder import Decoder
from internevo.models.generate import Sampling, empty_caches, generate, longest_text
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.conftest import Run

CONFIG = DecoderConfig("LLAMA2", 300, 16, 32, 1, 2, 2, 8, max_position_embeddings=64)
GREEDY = Sampling(temperature=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny model with a vocabulary of 300, with a tokenizer of 280."""
    return model_in(tmp_path / "model", CONFIG)


def model_in(folder: Path, config: DecoderConfig) -> Path:
    torch.manual_seed(0)
    model = Decoder(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    save_hf(model, folder)
    train_bpe(["the cat sat on the mat and purred"] * 9, 280, folder)
    return folder


def test_a_prompt_beyond_the_models_positions_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="the prompt has 64 tokens, and the model is made for texts of up to 64"):
        continue_text(folder, "!" * 64, 5, GREEDY)
    answer = continue_text(folder, "!" * 61, 5, GREEDY)
    assert "note: at most 3 tokens are generated" in capsys.readouterr().err
    assert answer == continue_text(folder, "!" * 61, 3, GREEDY) and not capsys.readouterr().err


def test_the_scaling_of_the_rotary_embedding_makes_longer_texts_possible() -> None:
    yarn = Rope(kind="yarn", factor=4.0, options={"original_max_position_embeddings": 16})
    linear, dynamic = Rope(kind="linear", factor=4.0), Rope(kind="dynamic", factor=2.0)
    limits = [longest_text(replace(CONFIG, rope=rope)) for rope in (Rope(), yarn, linear, dynamic, None)]
    assert limits == [64, 64, 256, None, None]


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path: Path, folder: Path) -> None:
    other = train_bpe(["zebras zigzag zealously"] * 9, 330, tmp_path / "other")
    fast = load_tokenizer(other).backend
    assert fast.size() <= 330
    small = model_in(tmp_path / "small", replace(CONFIG, vocab_size=260))
    with pytest.raises(UsageError, match=r"the prompt has the token id \d+, but the model's vocabulary has 260 entries"):
        continue_text(small, "zebras zigzag zealously", 5, GREEDY, tokenizer=other)


def test_only_ids_of_the_tokenizer_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = generate

    def watched(*arguments: object, **options: object) -> list[int]:
        drawn.extend(real(*arguments, **options))  # type: ignore[arg-type]
        return drawn

    monkeypatch.setattr("internevo.commands.generate.generate", watched)
    for seed in range(20):
        continue_text(folder, "the", 20, Sampling(temperature=100.0), seed)
    assert len(drawn) > 200 and max(drawn) < load_tokenizer(folder).vocab_size <= 280


def test_generation_ends_at_the_ids_of_the_models_generation_config(folder: Path) -> None:
    first = load_tokenizer(folder).encode(continue_text(folder, "the cat", 1, GREEDY))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, *first]}))
    assert continue_text(folder, "the cat", 20, GREEDY) == ""


def test_bytes_that_are_not_utf8_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is not UTF-8"):
        continue_text(folder, "the \udcff", 5, GREEDY)


def test_a_cache_that_does_not_fit_into_memory_is_named() -> None:
    with pytest.raises(InternEvoError, match="not enough memory to keep the keys and values of 1,152,921"):
        empty_caches(Decoder(CONFIG), 2**60, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [("--temperature", "nan"), ("--max-new-tokens", str(2**40)), ("--seed", str(2**64))],
    ids=" ".join,
)
def test_nonsense_is_wrong_usage(run: Run, tmp_path: Path, options: tuple[str, str]) -> None:
    done = run("generate", tmp_path, "--prompt", "a", *options, code=2)
    assert options[0].strip("-").replace("-", "_") in done.stderr.replace("-", "_") and "Traceback" not in done.stderr
