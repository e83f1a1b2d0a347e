"""How a model is served is decided by what it is: what fresh weights, few tokens or half precision hide is found at the start."""

import pytest
import torch
from architectures import tiny_model
from small_streams import plain_logprobs, stream_of
from test_every_architecture import LOGPROBS, some_groups

from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.fast.stream import StreamLayout
from coterie.fast.tiles import plain_head
from coterie.models.logprobs import token_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:.*can't share prompts")


def grow(model):
    """What training does to weights, at once."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def difference(policy):
    groups = some_groups()
    return (token_logprobs(policy, stream_of(groups)) - plain_logprobs(policy.model, groups)).abs().max().item()


@pytest.mark.parametrize(
    ("architecture", "settings", "served"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "stream"),  # a layer without rotary positions
        ("phimoe", {"sliding_window": 5}, "stream"),  # a window that stands in the mask alone
        ("lfm2", {}, "padded"),  # a state that runs on from token to token
        ("jamba", {}, "padded"),
        ("doge", {}, "padded"),  # a mask that depends on what is read
        ("diffllama", {}, "padded"),  # attention twice in a layer
        ("llama4_text", {}, "padded"),  # attention in chunks
    ],
)
def test_a_fresh_model_is_served_by_what_stays_right_later(architecture, settings, served):
    policy = Policy.of(tiny_model(architecture, **settings))
    assert policy.served == served
    grow(policy.model)
    assert difference(policy) < LOGPROBS


@pytest.mark.parametrize("architecture", ["doge", "jamba", "openai-gpt", "recurrent_gemma", "qwen3_next"])
def test_half_precision_hides_no_difference(architecture):
    assert Policy.of(tiny_model(architecture).bfloat16()).served == "padded"


def test_a_factor_that_begins_at_a_far_position_is_noticed():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 16384}
    scaled, plain = (
        Policy.of(tiny_model("ministral3", rope_parameters={**rope, "llama_4_scaling_beta": beta}))
        for beta in (0.5, 0.0)
    )
    assert scaled.served == plain.served == "stream"
    assert scaled.body is None
    assert plain.body is not None


@pytest.mark.parametrize(("architecture", "settings"), [("bert", {"is_decoder": False}), ("cpmant", {})])
def test_a_model_that_reads_ahead_is_refused(architecture, settings):
    with pytest.raises(UserError, match="changes with the tokens after it"):
        Policy.of(tiny_model(architecture, **settings))


def test_a_model_that_needs_more_than_tokens_is_refused():
    with pytest.raises(UserError, match="XmodForCausalLM can't be run on tokens alone"):
        Policy.of(tiny_model("xmod"))


def test_finding_out_leaves_the_model_as_it_was():
    model = tiny_model("qwen3")
    next(model.parameters()).requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert Policy.of(model).body is not None
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_called_that(make_model, value):
    model = make_model("qwen3", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(UserError, match=r"what .* makes of tokens is not finite"):
        Policy.of(model)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("cohere", {"logit_scale": 0.3}), ("cohere2", {"logit_scale": 3.0}), ("granite", {"logits_scaling": 3.0})],
)
def test_what_follows_the_head_is_the_models(architecture, settings):
    """Which a policy computes by itself, on hidden states: scaled as the model scales them."""
    model, tokens = tiny_model(architecture, **settings), torch.arange(3, 20)[None]
    policy = Policy.of(model)
    assert (policy.served, plain_head(policy)) == ("stream", None)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(policy.logits(hidden), model(input_ids=tokens).logits, rtol=0, atol=1e-6)


def test_a_model_that_sees_pictures_is_served_by_its_text():
    """Its text has a configuration of its own, which says how it attends."""
    model = tiny_model("gemma3")
    model.config.text_config._attn_implementation = "eager"
    before = model.config._attn_implementation, model.config.text_config._attn_implementation
    policy = Policy.of(model)
    assert policy.served == "stream"
    assert policy.windows == {0: 5, 1: None}
    assert difference(policy) < LOGPROBS
    assert (model.config._attn_implementation, model.config.text_config._attn_implementation) == before


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "exaone4"])
def test_windows_are_those_of_their_layers_alone(architecture):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    policy = Policy.of(tiny_model(architecture, layer_types=kinds))
    assert policy.windows == {0: None, 1: 5, 2: None}
    assert difference(policy) < LOGPROBS


class Once(torch.autograd.Function):
    """Has a gradient once, as what torch compiles for a GPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        assert not torch._C._autograd._get_current_graph_task_keep_graph()
        return grad


def test_attention_that_has_a_gradient_once_is_served(make_model, monkeypatch):
    attend = StreamLayout.attend
    monkeypatch.setattr(StreamLayout, "attend", lambda *arguments: Once.apply(attend(*arguments)))
    assert Policy.of(make_model("qwen3")).served == "stream"
