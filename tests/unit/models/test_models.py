"""Compares models with transformers' models, and packed documents with separate ones."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from internevo.models.decoder import Decoder
from internevo.models.generate import Continuation, Sampling, generate
from internevo.models.losses import LossTerms, add_pooled, pooled_balance
from internevo.models.moe import MoE
from tests.families import CONFIGS, disk_tensors, pair, to_disk

FAMILIES = sorted(CONFIGS)


def is_sparse(model: Decoder) -> bool:
    return any(model.config.is_sparse(layer) for layer in range(model.config.num_layers))


def clear_choice(theirs: Any, ours: Decoder, tokens: Tensor) -> bool:
    """Whether no rounding error could change which experts a router chooses."""
    if not is_sparse(ours):
        return True
    k, moe = theirs.config.num_experts_per_tok, ours.config.experts
    assert moe is not None
    routers = [layer.mlp.router for _, layer in ours.numbered_layers() if isinstance(layer.mlp, MoE)]
    for router, logits in zip(routers, theirs(tokens, output_router_logits=True).router_logits, strict=True):
        if moe.groups > 1 or moe.balance_bias:
            near = [(logits + 1e-3 * torch.randn_like(logits)) for _ in range(8)]
            scores = [x.sigmoid() if moe.scoring == "sigmoid" else x.softmax(-1) for x in (logits, *near)]
            chosen = [router.choose(x).sort().values for x in scores]
            if not all(torch.equal(chosen[0], other) for other in chosen):
                return False
            continue
        top = logits.softmax(-1).topk(min(k + 1, logits.shape[-1])).values
        if top.shape[-1] > k and (top[:, k - 1] - top[:, k]).min() < 1e-4:
            return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), length=st.sampled_from([5, 24]))
def test_logits_loss_and_gradients_equal_transformers(family: str, data: st.DataObject, seed: int, length: int) -> None:
    theirs, ours = pair(data.draw(CONFIGS[family]), seed)
    assert ours.config.family == family
    tokens = torch.randint(1, theirs.config.vocab_size, (2, length))
    assume(clear_choice(theirs, ours, tokens))
    sparse = is_sparse(ours) and hasattr(theirs.config, "router_aux_loss_coef")
    options = {"output_router_logits": True} if sparse else {}
    expected = theirs(tokens, labels=tokens, **options)
    assert (ours(tokens) - expected.logits).abs().max() < 1e-5 * max(1.0, float(expected.logits.detach().abs().max()))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    coefficient = theirs.config.router_aux_loss_coef if sparse else 0.0
    loss = ours(tokens, labels=labels, terms=LossTerms(balance=coefficient, balance_kind="pooled"))
    count = (labels != -100).sum()
    assert abs(loss.total / count - expected.loss) < 1e-5
    (loss.total / count).backward()
    expected.loss.backward()
    wanted = disk_tensors(theirs, gradients=True)
    mine = to_disk(ours, {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in ours.named_parameters()})
    assert mine.keys() == wanted.keys()
    noise = 1e-7 * max(1.0, *(float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None))
    for name, gradient in wanted.items():
        gradient = torch.zeros_like(mine[name]) if gradient is None else gradient
        assert (mine[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + noise, name


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 24), min_size=1, max_size=5))
def test_packed_documents_equal_separate_ones(family: str, data: st.DataObject, seed: int, sizes: list[int]) -> None:
    theirs, model = pair(data.draw(CONFIGS[family]), seed)
    documents = [torch.randint(1, model.config.vocab_size, (1, n)) for n in sizes]
    assume(all(clear_choice(theirs, model, d) for d in documents))
    boundaries = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    packed = model(torch.cat(documents, dim=1), cu_seqlens=boundaries)
    separate = torch.cat([model(d) for d in documents], dim=1)
    assert (packed - separate).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), sizes=st.lists(st.integers(4, 24), min_size=2, max_size=5))
def test_documents_without_boundaries_see_each_other(family: str, data: st.DataObject, seed: int, sizes: list[int]) -> None:
    """So that the comparison above can fail."""
    _, model = pair(data.draw(CONFIGS[family]), seed)
    documents = [torch.randint(1, model.config.vocab_size, (1, n)) for n in sizes]
    separate = torch.cat([model(d) for d in documents], dim=1)
    assert (model(torch.cat(documents, dim=1)) - separate).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_generation_with_the_cache_equals_transformers(family: str, data: st.DataObject, seed: int) -> None:
    theirs, ours = pair(data.draw(CONFIGS[family]), seed)
    prompt = torch.randint(1, theirs.config.vocab_size, (1, 7))
    # Together at most max_position_embeddings. Beyond it, transformers uses the dynamic scaling of the longest text so far.
    tokens, count = prompt[0].tolist(), 9
    wanted = theirs.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, tokens, count, Sampling(temperature=0)) == wanted[0, 7:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_texts_that_are_continued_together_are_those_of_each_alone(family: str, data: st.DataObject, seed: int) -> None:
    _, ours = pair(data.draw(CONFIGS[family]), seed)
    lengths, limits = [7, 2, 11, 5], [6, 9, 3, 9]
    prompts = [torch.randint(1, ours.config.vocab_size, (length,)).tolist() for length in lengths]
    together = Continuation(ours, prompts, limits, Sampling(temperature=0), seeds=[0] * 4)
    while together.step():
        if together.generated[3] == 4:
            together.end([3])
    limits[3] = 4
    alone = [generate(ours, prompt, limit, Sampling(temperature=0)) for prompt, limit in zip(prompts, limits, strict=True)]
    assert together.texts == [[*prompt, *ids] for prompt, ids in zip(prompts, alone, strict=True)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 3), experts=st.sampled_from([2, 5]), k=st.integers(1, 2))
def test_the_pooled_balance_loss_is_that_of_transformers(seed: int, layers: int, experts: int, k: int) -> None:
    torch.manual_seed(seed)
    logits = [torch.randn(30, experts, requires_grad=True) for _ in range(layers)]
    wanted = load_balancing_loss_func(tuple(logits), experts, k)  # type: ignore[arg-type]

    class Sums:
        def __init__(self, logits: Tensor) -> None:
            probs = logits.softmax(-1)
            self.probs = probs.sum(0)
            self.load = torch.zeros(experts).index_add_(0, probs.topk(k).indices.flatten(), torch.ones(30 * k))

    mine = pooled_balance(add_pooled(torch.zeros(2, experts), [Sums(x) for x in logits]), 30 * layers)  # type: ignore[misc]
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(mine, wanted)
    for a, b in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(a, b)
