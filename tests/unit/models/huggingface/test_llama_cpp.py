"""GGUF files in llama.cpp itself: it computes the same logits and splits texts into the same tokens.

llama.cpp is in the package ``xllamacpp`` (``pip install xllamacpp``), which is not among this project's own requirements.
"""

import json
import random
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Fast
from tokenizers.trainers import BpeTrainer

from internevo.config.model import Model
from internevo.models.config import DecoderConfig
from internevo.models.families.registry import decoder_config
from internevo.models.huggingface.gguf import write_gguf
from internevo.models.huggingface.gguf_tokenizer import IGNORES_MERGES, SPLITS
from internevo.models.source import ModelInMemory
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.conftest import random_model
from tests.unit.models.huggingface.test_gguf import LATENT, LONG, MORE, SHAPE
from tests.unit.models.huggingface.test_gguf_tokenizer import WORDS, phi3, settings, train

llama = pytest.importorskip("xllamacpp")
VOCABULARY = SHAPE["vocab_size"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FIVE_HEADS = {"num_attention_heads": 5, "num_kv_attention_heads": 5}
LORA = {**LATENT, "q_lora_rank": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LLAMA2", MORE["LLAMA2"]),
    "Llama, biases, other heads": ("LLAMA2", {"no_bias": False, "mlp_bias": True, "head_dim": 32}),
    "Llama, linear": ("LLAMA2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "Llama, YaRN": ("LLAMA2", {"rope_scaling": YARN}),
    "Llama, YaRN with a factor": ("LLAMA2", {"rope_scaling": {**YARN, "attention_factor": 1.4}}),
    "InternLM": ("INTERNLM", MORE["INTERNLM"]),
    "InternLM2, dynamic": ("INTERNLM2", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "InternLM3": ("INTERNLM3", MORE["INTERNLM3"]),
    "Baichuan2, rotary": ("BAICHUAN2", {"num_layers": 32, "num_kv_attention_heads": 4}),
    "Baichuan2, ALiBi": ("BAICHUAN2", {"num_layers": 40, "hidden_size": 80, "use_alibi": True, **FIVE_HEADS}),
    "Mistral": ("MISTRAL", {"head_dim": 32}),
    "SmolLM3": ("SMOLLM3", {"num_layers": 9, "no_rope_layer_interval": 4}),
    "SmolLM3, other heads": ("SMOLLM3", {**MORE["SMOLLM3"], "head_dim": 32, "tie_word_embeddings": False}),
    "SmolLM3, YaRN": ("SMOLLM3", {**MORE["SMOLLM3"], "rope_scaling": YARN}),
    "Granite": ("GRANITE", MORE["GRANITE"]),
    "Granite, no multipliers, other heads": ("GRANITE", {"head_dim": 32, "tie_word_embeddings": True}),
    "Mixtral": ("MIXTRALMOE", MORE["MIXTRALMOE"]),
    "Qwen2": ("QWEN2", {}),
    "Qwen3, YaRN": ("QWEN3", {"rope_scaling": YARN, "head_dim": 32}),
    "Qwen2 MoE": ("QWEN2MOE", MORE["QWEN2MOE"]),
    "Qwen3 MoE": ("QWEN3MOE", MORE["QWEN3MOE"]),
    "Gemma": ("GEMMA", {}),
    "Gemma 2": ("GEMMA2", {}),
    "Gemma 3": ("GEMMA3", MORE["GEMMA3"]),
    "Phi-3": ("PHI3", {"sliding_window": 100, "use_sliding_window": True}),
    "Phi-4 mini, short": ("PHI3", {"rope_scaling": {**LONG, "original_max_position_embeddings": 512}}),
    "Phi-4 mini, long": ("PHI3", {"rope_scaling": {**LONG, "original_max_position_embeddings": 8}}),
    "GLM-4": ("GLM", {}),
    "GLM-4, no biases": ("GLM", {"qkv_bias": False}),
    "GLM-4-0414": ("GLM4", {"head_dim": 32}),
    "DeepSeek-V2": ("DEEPSEEKV2", {**LORA, "routed_scaling_factor": 16.0, "mlp_only_layers": [0, 1]}),
    "DeepSeek-V2 Lite": ("DEEPSEEKV2", {**LATENT, "num_layers": 27}),
    "DeepSeek-V2, no query latents": ("DEEPSEEKV2", {**LATENT, "mlp_only_layers": []}),
    "DeepSeek-V2, YaRN": ("DEEPSEEKV2", {**LORA, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "DeepSeek-V2, YaRN, two weights": ("DEEPSEEKV2", {**LORA, "rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}}),
    "DeepSeek-V2, YaRN, no weights": ("DEEPSEEKV2", {**LORA, "rope_scaling": YARN}),
    "DeepSeek-V3": ("DEEPSEEKV3", {**MORE["DEEPSEEKV3"], "num_experts": 8, "top_k": 3, "n_group": 4, "topk_group": 2}),
    "DeepSeek-V3, halves": ("DEEPSEEKV3", {**LORA, "norm_topk_prob": False}),
}


@contextmanager
def loaded(file: Path) -> Iterator[Any]:
    """llama.cpp's server with a model, in fp32."""
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.fit_params = str(file), 512, 1, False, False
    params.port, params.verbosity, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 0, 0, 1, 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    yield llama.Server(params)


def next_token(server: Any, ids: list[int]) -> torch.Tensor | None:
    """The log-probabilities of the token after ``ids``. None: the token that it drew is half a character, without any."""
    options = {"temperature": 1.0, "samplers": [], "seed": 1, "cache_prompt": False, "max_tokens": 1}
    answer = server.handle_completions({"prompt": ids, "logprobs": VOCABULARY, **options})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = answer["choices"][0]["logprobs"]
    if not found:
        return None
    out = torch.full((VOCABULARY,), torch.nan)
    for one in found["content"][0]["top_logprobs"]:
        out[one["id"]] = one["logprob"]
    return out


def config_of(name: str) -> DecoderConfig:
    family, more = CASES[name]
    config = decoder_config(family, Model(**{**SHAPE, **more}))
    return replace(config, rope=replace(config.rope, interleaved=False)) if "halves" in name and config.rope else config


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = random_model(config_of(name)).eval()
    for parameter in model.parameters():
        parameter.mul_(0.4)
    for stored, tensor in model.stored().items():
        if stored.endswith("router.bias"):
            tensor.normal_(std=0.3)
    source = ModelInMemory(model.config, model, train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer").parent)
    write_gguf(source, tmp_path / "out", dtype=torch.float32)
    compared = 0
    with loaded(tmp_path / "out" / "model.gguf") as server:
        for length in (9, 40, 40, 40):
            ids = torch.randint(1, 300, (length,)).tolist()
            if (theirs := next_token(server, ids)) is not None:
                ours = model(torch.tensor([ids])).log_softmax(-1)[0, -1]
                limit = 5e-3 if "Gemma" in name else 5e-5  # its gelu is a table in fp16
                assert (theirs - ours).abs().max() < limit * ours.std()
                compared += 1
    assert compared


PIECES = [
    "the", "Quick", "BROWN", "xAI", "it's", "WE'LL", "\u00fcber", "\u0395\u03bb", "\u4f60\u597d", "\u3053\u3093",
    "\ud55c\uad6d", "7", "42", "2026", "31415", " ", "  ", "\n", "\n\n", "\t", "\r\n", ".", "!?", "...", "=>", "//", "_x",
    "\u3002", "\uff01", "(", "\U0001f680", "-",
]  # fmt: skip


@pytest.mark.parametrize("patterns", SPLITS, ids=SPLITS.get)
def test_llama_cpp_splits_texts_into_the_same_tokens(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    name, draw = SPLITS[patterns], random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=30)) for _ in range(300)]
    fast = Fast.from_file(str(train_bpe(texts, 300, tmp_path)))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    fast.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(texts, BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
    values = json.loads(fast.to_str())
    values["model"]["ignore_merges"] = name in IGNORES_MERGES
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert_same_tokens(tmp_path, VOCABULARY, texts[:100])


def test_llama_cpp_strips_white_space_after_the_special_tokens_of_phi_3(tmp_path: Path) -> None:
    size, draw = phi3(tmp_path), random.Random(0)
    pieces = [*PIECES, "<|user|>", "<|end|>", "<|user|>\n", "<|end|> \n "]
    assert_same_tokens(tmp_path, size, ["a" + "".join(draw.choices(pieces, k=20)) for _ in range(100)])


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_llama_cpp_has_the_same_pieces(tmp_path: Path, kind: str, front: bool) -> None:
    user = [] if front else ["[X]"]  # after such a piece, llama.cpp puts another space in front, and SentencePiece does not
    bytes_too = kind == "bpe"
    train(tmp_path, user_defined_symbols=user, add_dummy_prefix=front, model_type=kind, vocab_size=330, byte_fallback=bytes_too)
    settings(tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=front, legacy=True)
    size, draw = load_tokenizer(tmp_path).vocab_size, random.Random(0)
    assert_same_tokens(tmp_path, size, ["a" + "".join(draw.choices([*WORDS, *PIECES, *user], k=20)) for _ in range(100)])


def assert_same_tokens(folder: Path, size: int, texts: list[str]) -> None:
    """Writes the tokenizer in a folder, and compares how llama.cpp splits texts with how it does."""
    model = random_model(replace(config_of("Qwen2"), vocab_size=size))
    write_gguf(ModelInMemory(model.config, model, folder), folder / "out")
    tokenizer = load_tokenizer(folder)
    with loaded(folder / "out" / "model.gguf") as server:
        for text in texts:
            body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
            request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["tokens"] == tokenizer.encode(text), text
