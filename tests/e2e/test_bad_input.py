"""Bad input gives one clear message with the file and the position, and a non-zero exit code. Existing files stay intact."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WriteConfig, metrics, run, tensors
from tests.parallel.layouts import EXPERTS


def tokenize(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run("tokenize", *arguments, "--train-tokenizer", "bpe", "--vocab-size", 300, code=code)


def test_a_file_that_is_not_utf8_is_named_and_no_output_is_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fine")
    (tmp_path / "in" / "b.txt").write_bytes(b"12345\xff67")
    done = tokenize(tmp_path / "in", "--output", tmp_path / "out", code=1)
    assert "b.txt is not UTF-8 at byte 5 (0xff)" in done.stderr
    assert not list((tmp_path / "out").rglob("*.bin*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"', "byte 16: the line is not JSON"),
        (
            '{"body": "x"}',
            "byte 16 has no text under 'content' or 'text' (it has 'body'); give the field's name with --text-key",
        ),
    ],
)
def test_the_position_of_a_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' + line + "\n")
    done = tokenize(tmp_path / "a.jsonl", "--output", tmp_path / "out", code=1)
    assert "a.jsonl, " + message in done.stderr


def test_order_and_content_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    from internevo.data.tokenized.index import open_index
    from internevo.text.tokenizer import load_tokenizer

    texts = [f"document {n}: " + "naïve text 文本 " * (n % 50) for n in range(4000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in texts))
    tokenize(tmp_path / "a.jsonl", "--output", tmp_path / "one", "--workers", 1, "--type", "cn", "--valid-ratio", 0.1)
    done = run(
        "tokenize", tmp_path / "a.jsonl", "--output", tmp_path / "two", "--tokenizer", tmp_path / "one", "--workers", 2,
        "--type", "cn", "--valid-ratio", 0.1,
    )  # fmt: skip
    assert "documents" in done.stdout
    for part in ("train", "valid"):
        name = f"{part}/cn/part-00000.bin"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one")
    found = []
    for part in ("train", "valid"):
        index = open_index(tmp_path / "one" / part)
        found += [tokenizer.decode(index.read(n).tolist()[:-1]) for n in range(len(index))]
        assert all(index.read(n)[-1] == tokenizer.eos_id for n in range(len(index)))
    assert sorted(found) == sorted(texts)
    assert "already contains tokenized data" in tokenize(tmp_path / "a.jsonl", "--output", tmp_path / "one", code=2).stderr


def test_wrong_usage_of_tokenize(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "give either --tokenizer" in run("tokenize", tmp_path / "a.txt", "--output", tmp_path / "o", code=2).stderr
    assert "does not exist" in tokenize(tmp_path / "b.txt", "--output", tmp_path / "o", code=2).stderr
    done = run("tokenize", tmp_path / "a.txt", "--output", tmp_path / "o", "--tokenizer", tmp_path / "a.txt", code=2)
    assert "neither a folder" in done.stderr


def test_an_id_outside_the_vocabulary_stops_the_run_and_its_document_is_named(tmp_path: Path, config: WriteConfig) -> None:
    done = run("train", config("small", model__vocab_size=50), code=1)
    assert "part.bin, document" in done.stderr and "outside the vocabulary of 50" in done.stderr


def test_rows_that_are_skipped_are_counted_once(tmp_path: Path, config: WriteConfig) -> None:
    """Also if several ranks have the same rows. Validation skips them as well."""
    skipped = []
    for nproc in (1, 2):
        path = config(
            f"on{nproc}", model__vocab_size=96, data__on_error="skip", parallel__tensor={"size": nproc, "mode": "mtp"}
        )
        run("train", path, "--nproc", nproc)
        skipped.append([row.get("data_skipped", 0) for row in metrics(tmp_path / f"on{nproc}")])
    assert skipped[0] == skipped[1] and skipped[0][-1] > 0


def test_an_unknown_command_and_a_config_with_a_typo_exit_2(tmp_path: Path, config: WriteConfig) -> None:
    run("trian", code=2)
    done = run("train", config("typo"), "model.hiden_size=3", code=2)
    assert "did you mean model.hidden_size" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in run("train", config("typo"), "model.hiden_size=3", "--debug", code=2).stderr


def test_a_full_disk_while_saving_keeps_earlier_checkpoints(tmp_path: Path, config: WriteConfig) -> None:
    """A limit of the file size is used instead of a full disk: with both, a write fails in the middle of a file."""
    path = config("full", ckpt__checkpoint_every=3)
    run("train", path, "data.total_steps=3")
    before = tensors(tmp_path / "full", 3)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        [sys.executable, "-m", "internevo", "train", str(path)], preexec_fn=limit, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "saving a checkpoint failed; earlier ones are untouched" in done.stderr
    assert ".step-00000006.tmp/model-00000.safetensors cannot be written" in done.stderr
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000003"]
    after = tensors(tmp_path / "full", 3)
    assert all((after[k] == before[k]).all() for k in before)
    run("train", path)
    assert [row["step"] for row in metrics(tmp_path / "full")] == list(range(1, 9))


def test_a_damaged_checkpoint_is_refused_on_every_process(tmp_path: Path, config: WriteConfig) -> None:
    path = config("damaged")
    run("train", path, "data.total_steps=3")
    file = tmp_path / "damaged" / "checkpoints" / "step-00000003" / "optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    done = run("train", path, "--nproc", 2, code=1)
    assert "optimizer-00000.safetensors is damaged: its checksum differs in bytes" in done.stderr


def test_other_data_or_another_model_is_refused_on_resume(tmp_path: Path, config: WriteConfig) -> None:
    path = config("changed")
    run("train", path, "data.total_steps=3")
    done = run("train", path, "data.seq_len=16", code=1)
    assert "the training data is not that of" in done.stderr and "data.on_change=continue" in done.stderr
    done = run("train", path, "data.total_steps=4", "data.seq_len=16", "data.on_change=continue")
    assert "the training data has changed since" in done.stdout and "the run continues after 36 rows" in done.stdout
    assert "model.vocab_size = 98 in the config, and 97 in" in run("train", path, "model.vocab_size=98", code=2).stderr


def test_the_moments_of_another_optimizer_are_refused(tmp_path: Path, config: WriteConfig) -> None:
    path = config("changed")
    run("train", path, "data.total_steps=2")
    done = run("train", path, "data.total_steps=3", "muon=dict()", code=1)
    assert "has the moments of AdamW for layers.0.attn.q.weight and" in done.stderr
    assert "the config says Muon" in done.stderr and 'content=("model",)' in done.stderr
    path = config("other", muon={}, ckpt__load_ckpt_info={"path": str(tmp_path / "changed"), "content": ("model",)})
    run("train", path, "data.total_steps=2")
    assert "has the moments of Muon for" in run("train", path, "data.total_steps=3", "muon=None", code=1).stderr


@pytest.mark.parametrize("resumed", [True, False], ids=["own checkpoint", "other run"])
def test_a_checkpoint_of_another_number_of_experts_is_refused_before_a_process_starts(
    tmp_path: Path, config: WriteConfig, resumed: bool
) -> None:
    first = config("first", data__total_steps=1, **EXPERTS)
    run("train", first)
    again = "first" if resumed else "second"
    places = {} if resumed else {"ckpt__load_ckpt_info": {"path": str(tmp_path / "first")}}
    path = config(again, **{**EXPERTS, **places, "model__num_experts": 8})
    logs = sorted((tmp_path / again / "log").glob("*"))
    done = run("train", path, "--nproc", 2, code=2)
    assert "\nerror: the config's model is not that of" in "\n" + done.stderr
    assert "  model.num_experts = 8 in the config, and 4 in" in done.stderr
    assert "rank" not in done.stderr and sorted((tmp_path / again / "log").glob("*")) == logs
