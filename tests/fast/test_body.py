"""Our forward pass of the Llama family, and its attention, give what the slow and obvious ways give."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from coterie.fast.cascade import Cascade
from coterie.fast.serve import Policy
from coterie.fast.stream import StreamLayout
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout

SEGMENTS = [(5, (4, 17, 1)), (11, (2, 3)), (3, (9,)), (1, (6, 30, 8, 2)), (23, (5, 5)), (7, ())]
NUM_TOKENS = sum(prompt + sum(lengths) for prompt, lengths in SEGMENTS)
SETTINGS = AttentionSettings(0.3, None, None)


def some_stream():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(61, (NUM_TOKENS,), generator=generator)
    positions = torch.cat(
        [part for p, ls in SEGMENTS for part in (torch.arange(p), *(torch.arange(p, p + n) for n in ls))]
    )
    return tokens, positions


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral"])
def test_states_and_gradients_equal_those_of_the_model_s_layers(make_model, architecture):
    ours = Policy.of(
        make_model(architecture, sliding_window=5) if architecture == "mistral" else make_model(architecture)
    )
    assert ours.body is not None
    model = ours.model.double()
    weights = torch.randn(NUM_TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for policy in (ours, replace(ours, body=None)):
        model.zero_grad()
        states = policy.run(*some_stream(), StreamLayout(SEGMENTS))
        (states * weights).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in model.base_model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()  # their norms compute in float32
    with torch.no_grad():
        torch.testing.assert_close(ours.run(*some_stream(), StreamLayout(SEGMENTS)), found[0][0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_last_layer_runs_where_it_is_wanted(make_model, recomputes):
    """In float64 the states and gradients of some places are those of a run of all of them."""
    policy = Policy.of(make_model("qwen3"))
    policy.model.double()
    policy = policy.recomputing() if recomputes else policy
    places = torch.tensor([4, 5, 9, 30, NUM_TOKENS - 1])
    found = []
    for some in (None, places):
        policy.model.zero_grad()
        states = policy.run(*some_stream(), StreamLayout(SEGMENTS), some)
        states = states[places] if some is None else states
        states.sin().sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in policy.model.base_model.parameters())])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "gemma2", "phi", "phi3", "olmo2", "gpt_neox"])
def test_other_architectures_keep_their_own_pass(make_model, architecture):
    policy = Policy.of(make_model(architecture))
    assert policy.served == "stream"
    assert policy.body is None


@pytest.mark.parametrize("setting", ["residual_multiplier", "embedding_multiplier"])
def test_a_factor_that_our_pass_does_not_know_is_noticed(make_model, setting):
    assert Policy.of(make_model("granite")).body is not None
    assert Policy.of(make_model("granite", **{setting: 1.5})).body is None


def test_half_precision_keeps_norms_in_float32(make_model):
    assert Policy.of(make_model("qwen3").bfloat16()).body is None


def test_a_model_that_only_looks_alike_keeps_its_own_pass(make_model):
    model = make_model("llama")

    class TwiceNormedRMSNorm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.variance_epsilon, self._norm = norm.weight, norm.variance_epsilon, [norm]

        def forward(self, x):
            return self._norm[0](self._norm[0](x)) + 0.1

    model.model.layers[1].input_layernorm = TwiceNormedRMSNorm(model.model.layers[1].input_layernorm)
    policy = Policy.of(model)
    assert policy.served == "stream"
    assert policy.body is None


def test_a_copy_of_a_policy_runs_its_own_weights(make_model):
    policy = Policy.of(make_model("qwen3"))
    frozen = copy.deepcopy(policy)
    with torch.no_grad():
        before = frozen.run(*some_stream(), StreamLayout(SEGMENTS))
        for parameter in policy.model.parameters():
            parameter.zero_()
        assert torch.equal(frozen.run(*some_stream(), StreamLayout(SEGMENTS)), before)


def test_without_compiled_loops_a_model_keeps_its_own_pass(make_model, without_kernels):
    policy = Policy.of(make_model("qwen3"))
    assert policy.served == "stream"
    assert policy.body is None


def queries_keys_values(num_heads, num_kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    return [
        torch.randn(NUM_TOKENS, heads, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def dense(q, k, v, settings=SETTINGS):
    return DenseLayout(SEGMENTS).attend(0, *(x.transpose(0, 1)[None] for x in (q, k, v)), settings)[0]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_the_cascade_equals_dense_blocks_with_gradients(heads):
    inputs = queries_keys_values(*heads)
    weights = torch.randn(NUM_TOKENS, heads[0], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = []
    for attended in (Cascade(SEGMENTS).attend(*inputs, SETTINGS.scaling), dense(*inputs)):
        found.append([attended, *torch.autograd.grad((attended * weights).sum(), inputs)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_the_cascade_stays_finite_where_padding_would_overflow():
    """A padded place repeats a token that read fewer keys; its weights, taken literally, would be infinite."""
    inputs = queries_keys_values(2, 2, torch.float32)
    scaled = [(x * 60).detach().requires_grad_() for x in inputs[:2]] + [inputs[2]]
    gradients = torch.autograd.grad(Cascade(SEGMENTS).attend(*scaled, 1.0).sum(), scaled)
    assert all(gradient.isfinite().all() for gradient in gradients)
    expected = torch.autograd.grad(dense(*scaled, AttentionSettings(1.0, None, None)).sum(), scaled)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [3, 20, 200])
def test_a_window_is_kept_wherever_it_ends(window, each_way):
    inputs = queries_keys_values(2, 2)
    settings = AttentionSettings(0.3, window, None)
    layout = StreamLayout(SEGMENTS)
    attended = layout.attend(0, *(x.transpose(0, 1)[None] for x in inputs), settings)[0]
    torch.testing.assert_close(attended, dense(*inputs, settings), rtol=1e-11, atol=1e-11)
    unlimited = dense(*inputs)
    assert torch.allclose(attended, unlimited) == (window >= 33)  # the longest row has 33 tokens
