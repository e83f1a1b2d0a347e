"""Small real models and recipes that the tests share."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from small_runs import TINY, trained_on_letters
from small_streams import DEVICE
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.fast.kernels.build import library

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SHAPES = {
    "qwen3": {**SMALL, "head_dim": 8},
    "qwen2": SMALL,
    "llama": SMALL,
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": None,
             "eos_token_id": None},
    "mistral": {**SMALL, "sliding_window": 5},
    "gemma": {**SMALL, "head_dim": 8},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 5},
    "phi": SMALL,
    "phi3": {**SMALL, "pad_token_id": 0},
    "olmo2": SMALL,
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "granite": {**SMALL, "logits_scaling": 3.0},
    "gpt_oss": {**SMALL, "head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "doge": SMALL,
}  # fmt: skip


def some_quick(names, *quick):
    """All of them as parameters, of which only a few belong to the quick tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True, scope="session")
def no_home_of_the_users(tmp_path_factory):
    """Tests remember nothing in the user's home, and nothing of what was trusted there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a machine that has no C compiler."""
    from coterie.fast import decoder
    from coterie.fast.kernels import calls

    for module in (calls, decoder):
        monkeypatch.setattr(module, "library", lambda dtype: None)


@pytest.fixture(params=["compiled", "tensors"])
def each_way(request):
    """Once through compiled loops and once through tensor operations."""
    if request.param == "tensors":
        request.getfixturevalue("without_kernels")
    else:
        assert library(torch.float32) is not None, "the tests need a C compiler: cc"


@pytest.fixture
def make_model():
    """Build a small model of an architecture, with weights large enough that a mistake shows."""

    def build(architecture: str, **settings):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **{**SHAPES[architecture], **settings})
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval().to(DEVICE)

    return build


@pytest.fixture
def tiny_recipe():
    """Overrides that make the equations recipe run in seconds."""
    return list(TINY)


@pytest.fixture
def train(tmp_path):
    """Train the tiny recipe on letters, into a folder of this name."""
    return lambda name, *more, **options: trained_on_letters(tmp_path / name, *more, **options)
