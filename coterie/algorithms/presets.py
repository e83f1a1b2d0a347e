"""Presets: names for published combinations of independent settings. Plain values, nothing else.

A recipe names one and overrides what it likes; the resolved values are printed and stored with the run.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # DeepSeekMath, arXiv 2402.03300: group mean and sample std, one epsilon, k3 KL to a frozen reference.
    "grpo": {
        "advantage": {"scale": "sample"},
        "loss": {
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "sequence_mean",
            "kl_weight": 0.04,
        },
    },
    # Dr. GRPO, arXiv 2503.20783: no division by the std, none by the completion's own length.
    "dr_grpo": {
        "advantage": {"scale": "none"},
        "loss": {
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "fixed_length",
            "kl_weight": 0.0,
        },
    },
    # DAPO, arXiv 2503.14476: the upper clip bound raised, mean over all tokens, no KL.
    "dapo": {
        "advantage": {"scale": "sample"},
        "loss": {
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "aggregation": "token_mean",
            "kl_weight": 0.0,
        },
    },
}
