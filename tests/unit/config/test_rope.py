"""Every kind of scaling of the rotary embedding has its known keys, from configs and from Hugging Face folders."""

from typing import Any

import pytest

from internevo.config import rope
from internevo.errors import UsageError
from internevo.models.families import registry
from internevo.models.families.rope import from_hf
from internevo.train.check import problems
from tests.families import SCALINGS
from tests.unit.config.test_config import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.5, 4.0], "original_max_position_embeddings": 8,
}  # fmt: skip
WRONG: list[tuple[Any, str]] = [
    ({"rope_type": "linear", "facter": 4}, "'facter' is not a key of 'linear'"),
    ({"rope_type": "linear", "facter": 4}, "'linear' needs factor"),
    ({"rope_type": "linear"}, "'linear' needs factor"),
    ({"rope_type": "linear", "factor": None}, "'linear' needs factor"),
    ({"rope_type": "dynamic"}, "'dynamic' needs factor"),
    ({"rope_type": "dynamic", "factor": 2.0, "beta_fast": 3}, "'beta_fast' is not a key of 'dynamic'"),
    *[({"rope_type": "linear", "factor": f}, "factor = ") for f in (0, -2, 0.5, "4", True, float("nan"), float("inf"), [4])],
    ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor = 0 must be a number above 0"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor = 4.0 must be less than high_freq_factor = 4.0"),
    ({**LLAMA3, "high_freq_factor": None}, "'llama3' needs high_freq_factor"),
    ({**YARN, "beta_fst": 32}, "'beta_fst' is not a key of 'yarn'"),
    ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_slow = 32 must be less than beta_fast = 1"),
    ({**YARN, "beta_fast": 0.5}, "beta_slow = 1 must be less than beta_fast = 0.5"),
    ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings = 0 must be a whole number"),
    ({**YARN, "original_max_position_embeddings": 4.5}, "original_max_position_embeddings = 4.5 must be a whole number"),
    ({**YARN, "truncate": "no"}, "truncate = 'no' must be true or false"),
    ({**YARN, "attention_factor": -1}, "attention_factor = -1 must be a number above 0"),
    *[({**YARN, "partial_rotary_factor": s}, "must be above 0 and at most 1") for s in (0, -1, 1.5, "half", True)],
    ({"rope_type": "longrope", "factor": 2.0}, "'longrope' needs short_factor, a list of numbers above 0"),
    ({**LONGROPE, "long_factor": [1.0, 0]}, "long_factor = [1.0, 0] must be a list of numbers above 0"),
    ({**LONGROPE, "original_max_position_embeddings": None}, "'longrope' needs original_max_position_embeddings"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "not 'linear' and 'yarn'"),
    ({"rope_type": "su", "factor": 2.0}, "its rope_type must be one of default, linear, dynamic, llama3, yarn, longrope"),
    ({"rope_type": ["linear"], "factor": 2.0}, "its rope_type must be one of"),
    ({"rope_type": "default", "factor": 2.0}, "'factor' is not a key of 'default'"),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "message"), WRONG, ids=str)
def test_a_wrong_scaling_is_refused_in_configs_and_in_folders(scaling: dict[str, Any], message: str) -> None:
    found = problems(tiny(model__rope_scaling=scaling), 1)
    assert any(line.startswith("model.rope_scaling: ") and message in line for line in found), found
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UsageError) as caught:
            from_hf({key: scaling})
        assert message in str(caught.value) and f"{key}: " in str(caught.value)


@pytest.mark.parametrize("scaling", ["linear", 4.0, [], ["linear", 2.0], False, 0, ""], ids=repr)
def test_a_scaling_that_is_no_object_is_refused(scaling: Any) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UsageError, match=f"{key}: .* is not an object with keys"):
            from_hf({key: scaling})


@pytest.mark.parametrize("scaling", [{"factor": 4.0}, {}], ids=str)
def test_a_config_names_the_kind(scaling: dict[str, Any]) -> None:
    assert any("its rope_type must be one of" in line for line in problems(tiny(model__rope_scaling=scaling), 1))


def test_a_factor_without_a_kind_is_refused_in_folders() -> None:
    with pytest.raises(UsageError, match="'factor' is not a key of 'default'"):
        from_hf({"rope_scaling": {"factor": 4.0}})


@pytest.mark.parametrize(
    "scaling", [scaling for scaling in SCALINGS if scaling] + [{**YARN, "finetuned": True, "mscale": 1}], ids=str
)
def test_right_scalings_are_read_in_both_forms_and_all_keys_are_kept(scaling: dict[str, Any]) -> None:
    assert not problems(tiny(model__rope_scaling=scaling), 1)
    old = from_hf({"rope_scaling": scaling, "rope_theta": 500})
    assert old == from_hf({"rope_parameters": {**scaling, "rope_theta": 500.0}})
    assert {"rope_type": old.kind, "factor": old.factor, **old.options} == scaling
    assert rope.KINDS.keys() >= {old.kind}


def test_old_and_new_keys_must_agree() -> None:
    linear, default = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 10000.0}
    assert from_hf({"rope_parameters": linear, "rope_scaling": {"type": "linear", "factor": 2}}).factor == 2.0
    with pytest.raises(UsageError, match="rope_parameters and rope_scaling contradict each other"):
        from_hf({"rope_parameters": default, "rope_scaling": linear})
    with pytest.raises(UsageError, match="rope_theta = 500 contradicts rope_parameters, whose rope_theta is 10000"):
        from_hf({"rope_parameters": default, "rope_theta": 500})


@pytest.mark.parametrize("base", [0, -1, "10000", True, float("nan")], ids=repr)
def test_a_wrong_base_is_refused(base: Any) -> None:
    for config in ({"rope_theta": base}, {"rope_parameters": {"rope_type": "default", "rope_theta": base}}):
        with pytest.raises(UsageError, match="rope_theta = .* must be a number above 0"):
            from_hf(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__rope_scaling_factor": 2.0}, "model.rope_scaling_factor = 2.0 has an effect only with"),
        ({"model__rope_scaling": YARN, "model__use_dynamic_ntk_rope": True}, "model.use_dynamic_ntk_rope both set the scaling"),
        ({"model__rope_scaling": YARN, "model__rope_type": "dynamic_ntk"}, "model.rope_type = 'dynamic_ntk' both set"),
        ({"model_type": "BAICHUAN2", "model__use_alibi": True, "model__rope_scaling": YARN}, "no effect with model.use_alibi"),
        ({"model_type": "BAICHUAN2", "model__use_alibi": True, "model__rope_base": 5.0}, "model.rope_base has no effect with"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_another_one_makes_useless_are_refused(changes: dict[str, Any], message: str) -> None:
    found = problems(tiny(**changes), 1)
    assert any(message in line for line in found), found
    assert tiny(**changes).model_type in registry.FAMILIES
