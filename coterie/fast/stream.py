"""The fastest of the ways to attend over the packed stream, chosen by what a layer asks for and where it runs.

Legend: T tokens of the stream, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from coterie.fast.cascade import Cascade
from coterie.fast.compiled import attend
from coterie.fast.flex import FlexLayout, flex_serves
from coterie.fast.kernels.calls import Groups, served
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout


class StreamLayout:
    """The layout of a stream made of groups: (prompt length, lengths of its completions) each.

    On a CPU compiled loops, or in half precision and without a compiler the cascade, neither of which copies a prompt or masks anything; on a
    GPU FlexAttention; where none of them serves, for sinks, slopes, or soft caps on a CPU, dense blocks.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> None:
        self._segments, self._device = segments, torch.device(device)
        self._longest = max(prompt + max(completions, default=0) for prompt, completions in segments)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        unlimited = settings.window is None or settings.window >= self._longest
        on_gpu = self._device.type != "cpu" and settings.sinks is None and settings.slopes is None
        if on_gpu and flex_serves(q, k, v, settings.softcap, DenseLayout):
            return self._flex.attend(layer, q, k, v, settings)
        on_cpu = self._device.type == "cpu" and settings.plain and q.shape[3] == v.shape[3]
        compiled = on_cpu and served(q, k, v)
        if not compiled and not (on_cpu and unlimited):
            return self._dense.attend(layer, q, k, v, settings)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, E]
        if compiled:
            return attend(q, k, v, self.groups, settings.scaling, settings.window)[None]
        return self._cascade.attend(q, k, v, settings.scaling)[None]

    @cached_property
    def groups(self) -> Groups:
        """As compiled loops read them."""
        return Groups.of(self._segments)

    @cached_property
    def _cascade(self) -> Cascade:
        return Cascade(self._segments)

    @cached_property
    def _flex(self) -> FlexLayout:
        return FlexLayout(self._segments, self._device)

    @cached_property
    def _dense(self) -> DenseLayout:
        return DenseLayout(self._segments, self._device)
