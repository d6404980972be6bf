"""The family that docs/add-a-model-family.md adds as an example works as all others do."""

import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import tests.families
from internevo.config.model import Model
from internevo.models.families import registry
from tests.conftest import ROOT
from tests.unit.models import test_models
from tests.unit.models.huggingface import test_interchange

from .test_options import SHAPE

FILE, STRATEGY = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/add-a-model-family.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[ModuleType]:
    """The module of the page, in the list of families, and its random models among those of the others."""
    module = ModuleType("internevo.models.families.seed_oss")
    module.__package__ = "internevo.models.families"
    exec(FILE, vars(module))
    names = dict(vars(tests.families))
    exec(STRATEGY, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, module.FAMILY, module)
        patch.setitem(tests.families.CONFIGS, module.FAMILY, names["seed_oss"]())
        yield module


@pytest.mark.parametrize(
    "test",
    [
        test_models.test_logits_loss_and_gradients_equal_transformers, test_models.test_packed_documents_equal_separate_ones,
        test_models.test_generation_with_the_cache_equals_transformers,
        test_interchange.test_every_family_goes_both_ways_with_transformers,
    ],
    ids=lambda test: test.__name__,
)  # fmt: skip
def test_the_example_equals_transformers(test: Callable[..., None], example: ModuleType) -> None:
    test(family=example.FAMILY)


def test_the_example_checks_a_config(example: ModuleType) -> None:
    section = Model(**SHAPE)
    assert not list(registry.problems(example.FAMILY, section))
    decoder = registry.decoder_config(example.FAMILY, section)
    assert decoder.qkv_bias and not decoder.o_bias
    assert registry.decoder_from_hf(example.to_hf(decoder), "") == decoder
    assert "use_alibi" in next(registry.problems(example.FAMILY, Model(**SHAPE, use_alibi=True)))
