"""On a GPU its own paths give what the plain ones give: attention over the stream, recorded decoding, a whole run."""

import math

import pytest
import torch
from small_runs import metrics
from test_flex import SEGMENTS, inputs
from test_native import ENDS, SAMPLINGS, some_keys, some_prompts

from coterie.fast.flex import FlexLayout
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout
from coterie.recipe.settings import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = "cuda"


def with_gradients(layout, tensors, settings):
    out = layout.attend(0, *tensors, settings)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), tensors)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_and_its_gradients_are_those_of_dense_blocks(window, softcap):
    settings = AttentionSettings(0.4, window, softcap)
    found = [
        with_gradients(
            kind(SEGMENTS, DEVICE),
            [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in inputs()],
            settings,
        )
        for kind in (FlexLayout, DenseLayout)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_recorded_steps_sample_the_same_tokens(make_model, sampling):
    policy, tokens = Policy.of(make_model("qwen3").to(DEVICE)), []
    for replays in (True, False):
        engine = NativeEngine(policy)
        engine.replays = replays
        groups = engine.generate(some_prompts(9), some_keys(9, 3), sampling, ENDS)
        tokens.append([[completion.tokens for completion in group] for group in groups])
        assert engine.replays == replays  # where a recording fails it is given up
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_one_recording_follows_another(make_model, precision):
    """When rows outgrow the room for their keys, and in the next job."""
    policy = Policy.of(make_model("qwen3", max_position_embeddings=1024).to(DEVICE))
    engine = NativeEngine(policy.in_mixed_precision() if precision == "mixed" else policy)
    for number in range(3):
        engine.generate(some_prompts(4 + number), some_keys(4 + number, 3), Sampling(max_new_tokens=400), ())
        assert engine.replays


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_run_trains_and_its_sampler_is_its_trainer(train, precision):
    folder = train("run", f"device={DEVICE}", f"precision={precision}", "preset=dr_grpo", "loss.kl_weight=0.04")
    for step in range(1, 5):
        found = metrics(folder, step)
        assert all(math.isfinite(value) for value in found.values()), found
        assert found["policy/sampler_gap_max"] <= max(0.01, found.get("policy/sampler_rounding", 0.0))
