"""What a value model learns and what it is for, as in PPO: advantages per token, and the loss of the values.

Legend: N completion tokens of a stream, B its rows, L tokens of the longest.
"""

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, values: Tensor, row_lengths: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: rewards [N], values [N], row_lengths [B] -> (advantages [N], returns [N]).

    values[n] is what the value model expects before the policy writes token n; after a row's last token it is 0. With
    d_n = r_n + discount * v_{n+1} - v_n the advantage is the sum of d_{n+i} (discount * gae_lambda)^i over the rest of the row,
    and the return, which the value model learns, is the advantage plus the value. No gradient.
    Source: arXiv 1506.02438, equation 16.
    """
    if not len(values):
        return values.detach().clone(), values.detach().clone()
    parts = zip(rewards.detach().split(row_lengths.tolist()), values.detach().split(row_lengths.tolist()), strict=True)
    padded_rewards, padded_values = (torch.nn.utils.rnn.pad_sequence(list(x)) for x in zip(*parts, strict=True))
    advantages = torch.zeros_like(padded_values)  # [L, B]
    carried = next_value = torch.zeros_like(padded_values[0])  # padding has reward and value 0, and carries 0
    for step in range(len(padded_values) - 1, -1, -1):
        surprise = padded_rewards[step] + discount * next_value - padded_values[step]
        carried = advantages[step] = surprise + discount * gae_lambda * carried
        next_value = padded_values[step]
    inside = torch.arange(len(padded_values), device=row_lengths.device)[:, None] < row_lengths  # [L, B]
    flat = advantages.T[inside.T]
    return flat, flat + values.detach()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2: [N] each -> [N].

    The value model, like the policy, moves only so far on one batch of samples. Source: the code of arXiv 1707.06347, as
    described in https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details, detail 9.
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (held - returns).square()) / 2
