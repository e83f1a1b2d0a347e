"""Presets: names for published combinations of independent settings. Plain values, nothing else.

A recipe names one and overrides what it likes; the resolved values are printed and stored with the run. Nothing here imports
torch, so that a recipe can be checked at once.
"""

from typing import Any

_CLIP = {"objective": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300: group mean and sample std, one epsilon, k3 KL to a frozen reference.
    "grpo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {**_CLIP, "aggregation": "sequence_mean", "kl_weight": 0.04},
    },
    # Dr. GRPO, arXiv 2503.20783: no division by the std, none by the completion's own length.
    "dr_grpo": {
        "advantage": {"baseline": "group", "scale": "none"},
        "loss": {**_CLIP, "aggregation": "fixed_length", "kl_weight": 0.0},
    },
    # DAPO, arXiv 2503.14476: the upper bound raised, mean over all tokens, no KL, groups without signal redrawn, and a soft
    # punishment near the length limit, here over its last tenth and with the paper's size of 1.
    "dapo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {**_CLIP, "clip_high": 0.28, "aggregation": "token_mean", "kl_weight": 0.0},
        "dynamic_sampling": {"rounds": 3},
        "overlong": {"treatment": "punish"},
    },
    # GSPO, arXiv 2507.18071: one length-normalised ratio per completion, and bounds to fit it.
    "gspo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            **_CLIP,
            "ratio": "sequence_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean",
            "kl_weight": 0.0,
        },
    },
    # DCPO, arXiv 2509.02333: clip bounds that depend on the sampler's probability of the token. Of the paper's advantage,
    # which also looks at earlier steps, only the group's part is here.
    "dcpo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            **_CLIP,
            "clip_bounds": "dynamic",
            "clip_low": 0.16,
            "clip_high": 0.2,
            "aggregation": "sequence_mean",
            "kl_weight": 0.0,
        },
    },
    # CISPO, MiniMax-M1, arXiv 2506.13585: the weight is clipped from above only, and every token keeps its gradient.
    "cispo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            "objective": "cispo",
            "ratio": "token",
            "clip_low": 1.0,
            "clip_high": 4.0,
            "aggregation": "token_mean",
            "kl_weight": 0.0,
        },
    },
    # SAPO, arXiv 2511.20347: a soft gate in place of the clip.
    "sapo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            "objective": "sapo",
            "ratio": "token",
            "gate_positive": 1.0,
            "gate_negative": 1.05,
            "aggregation": "sequence_mean",
            "kl_weight": 0.0,
        },
    },
    # GMPO, arXiv 2507.20673: the geometric mean of the clipped token ratios.
    "gmpo": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            "objective": "gmpo",
            "clip_low": 0.4,
            "clip_high": 0.4,
            "aggregation": "sequence_mean",
            "kl_weight": 0.0,
        },
    },
    # GDPO, arXiv 2601.05242: each reward normalised in its group, then summed.
    "gdpo": {
        "advantage": {"baseline": "group", "scale": "sample", "combine": "each"},
        "loss": {**_CLIP, "aggregation": "sequence_mean", "kl_weight": 0.0},
    },
    # RLOO, arXiv 2402.14740: REINFORCE with the mean of the others as the baseline, and the KL in the reward.
    "rloo": {
        "advantage": {"baseline": "leave_one_out", "scale": "none"},
        "loss": {
            "objective": "policy_gradient",
            "ratio": "token",
            "aggregation": "sequence_sum",
            "kl_weight": 0.03,
        },
        "kl": {"estimator": "k1", "place": "reward"},
    },
    # REINFORCE++, arXiv 2501.03262: the batch's mean and std, PPO's clip, the KL in the reward.
    "reinforce++": {
        "advantage": {"baseline": "batch", "scale": "batch"},
        "loss": {**_CLIP, "aggregation": "token_mean", "kl_weight": 0.01},
        "kl": {"estimator": "k1", "place": "reward"},
    },
    # REINFORCE++ with a group baseline: the group's mean, the batch's std, and a k2 KL in the loss.
    "reinforce++_baseline": {
        "advantage": {"baseline": "group", "scale": "batch_differences"},
        "loss": {**_CLIP, "aggregation": "token_mean", "kl_weight": 0.01},
        "kl": {"estimator": "k2", "place": "loss"},
    },
    # The anchored objective: no ratio and no clip; held by a mixture of the policy and the reference.
    "anchored": {
        "advantage": {"baseline": "group", "scale": "sample"},
        "loss": {
            "objective": "anchored",
            "anchor_alpha": 0.5,
            "anchor_beta": 1.0,
            "anchor_level": "token",
            "anchor_weight": "advantage",
            "aggregation": "sequence_mean",
            "kl_weight": 0.0,
        },
        "reference": {"kind": "moving", "decay": 0.99},
    },
    # PPO, arXiv 1707.06347, as arXiv 2203.02155 trains language models: a value model, GAE, the KL in the reward.
    "ppo": {
        "method": "ppo",
        "loss": {**_CLIP, "aggregation": "token_mean", "kl_weight": 0.02},
        "kl": {"estimator": "k1", "place": "reward"},
        "optimiser": {"updates_per_batch": 2},
    },
    # DPO, arXiv 2305.18290.
    "dpo": {"method": "dpo", "preference": {"beta": 0.1}},
    # Bradley-Terry, arXiv 2203.02155.
    "reward_model": {"method": "reward_model"},
    "sft": {"method": "sft"},
}
