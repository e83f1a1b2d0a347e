"""Mixed precision: products of bfloat16 numbers, and what they change."""

import copy
import ctypes
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_streams import policy_of, stream_of

from coterie.fast import half_head, native
from coterie.fast.decoder import Decoder
from coterie.fast.half import Halves, has_half_products, product, weights_rounded
from coterie.fast.half_head import HalfLogprobs
from coterie.fast.kernels.build import library
from coterie.fast.native import NativeEngine
from coterie.fast.serve import make_engine
from coterie.fast.tiles import plain_head
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy as PlainPolicy
from coterie.recipe.settings import Lora, Optimiser, Sampling
from coterie.rollouts.pack import Row, make_stream
from coterie.rollouts.padded import PaddedEngine
from coterie.training.step import make_optimiser, take_step

compiled = pytest.mark.skipif(not has_half_products(), reason="no AVX512-BF16 and no AMX here")
GROUPS = [([5, 9, 3, 7], [[8, 2, 4], [6, 6], [1, 30, 12, 44, 2]]), ([11, 12], [[3], [9, 8, 7, 6, 5, 4, 3]])]
LONGER = [
    ([(7 * g + i) % 60 for i in range(20)], [[(g * r + i) % 59 for i in range(9 + 5 * r)] for r in range(5)])
    for g in range(4)
]


def rounded(x):
    return x.to(torch.bfloat16).float()


@compiled
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 64])
@pytest.mark.parametrize(("inner", "outer"), [(16, 16), (31, 1), (128, 161), (577, 96)])
def test_products_are_those_of_rounded_numbers(rows, inner, outer):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, outer))
    wanted = rounded(x).double() @ rounded(weight).double().t()
    found = product(x, Halves().packed(weight), slice(0, outer))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@compiled
def test_what_decoding_calls_writes_its_outputs_and_nothing_else():
    """As BLAS's product: rounded, and added to what is there where beta is 1."""
    weight, x, around = torch.randn(45, 70), torch.randn(19, 70), torch.full((19 * 45 + 32,), 7.0)
    packed, y = Halves().packed(weight), around[: 19 * 45]
    numbers = [ctypes.byref(ctypes.c_int(n)) for n in (45, 19, 70)]
    for beta in (0.0, 1.0):
        y.fill_(0.5)
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (packed, x, y)]
        library(torch.float32).half_gemm(
            *(None, None, *numbers, None, addresses[0], None, addresses[1], None),
            *(ctypes.byref(ctypes.c_float(beta)), addresses[2], None, ctypes.c_size_t(1), ctypes.c_size_t(1)),
        )
        wanted = rounded(product(x, packed, slice(0, 45))) + 0.5 * beta
        assert torch.equal(y.view(19, 45), wanted)
    assert (around[19 * 45 :] == 7).all()


@compiled
def test_a_weight_that_is_no_number_stays_none():
    weight = torch.ones(32, 32)
    weight[3, 4] = torch.nan
    weight[5, 6] = torch.inf
    found = product(torch.ones(2, 32), Halves().packed(weight), slice(0, 32))
    assert found[:, 3].isnan().all()
    assert (found[:, 5] == torch.inf).all()
    assert found[:, [0, 1, 2, 4, 6]].isfinite().all()


def test_copies_follow_a_weight_that_an_optimiser_changed(make_model):
    policy = policy_of(make_model("qwen3")).in_mixed_precision()
    stream, optimiser = stream_of(GROUPS), make_optimiser(policy, Optimiser(learning_rate=1e-2))
    before = token_logprobs(policy, stream).detach()
    take_step(optimiser, [stream], lambda n, s: -token_logprobs(policy, s).mean(), policy.device, 1.0)
    after = token_logprobs(policy, stream).detach()
    fresh = token_logprobs(policy_of(copy.deepcopy(policy.model)).in_mixed_precision(), stream).detach()
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(after, fresh)


@compiled
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 16, 5), (33, 40, 61), (150, 96, 1100)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_head_s_softmax_is_that_of_its_logits(rows, inner, outer, temperature, has_bias, has_gradient, monkeypatch):
    """And its gradients, of columns that are taken in parts, added to what the weight has."""
    monkeypatch.setattr(half_head, "COLUMNS", 512)
    generator = torch.Generator().manual_seed(rows)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inner), (outer, inner), (outer,))
    )
    targets, grad = torch.randint(0, outer, (rows,), generator=generator), torch.randn(rows, generator=generator)
    before = torch.randn(outer, inner, generator=generator) if has_gradient else None
    exact = [rounded(hidden).double(), rounded(weight).double(), bias.double()]
    leaves = [hidden, weight, bias]
    for leaf in (*leaves, *exact):
        leaf.requires_grad_()
    weight.grad = before.clone() if has_gradient else None
    logits = exact[0] @ exact[1].t() + (exact[2] if has_bias else 0)
    wanted = (logits / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    found = HalfLogprobs.apply(hidden, weight, bias if has_bias else None, targets, temperature, Halves())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.backward(grad)
    wanted.backward(grad.double())
    for leaf, of_exact in zip(leaves[: 2 + has_bias], exact, strict=False):
        mine = leaf.grad - before if leaf is weight and has_gradient else leaf.grad
        assert (mine - of_exact.grad).norm() < 0.01 * of_exact.grad.norm()


def gradients(policy, stream):
    policy.model.zero_grad()
    logprobs = token_logprobs(policy, stream)
    logprobs.mean().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@compiled
@pytest.mark.parametrize("groups", [GROUPS, LONGER], ids=["few", "many"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral"])
def test_loops_are_as_exact_as_autocast(make_model, architecture, groups):
    """Against float64, the fast pass is no further off than the model's own layers in autocast are."""
    plain = policy_of(make_model(architecture))
    stream = stream_of(groups)
    exact = gradients(replace(policy_of(copy.deepcopy(plain.model).double()), body=None), stream)
    fast, slow = plain.in_mixed_precision(), PlainPolicy.in_mixed_precision(plain)
    assert fast.body.halves is not None
    assert slow.body is None

    def off(found):
        return (found[0] - exact[0]).norm() / exact[0].norm(), max(
            ((grad - exact[1][name]).norm() / exact[1][name].norm()).item() for name, grad in found[1].items()
        )

    (mine, mine_of_grads), (theirs, theirs_of_grads) = off(gradients(fast, stream)), off(gradients(slow, stream))
    assert mine < 1.5 * theirs + 1e-4
    assert mine_of_grads < 1.5 * theirs_of_grads + 1e-3
    assert mine_of_grads < 0.05


@pytest.mark.parametrize(("architecture", "lora"), [("qwen3", False), ("gpt2", False), ("qwen3", True)])
def test_sampler_and_trainer_agree_up_to_rounding(make_model, architecture, lora):
    policy = policy_of(make_model(architecture))
    if lora:
        policy = policy.with_adapter(Lora(rank=3), seed=0)
        for _, parameter in policy.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    policy = policy.in_mixed_precision()
    engine = make_engine(policy)
    assert (Decoder.of(policy, 20) is not None) == (architecture == "qwen3" and has_half_products())
    assert isinstance(engine, NativeEngine)
    prompts = [[5, 9, 3, 7], [11, 12]]
    made = engine.generate(prompts, torch.arange(8).view(2, 4), Sampling(max_new_tokens=12), [])
    rows = [[Row(one.tokens, one.logprobs) for one in of_prompt] for of_prompt in made]
    stream = make_stream(list(zip(prompts, rows, strict=True)))
    gap = (token_logprobs(policy, stream).detach() - stream.sampler_logprobs).abs()
    assert gap.max() < 0.05
    again = engine.generate(prompts, torch.arange(8).view(2, 4), Sampling(max_new_tokens=12), [])
    assert [[one.tokens for one in of] for of in again] == [[one.tokens for one in of] for of in made]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
def test_logits_are_not_rounded_where_the_model_s_own_layers_run(make_model, architecture):
    """As on a GPU. What comes of it is as exact as autocast, and logits are products of rounded numbers, as float32 has them."""
    plain, stream = policy_of(make_model(architecture)), stream_of(GROUPS)
    exact = gradients(replace(policy_of(copy.deepcopy(plain.model).double()), body=None), stream)
    ours, autocast = plain.in_mixed_precision(), PlainPolicy.in_mixed_precision(plain)
    assert ours.body is None
    assert plain_head(ours) is not None

    def off(found):
        grads = [(found[1][name] - exact[1][name]).norm() / exact[1][name].norm() for name in found[1]]
        return (found[0] - exact[0]).norm().item(), max(grads).item()

    mine, theirs = off(gradients(ours, stream)), off(gradients(autocast, stream))
    assert mine[0] < 1.5 * theirs[0] + 1e-4
    assert mine[1] < 1.5 * theirs[1] + 1e-3
    hidden = ours.head_inputs(stream).detach()
    head = ours.model.get_output_embeddings()
    with torch.no_grad():
        logits = ours.logits(hidden)
    torch.testing.assert_close(logits, rounded(hidden) @ rounded(head.weight).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_are_rounded_once_sample_the_same_bits(make_model, monkeypatch, lora):
    policy = replace(policy_of(make_model("qwen2")), body=None).in_mixed_precision()
    policy = policy.with_adapter(Lora(rank=2), seed=0) if lora else policy
    before = [(parameter, parameter.clone()) for parameter in policy.model.parameters()]
    found = []
    for rounds in (weights_rounded, lambda model, but: nullcontext()):
        monkeypatch.setattr(native, "weights_rounded", rounds)
        made = NativeEngine(policy).generate(
            [[5, 9, 3, 7], [11, 12]], torch.arange(8).view(2, 4), Sampling(max_new_tokens=12), []
        )
        found.append([(one.tokens, one.logprobs.tolist()) for of_prompt in made for one in of_prompt])
    assert found[0] == found[1]
    for (parameter, held), now in zip(before, policy.model.parameters(), strict=True):
        assert now is parameter
        assert torch.equal(now, held)


def test_a_model_that_runs_padded_runs_in_mixed_precision_too(make_model):
    policy = replace(policy_of(make_model("llama")), served="padded", body=None).in_mixed_precision()
    stream = stream_of(GROUPS)
    exact = token_logprobs(replace(policy, mixed=False), stream)
    found = token_logprobs(policy, stream)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.05
    made = PaddedEngine(policy).generate([[5, 9]], torch.arange(2).view(1, 2), Sampling(max_new_tokens=3), [])
    assert all(len(one.tokens) == 3 for one in made[0])


def test_gradients_are_sums_over_micro_batches(make_model):
    """In float32: cut in two, a batch gives what it gives at once, up to the rounding of products."""
    policy = policy_of(make_model("qwen3")).in_mixed_precision()
    found = []
    for streams in ([stream_of(GROUPS)], [stream_of([group]) for group in GROUPS]):
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for stream in streams:
            token_logprobs(policy, stream).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert found[0].dtype == torch.float32
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


def test_an_adapter_acts_in_mixed_precision_as_exactly_as_in_autocast(make_model):
    policy = policy_of(make_model("llama")).with_adapter(Lora(rank=2), seed=0).in_mixed_precision()
    stream = stream_of(GROUPS)
    before = token_logprobs(policy, stream).detach()
    for _, parameter in policy.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))

    def found(policy):
        """Log-probabilities, and the gradient of each matrix."""
        for _, parameter in policy.named_parameters():
            parameter.grad = None
        logprobs = token_logprobs(policy, stream)
        logprobs.mean().backward()
        grads = [parameter.grad for _, parameter in policy.named_parameters()]
        assert all(grad.abs().sum() > 0 for grad in grads)
        return logprobs.detach(), torch.cat([grad.flatten() for grad in grads])

    exact = found(replace(policy, mixed=False, body=None))
    mine, theirs = (
        [(a - b).norm() / b.norm() for a, b in zip(found(one), exact, strict=True)]
        for one in (policy, PlainPolicy.in_mixed_precision(policy))
    )
    assert (exact[0] - before).abs().max() > 0.01
    assert mine[0] < 1.5 * theirs[0] + 1e-4
    assert mine[1] < 1.5 * theirs[1] + 1e-3
