"""Every ready config is valid and has its model's published number of parameters."""

import json
import re

import pytest

from internevo.models.decoder import parameter_shapes, stored_shapes
from internevo.models.families.registry import decoder_config, decoder_from_hf, family
from internevo.train.check import missing_features, problems
from internevo.train.config import load_config
from tests.conftest import ROOT

PUBLISHED = {
    "7B_sft": 7_321_948_160, "7B_isp_sft": 7_321_948_160, "1.8B_internlm2": 1_889_110_016, "7B_internlm2": 7_737_708_544,
    "20B_internlm2": 19_861_149_696, "8B_internlm3": 8_804_241_408, "7B_llama2": 6_738_415_616, "70B_llama2": 68_976_648_192,
    "8B_llama3": 8_030_261_248, "7B_qwen2": 7_615_616_512, "7B_baichuan2": 7_505_973_248, "13B_baichuan2": 13_896_668_160,
    "7B_gemma": 8_537_680_896, "57B_qwen2_MoE": 57_408_658_944, "8x7B_mixtral": 46_702_792_704,
    "8x22B_mixtral": 140_620_634_112, "8B_qwen3": 8_190_735_360, "30B_qwen3_MoE": 30_532_122_624,
    "4B_phi3": 3_821_079_552, "14B_phi4": 14_659_507_200, "9B_glm4": 9_399_951_360, "1B_gemma3": 999_885_952,
    "2B_gemma2": 2_614_341_888, "7B_qwen2_5": 7_615_616_512, "7B_internlm2_5": 7_737_708_544,
    "8B_llama3_1": 8_030_261_248, "1B_llama3_2": 1_235_814_400,
    "7B_mistral": 7_241_732_096, "12B_mistral_nemo": 12_247_782_400, "3B_smollm3": 3_075_098_624,
    "8B_granite3": 8_170_835_968,
    "16B_deepseek2_lite": 15_706_484_224, "671B_deepseek3": 671_026_404_352,
}  # fmt: skip
MULTIPLES = {"671B_deepseek3": 8, "7B_isp_sft": 4}
"""Of which number of processes a ready config needs a multiple, if its layout is a part of it. The others need one process."""
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("demo"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ready_config_has_the_published_size_and_goes_to_hugging_face(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert not problems(config, 64)
    assert not missing_features(config)
    decoder = decoder_config(config.model_type, config.model)
    shapes = parameter_shapes(decoder)
    assert decoder.parameters() == sum(shape.numel() for shape in shapes.values()) == PUBLISHED[name]
    written = json.loads(json.dumps(family(decoder.family).to_hf(decoder)))
    assert decoder_from_hf(written, name) == decoder
    assert family(decoder.family).names(decoder).keys() == stored_shapes(decoder).keys()


@pytest.mark.parametrize("name", [*CONFIGS, "demo", "demo_lora"])
def test_a_ready_config_trains_on_a_few_processes_or_says_how_many_it_needs(name: str) -> None:
    config, least = load_config(path := ROOT / "configs" / f"{name}.py"), MULTIPLES.get(name, 1)
    assert least == 1 or f"a multiple of {least} processes" in path.read_text(encoding="utf-8")
    for world in (1, 2, 4, 8):
        wrong = problems(config, world)
        if name.startswith("demo") and world > 2:  # its batch stays the same, so that its losses do
            (fitting,) = re.findall(r"use (data\.micro_bsz=\d+)", "\n".join(wrong))
            assert not problems(load_config(path, [fitting]), world)
        else:
            assert bool(wrong) == (world % least > 0), (world, wrong)
            assert not wrong or f"use a multiple of {least} processes" in "\n".join(wrong)


def test_every_ready_config_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(CONFIGS)
