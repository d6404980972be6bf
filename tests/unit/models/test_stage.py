"""A stage is a part of a model with the same names of parameters, and the stages one after the other equal the model."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internevo.models.config import DecoderConfig, Experts, Rope, Stage
from internevo.models.decoder import Decoder
from internevo.models.losses import HandedOn, Loss, LossTerms

SPLITS = {
    "two": [Stage(range(2), heads=False), Stage(range(2, 4), embeds=False)],
    "three, the middle one only layers": [
        Stage(range(1), heads=False), Stage(range(1, 3), embeds=False, heads=False), Stage(range(3, 4), embeds=False),
    ],
    "embedding and head without layers": [
        Stage(range(0), heads=False), Stage(range(4), embeds=False, heads=False), Stage(range(4, 4), embeds=False),
    ],
}  # fmt: skip


def config_of(tied: bool, rope: Rope | None) -> DecoderConfig:
    return DecoderConfig(
        "LLAMA2", 97, 32, 48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, tie_embeddings=tied, rope=rope
    )


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(("tied", "rope"), [(False, Rope()), (True, Rope()), (False, None)])
def test_stages_one_after_the_other_equal_the_model(name: str, tied: bool, rope: Rope | None) -> None:
    """Compares losses and gradients of packed documents. The gradient of a tied embedding is the sum of those of two stages."""
    torch.manual_seed(0)
    config = config_of(tied, rope)
    whole = Decoder(config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stages = [Decoder(config, stage) for stage in SPLITS[name]]
    weights = dict(whole.named_parameters())
    for stage in stages:
        stage.load_state_dict({key: weights[key].detach() for key, _ in stage.named_parameters()}, strict=not tied)
    tokens = torch.randint(0, 97, (1, 40))
    labels = tokens.roll(-1, dims=1)
    boundaries = torch.tensor([0, 13, 13 + 20, 40], dtype=torch.int32)
    expected = whole(tokens, cu_seqlens=boundaries, labels=labels)
    expected.total.backward()

    result: HandedOn | Loss | None = None
    for stage in stages:
        hidden = result.hidden if isinstance(result, HandedOn) else None
        result = stage(tokens, cu_seqlens=boundaries, labels=labels, hidden=hidden)
    assert isinstance(result, Loss)
    result.total.backward()
    torch.testing.assert_close(result.losses, expected.losses)
    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for key, parameter in stage.named_parameters():
            assert parameter.grad is not None, key
            gradients[key] = gradients.get(key, 0) + parameter.grad
    assert gradients.keys() == weights.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, weights[key].grad, msg=key)


@pytest.mark.parametrize("dense_layers", [(), (0, 1), (3,), (1, 2)])
@pytest.mark.parametrize("name", SPLITS)
def test_stages_hand_on_what_the_pooled_balance_loss_needs(name: str, dense_layers: tuple[int, ...]) -> None:
    """Also stages without routers. The gradients go back as they came."""
    torch.manual_seed(0)
    whole = Decoder(replace(config_of(False, Rope()), family="QWEN3MOE", experts=Experts(4, 2, 24, dense_layers=dense_layers)))
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens, terms = torch.randint(0, 97, (2, 20)), LossTerms(balance=5.0, balance_kind="pooled", router_z=0.1)
    labels = tokens.roll(-1, dims=1)
    expected = whole(tokens, labels=labels, terms=terms)
    expected.total.backward()
    result: HandedOn | Loss | None = None
    losses = list[Tensor]()
    for stage_of_whole in SPLITS[name]:
        stage = Decoder(whole.config, stage_of_whole)
        for key, _ in stage.named_parameters():
            module, _, last = key.rpartition(".")
            setattr(stage.get_submodule(module), last, whole.get_parameter(key))
        hidden, pooled = (result.hidden, result.pooled) if isinstance(result, HandedOn) else (None, None)
        result = stage(tokens, labels=labels, terms=terms, hidden=hidden, pooled=pooled)
        assert isinstance(result, Loss) or (result.pooled is not None and len(result.message()) == 2)
        losses += [result.routed.loss] if result.routed.loss is not None else []
    gradients = {key: parameter.grad for key, parameter in whole.named_parameters()}
    whole.zero_grad()
    assert isinstance(result, Loss)
    in_stages = result.total + sum(loss for loss in losses[:-1])
    in_stages.backward()
    torch.testing.assert_close(in_stages, expected.total)
    torch.testing.assert_close(sum(losses), expected.routed.loss)
    for key, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], msg=key)


def test_a_stage_has_only_its_own_parameters() -> None:
    config = config_of(False, Rope())
    first, last = (
        {re.sub(r"^(layers\.\d+|\w+).*", r"\1", key) for key, _ in Decoder(config, stage).named_parameters()}
        for stage in SPLITS["two"]
    )
    assert first == {"embed", "layers.0", "layers.1"} and last == {"layers.2", "layers.3", "norm", "head"}


def test_a_stage_without_the_embedding_needs_the_residual_stream() -> None:
    with pytest.raises(AssertionError, match="residual stream"):
        Decoder(config_of(False, Rope()), Stage(range(2, 4), embeds=False))(torch.zeros(1, 3, dtype=torch.long))
