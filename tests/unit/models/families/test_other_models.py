"""Models of other families whose tensors have the same names: under a family's name they are computed right, or refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from internevo.checkpoint.open import open_source
from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.config import Rope
from internevo.models.decoder import Decoder
from internevo.models.families import choices, hf_values
from internevo.models.families.registry import FAMILIES, decoder_config, decoder_from_hf
from internevo.models.huggingface.folder import as_family
from internevo.models.source import load_parameters

from .test_options import BASE

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.4}
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": None}, ""), ("mistral", {"sliding_window": 3}, "sliding_window = 3"),
    ("ministral", {"sliding_window": 3}, "sliding_window = 3"), ("cwm", {"sliding_window": 3}, "sliding_window = 3"),
    *(("granite", {key: value}, "multiplier|scaling") for key, value in MULTIPLIERS.items()),
    ("smollm3", {}, "no_rope_layer"), ("helium", {}, "model_type = 'helium'"), ("ernie4_5", {}, "model_type = 'ernie4_5'"),
    ("seed_oss", {}, ""), ("iquestcoder", {}, ""), ("internlm3", {}, ""), ("qwen2", {"sliding_window": 3}, ""),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, "sliding_window"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, "sliding_window"),
    ("llama", {}, ""),
]  # fmt: skip
"""The name of an architecture in transformers, options, and what a message names that refuses it in families without them."""


@pytest.mark.parametrize(("kind", "options", "message"), OTHERS, ids=str)
def test_another_model_under_the_name_of_a_family_is_computed_right_or_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    loader: Any = transformers.AutoModelForCausalLM
    theirs = loader.from_config(transformers.AutoConfig.for_model(kind, **SHAPE, **options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (2, 24))
    loaded, refusals = 0, list[str]()
    for name in FAMILIES:
        try:
            source = open_source(tmp_path, name)
        except UsageError as error:
            refusals.append(str(error))
            continue
        ours = Decoder(source.config)
        load_parameters(ours, source)
        with torch.no_grad():
            wanted = theirs(tokens).logits
            assert (ours.eval()(tokens) - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max()), name
        loaded += 1
    assert loaded if not message else any(re.search(message, line) for line in refusals)


def test_another_model_under_the_name_of_mistral_does_not_get_its_default_window() -> None:
    shape = {key: value for key, value in SHAPE.items() if not key.endswith("_id")}
    for kind, window in (("mistral", 4096), ("llama", 0)):
        assert {decoder_from_hf({**shape, "model_type": kind}, "", "MISTRAL").window(layer) for layer in range(4)} == {window}


def test_a_llama_under_the_name_of_smollm3_rotates_in_every_layer() -> None:
    shape = {key: value for key, value in SHAPE.items() if not key.endswith("_id")}
    for kind, layers, base in (("smollm3", (3,), 2e6), ("llama", (), 1e4)):
        config = decoder_from_hf({**shape, "model_type": kind}, "", "SMOLLM3")
        assert config.layers_without_rope == layers and config.rope == Rope(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 numbers, and num_hidden_layers = 4"),
        ({"no_rope_layers": "all"}, "no_rope_layers = 'all' must be a list of whole numbers"),
        ({"no_rope_layer_interval": -1}, "no_rope_layer_interval = -1 must be a whole number"),
        ({"sliding_window": 3, "layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention, and use_sliding"),
        ({"sliding_window": 3, "model_type": "mistral"}, "sliding_window = 3 does not fit SMOLLM3"),
    ],
)
def test_smollm3_refuses_what_it_cannot_mean(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decoder_from_hf({**SHAPE, "model_type": "smollm3", **values}, "", "SMOLLM3")


def test_a_granite_whose_multipliers_change_nothing_is_a_llama() -> None:
    plain = Model(**BASE["GRANITE"])  # with heads of 16
    wanted = decoder_config("LLAMA2", plain)
    for section in (plain, Model(**BASE["GRANITE"], attention_multiplier=0.25)):
        assert as_family(decoder_config("GRANITE", section), "LLAMA2") == wanted
    assert as_family(wanted, "GRANITE") == decoder_config("GRANITE", plain)
    with pytest.raises(UsageError, match=r"its residual_multiplier is 0.5, and in the folder it would be 1.0"):
        as_family(decoder_config("GRANITE", Model(**BASE["GRANITE"], residual_multiplier=0.5)), "LLAMA2")


def test_mistral_has_a_window_in_every_layer_or_in_none() -> None:
    mixed = {**SHAPE, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2}
    with pytest.raises(UsageError, match="layer_types has layers without a window, and in MISTRAL all have one"):
        decoder_from_hf(mixed, "", "MISTRAL")
    assert decoder_from_hf({**mixed, "use_sliding_window": False}, "", "MISTRAL").windows == ()


WRONG = {"use_sliding_window": True, "is_causal": False, "no_rope_layers": [1, 0], "quantization_config": {"bits": 4}}


@pytest.mark.parametrize("key", hf_values.FIXED)
def test_a_value_that_a_family_does_not_compute_with_is_refused_by_name(key: str) -> None:
    for name, module in FAMILIES.items():
        plain = module.to_hf(decoder_config(name, Model(**BASE[name])))
        assert decoder_from_hf(plain, "", name)
        if module.FIXED.get(key, ()) is not choices.ANY_VALUE:
            allowed = {**hf_values.FIXED, **module.FIXED}[key]
            for value in allowed:
                decoder_from_hf({**plain, key: value}, "", name)
            wrong = next(v for v in (WRONG.get(key), 3) if v is not None and v not in allowed)
            with pytest.raises(UsageError, match=f"{key} = .* does not fit {name}"):
                decoder_from_hf({**plain, key: wrong}, "", name)
