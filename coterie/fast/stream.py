"""The fastest of the ways to attend over the packed stream, chosen by what a layer asks for and where it runs.

Legend: T tokens of the stream, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from coterie.fast.flex import FlexLayout, flex_serves
from coterie.fast.kernels.calls import Groups, served
from coterie.fast.pieces import CompiledAttention
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout


class StreamLayout:
    """The layout of a stream made of groups: (prompt length, lengths of its completions) each.

    On a CPU compiled loops, which copy no prompt and mask nothing; on a GPU FlexAttention; where neither serves, without a compiler, for
    sinks, slopes, or soft caps on a CPU, dense blocks.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> None:
        self._segments, self._device = segments, torch.device(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        on_gpu = self._device.type != "cpu" and settings.sinks is None and settings.slopes is None
        if on_gpu and flex_serves(q, k, v, settings.softcap, DenseLayout):
            return self._flex.attend(layer, q, k, v, settings)
        on_cpu = self._device.type == "cpu" and settings.plain and q.shape[3] == v.shape[3]
        if not (on_cpu and served(q, k, v)):
            return self._dense.attend(layer, q, k, v, settings)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, E]
        return CompiledAttention.apply(q, k, v, self._groups, settings.scaling, settings.window)[None]

    @cached_property
    def _groups(self) -> Groups:
        return Groups.of(self._segments)

    @cached_property
    def _flex(self) -> FlexLayout:
        return FlexLayout(self._segments, self._device)

    @cached_property
    def _dense(self) -> DenseLayout:
        return DenseLayout(self._segments, self._device)
