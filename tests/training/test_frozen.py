"""`coterie.update` leaves alone what is frozen, and says how a model with peft's adapters is given."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import coterie
from coterie.errors import UserError

BATCH = {"prompts": [[1, 2]], "completions": [[[3, 4], [5]]], "rewards": [[0.0, 1.0]], "preset": "dr_grpo"}


def test_frozen_weights_do_not_decay(make_model):
    model = make_model("qwen3")
    model.model.layers[0].requires_grad_(False)
    frozen = [parameter.clone() for parameter in model.model.layers[0].parameters()]
    trained = [parameter.clone() for parameter in model.model.layers[1].parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        coterie.update(model, optimiser, **BATCH)
    assert all(torch.equal(a, b) for a, b in zip(model.model.layers[0].parameters(), frozen, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.model.layers[1].parameters(), trained, strict=True))


def test_a_peft_model_is_refused_with_the_way_to_give_it(make_model):
    model = get_peft_model(make_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"]))
    optimiser = torch.optim.AdamW(model.parameters())
    refused = r"PeftModel\w* holds adapters .*with_adapter"
    with pytest.raises(UserError, match=refused):
        coterie.Policy.of(model)
    with pytest.raises(UserError, match=refused):
        coterie.update(model, optimiser, **BATCH)
    with pytest.raises(UserError, match=refused):
        coterie.update(make_model("qwen3"), optimiser, reference=model, **BATCH)
