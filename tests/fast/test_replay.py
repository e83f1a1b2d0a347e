"""Steps of decoding in static shapes, as a GPU records and replays them, sample what others sample. The recording itself needs a GPU."""

import pytest
import torch
from conftest import SHAPES
from test_native import ENDS, SAMPLINGS, some_keys, some_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.fast import native, replay
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.recipe.settings import Sampling

pytestmark = pytest.mark.usefixtures("without_kernels")
SERVED = [name for name in SHAPES if name not in ("gpt_oss", "doge")]
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "_to_copy", "lift_fresh")


def engine_of(model, replays):
    engine = NativeEngine(Policy.of(model))
    engine.replays = replays
    return engine


def tokens_of(groups):
    return [[c.tokens for c in group] for group in groups]


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize("copied", [0, pytest.param(1000, marks=pytest.mark.slow)])
def test_static_steps_sample_the_same_tokens(make_model, monkeypatch, architecture, copied):
    monkeypatch.setattr(native, "_COPIED_PROMPT", copied)
    model, prompts, keys = make_model(architecture), some_prompts(9), some_keys(9, 3)
    outgrowing = Sampling(max_new_tokens=90, max_rows=10)  # more tokens than there is room for at first
    for sampling in (SAMPLINGS["truncated"], outgrowing):
        found, expected = (
            engine_of(model, replays).generate(prompts, keys, sampling, ENDS) for replays in (True, False)
        )
        assert tokens_of(found) == tokens_of(expected)


class NothingWaits(TorchDispatchMode):
    """Refuses operations whose result the host has to wait for, and tensors that come from the host: a recording can't hold them."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().split("::")[1].split(".")[0]
        copies = name == "_to_copy" and (keywords or {}).get("device") is None  # another type, on the device
        assert name not in WAITS or copies, f"{name} waits for the device"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("architecture", SERVED)
def test_a_step_waits_for_nothing_and_needs_nothing_of_the_host(make_model, monkeypatch, architecture):
    compute, num_steps = replay._Step._compute, []

    def watched(step):
        num_steps.append(step)
        with NothingWaits():
            return compute(step)

    monkeypatch.setattr(replay._Step, "_compute", watched)
    engine_of(make_model(architecture), True).generate(
        some_prompts(4), some_keys(4, 3), Sampling(max_new_tokens=8), ENDS
    )
    assert len(num_steps) > 4


def test_the_watch_sees_what_waits():
    for waits in (lambda: torch.ones(2).sum().item(), lambda: torch.ones(2).nonzero(), lambda: torch.tensor([1, 2])):
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            waits()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can record")
def test_where_recording_fails_sampling_goes_on_without_it(make_model, monkeypatch):
    """torch refuses to record on a machine that has no GPU."""
    monkeypatch.setattr(replay, "_records_on", lambda device: True)
    model, prompts, keys = make_model("qwen3"), some_prompts(4), some_keys(4, 3)
    engine = engine_of(model, True)
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower") as warned:
        found = [engine.generate(prompts, keys, Sampling(max_new_tokens=30), ENDS) for _ in range(2)]
    assert len(warned) == 1
    assert not engine.replays
    expected = engine_of(model, False).generate(prompts, keys, Sampling(max_new_tokens=30), ENDS)
    assert tokens_of(found[0]) == tokens_of(found[1]) == tokens_of(expected)
