"""Groups of tokens as one stream, and as the plain model runs them."""

import os
import warnings

import torch

from coterie.fast.serve import Policy
from coterie.rollouts.pack import Row, make_stream

DEVICE = os.environ.get("COTERIE_TEST_DEVICE", "cpu")  # where `make_model` puts its models


def stream_of(groups):
    """Pairs of a prompt and its completions, all of them token ids, in one stream."""
    rows = [(prompt, [Row(c, torch.zeros(len(c))) for c in completions]) for prompt, completions in groups]
    return make_stream(rows).to(DEVICE)


def plain_logprobs(model, groups, temperature=1.0):
    """Each row alone through the unmodified model, without packing, sharing or padding: [N]."""
    parts = []
    for prompt, completions in groups:
        for completion in completions:
            logits = (
                model(input_ids=torch.tensor([prompt + completion], device=DEVICE), use_cache=False).logits[0].float()
            )
            logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            parts.append(logprobs.gather(1, torch.tensor(completion, device=DEVICE)[:, None])[:, 0])
    return torch.cat(parts)


def policy_of(model):
    """The model as a policy, without the warning that it runs padded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Policy.of(model)
