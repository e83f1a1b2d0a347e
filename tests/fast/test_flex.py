"""FlexAttention over a stream gives what dense blocks give. On a CPU it computes with whole matrices; the masks are the same."""

import pytest
import torch

from coterie.fast import flex
from coterie.fast.flex import FlexLayout, flex_serves
from coterie.fast.stream import StreamLayout
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEGMENTS = [(5, (4, 17, 1)), (11, (2, 3)), (3, (9,)), (150, (60, 130, 8, 2)), (23, ()), (1, (140, 5))]
NUM_TOKENS = sum(prompt + sum(lengths) for prompt, lengths in SEGMENTS)


def inputs(num_heads=4, num_kv_heads=2, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, NUM_TOKENS, width, generator=generator, dtype=dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def whole_matrices(q, k, v, *, score_mod, block_mask, scale, enable_gqa):
    """What FlexAttention is documented to compute, with gradients, which it does not have on a CPU."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    places = torch.arange(q.shape[2])
    allowed = block_mask.mask_mod(None, None, places[:, None], places)
    return scores.masked_fill(~allowed, -torch.inf).softmax(3) @ v


def with_gradients(layout, tensors, settings):
    out = layout.attend(0, *tensors, settings)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), tensors)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_dense_blocks_with_every_gradient(monkeypatch, heads, window, softcap):
    settings = AttentionSettings(0.4, window, softcap)
    allowed = 1e-10 if softcap is None else 3e-6  # dense blocks with a soft cap are at float32
    plain = DenseLayout(SEGMENTS, "cpu").attend(0, *inputs(*heads), settings)
    with torch.no_grad():
        found = FlexLayout(SEGMENTS, "cpu").attend(0, *inputs(*heads), settings)
    torch.testing.assert_close(found, plain.detach(), rtol=allowed, atol=allowed)

    monkeypatch.setattr(flex, "_call", lambda device: whole_matrices)
    found, plain = (
        with_gradients(kind(SEGMENTS, "cpu"), inputs(*heads), settings) for kind in (FlexLayout, DenseLayout)
    )
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("window", [None, 40])
def test_skipped_tiles_hold_nothing_and_whole_ones_everything(window):
    """The lists of tiles are what a GPU trusts: a CPU's whole matrices would hide a tile that is missing."""
    layout = FlexLayout([(300, (200, 10)), (2, (1, 1)), (400, (300,))], "cpu")
    mask = layout._mask(window)
    places = torch.arange(len(layout._sequence))
    tiles = mask.mask_mod(None, None, places[:, None], places).view(len(places) // 128, 128, -1, 128).transpose(1, 2)
    expected = torch.zeros(tiles.shape[:2])  # 0 nothing, 1 some, 2 all
    expected += tiles.any(3).any(2) + tiles.all(3).all(2).float()
    found = torch.zeros_like(expected)
    for value, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(len(found)):
            found[row, indices[0, 0, row, : int(counts[0, 0, row])].long()] = value
    assert torch.equal(found, expected)
    assert {0.0, 1.0, 2.0} <= set(expected.flatten().tolist()) or window is not None


def test_it_is_tried_on_the_device_before_it_is_used(monkeypatch):
    q, k, v = inputs(dtype=torch.float32)
    flex._tried.cache_clear()
    monkeypatch.setattr(flex, "_call", lambda device: whole_matrices)
    assert flex_serves(q, k, v, None, DenseLayout)

    def broken(*arguments, **options):
        raise RuntimeError("no kernel for this")

    for call, why in (
        (broken, "no kernel for this"),
        (lambda q, k, v, **options: q * 0.5 + 0 * (k.sum() + v.sum()), "differs"),
    ):
        flex._tried.cache_clear()
        monkeypatch.setattr(flex, "_call", lambda device, call=call: call)
        with pytest.warns(UserWarning, match=why):
            assert not flex_serves(q, k, v, None, DenseLayout)
    flex._tried.cache_clear()


def test_other_devices_use_flex_and_dense_blocks_where_it_fails(monkeypatch):
    q, k, v = inputs(dtype=torch.float32)
    settings = AttentionSettings(0.4, None, None)
    called = []
    monkeypatch.setattr(FlexLayout, "attend", lambda self, *rest: called.append("flex"))
    monkeypatch.setattr(DenseLayout, "attend", lambda self, *rest: called.append("dense"))
    layout = StreamLayout(SEGMENTS)
    layout._device = torch.device("meta")
    for serves in (True, False):
        monkeypatch.setattr("coterie.fast.stream.flex_serves", lambda *rest, answer=serves: answer)
        layout.attend(0, q, k, v, settings)
    assert called == ["flex", "dense"]
