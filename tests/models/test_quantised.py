"""A base in 8 or 4 bits: what its codes stand for, its product and gradient, and the same numbers wherever they are used."""

import pytest
import torch
from conftest import some_quick
from torch import nn

from coterie.errors import UserError
from coterie.fast.serve import Policy, make_engine
from coterie.models.adapters import check_lora, dequantise, quantise
from coterie.models.logprobs import token_logprobs
from coterie.models.quantised import BLOCK, FORMS, Int4, Int8, Quantised, num_packed, num_weights
from coterie.recipe.settings import Lora, Reference, Sampling
from coterie.rollouts.pack import Row, make_stream
from coterie.training.reference import make_reference

BASES = ("int8", "int4")
STREAM = make_stream([([3, 4, 5], [Row.written([6, 7]), Row.written([8, 9, 10, 11])]), ([13], [Row.written([14, 15])])])


def linear(out, of, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(of, out, bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def stir(policy, scale=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def logprobs(policy):
    with torch.no_grad():
        return token_logprobs(policy, STREAM)


def test_eight_bits_are_the_nearest_of_255_values_of_each_output():
    """Of steps of 1/64, 0 and 1/32, which are numbers of 16 bits."""
    weight = torch.tensor([[127, -63.7, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0], [-127, 127, 1.6, 50.2]]) * torch.tensor(
        [[1 / 64], [0.0], [1 / 32]]
    )
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(weight)
    packed = Int8(layer)
    assert packed.scales.tolist() == [1 / 64, 0, 1 / 32]
    assert packed.codes.T.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 127, 2, 50]]
    assert torch.equal(packed.weight, packed.codes.T * packed.scales.float()[:, None])


def test_four_bits_are_sixteen_steps_between_lowest_and_highest_of_a_block():
    weight = torch.arange(BLOCK) * 0.25 - 2  # from -2 to 5.75: steps of 7.75 / 15
    layer = nn.Linear(BLOCK, 1, bias=False)
    layer.weight = nn.Parameter(weight[None])
    packed = Int4(layer)
    step = torch.tensor(7.75 / 15).half().item()
    assert packed.lowest.item() == -2
    assert packed.scales.item() == step
    codes = torch.cat([packed.codes[0, :, 0] & 15, packed.codes[0, :, 0] >> 4])
    assert codes.tolist() == [round(i * 0.25 / step) for i in range(BLOCK)]
    torch.testing.assert_close(packed.weight[0], codes * step - 2)


@pytest.mark.parametrize("width", [BLOCK, 5 * BLOCK, 48, 7])
@pytest.mark.parametrize("base", BASES)
def test_no_weight_is_further_off_than_half_a_step(base, width):
    layer = linear(24, width)
    off = (FORMS[base](layer).weight - layer.weight).abs()
    if base == "int8":
        steps = layer.weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)  # the scale is rounded
    else:  # of the block, and what rounding the step and the lowest to 16 bits moves
        blocks = nn.functional.pad(layer.weight, (0, -width % BLOCK)).view(24, -1, BLOCK)
        steps = ((blocks.amax(2) - blocks.amin(2)) / 15 + 0.01).repeat_interleave(BLOCK, 1)[:, :width]
    assert (off <= 0.5 * steps + 1e-6).all()


def test_what_four_bits_stood_for_is_packed_again_without_loss():
    """As of a file of Q4_1: block after block the same codes."""
    once = Int4(linear(24, 96)).plain()
    again = Int4(once)
    torch.testing.assert_close(again.weight, once.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_product_and_gradient_are_those_of_the_weight(base, bias):
    packed = FORMS[base](linear(24, 48, bias))
    plain = packed.plain()
    x = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for layer, given in ((packed, ours), (plain, theirs)):
        layer(given).sin().sum().backward()
    torch.testing.assert_close(packed(x), plain(x))
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert packed.codes.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        half = packed(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain(x).detach(), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_sampler_trainer_and_reference_compute_with_the_same_weights(make_model, base, mixed):
    """And with those that the model has when it is made plain: what is exported."""
    policy = Policy.of(make_model("llama"))
    policy = policy.in_mixed_precision() if mixed else policy
    start = logprobs(policy)
    policy = policy.with_adapter(Lora(rank=3, base=base), seed=0)
    reference = make_reference(policy, Reference())
    packed = logprobs(policy)
    assert torch.equal(logprobs(reference), packed)
    assert not torch.equal(packed, start)
    stir(policy)
    prompts, keys = [[3, 4, 5], [13]], torch.arange(6).view(2, 3)
    made = make_engine(policy).generate(prompts, keys, Sampling(max_new_tokens=6), [])
    stream = make_stream(
        [(prompt, [Row(c.tokens, c.logprobs) for c in group]) for prompt, group in zip(prompts, made, strict=True)]
    )
    with torch.no_grad():
        own = token_logprobs(policy, stream)
    bound = 0.1 if mixed else 1e-4
    torch.testing.assert_close(stream.sampler_logprobs, own, rtol=0, atol=bound)
    moved = logprobs(policy)
    policy.adapter.merge()
    assert not any(isinstance(module, Quantised) for module in policy.model.modules())
    plain = Policy.of(policy.model)
    torch.testing.assert_close(logprobs(plain.in_mixed_precision() if mixed else plain), moved, rtol=0, atol=bound)


@pytest.mark.parametrize("architecture", some_quick(["llama", "qwen2", "qwen3", "gemma2", "mistral"], "qwen3"))
@pytest.mark.parametrize("base", BASES)
def test_a_packed_model_is_the_model_of_its_plain_weights(make_model, architecture, base):
    """Whatever reads the layers: the stream, activation checkpointing, and the gate that tries a model."""
    model = make_model(architecture)
    weights = sum(parameter.numel() for parameter in model.parameters())
    quantise(model, base)
    assert num_weights(model) == weights
    assert 0 < num_packed(model)[0] < weights
    policy = Policy.of(model)
    policy = policy.recomputing().with_adapter(Lora(rank=2, base=base), seed=0)
    stir(policy)
    token_logprobs(policy, STREAM).sin().sum().backward()
    found = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        name for name, one in model.named_parameters() if ".lora_" in name
    }
    for layer in policy.adapter.layers.values():
        layer.base_layer = layer.base_layer.plain().requires_grad_(False)
    for _, parameter in policy.named_parameters():
        parameter.grad = None
    token_logprobs(policy, STREAM).sin().sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name], rtol=1e-3, atol=1e-5)


def test_a_model_is_made_plain_again(make_model):
    model = make_model("qwen2")
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    quantise(model, "int8")
    assert {name: parameter.shape for name, parameter in model.named_parameters()} != names
    dequantise(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names


def test_a_model_without_such_layers_is_refused(make_model):
    config = make_model("gpt2").config
    check_lora(config, Lora())
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers that can be kept in int8"):
        check_lora(config, Lora(base="int8"))
