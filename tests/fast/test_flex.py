"""FlexAttention over a stream gives what dense blocks give. On a CPU it computes with whole matrices; the masks are the same."""

from functools import partial

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
        torch.randn(1, heads, NUM_TOKENS, width, generator=generator, dtype=dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_dense_blocks(heads, window, softcap):
    settings = AttentionSettings(0.4, window, softcap)
    allowed = 1e-10 if softcap is None else 3e-6  # dense blocks with a soft cap are at float32
    found, plain = (kind(SEGMENTS, "cpu").attend(0, *inputs(*heads), settings) for kind in (FlexLayout, DenseLayout))
    torch.testing.assert_close(found, plain, rtol=allowed, atol=allowed)


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


def test_kernels_are_compiled_for_any_length_and_no_number_is_left_open(monkeypatch):
    """A GPU's kernel can't hold a scaling that comes as a number of a tensor. Compiled here are the graphs, and not the kernels."""
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=seen))
    call = flex._call.__wrapped__("cuda")
    monkeypatch.setattr(flex, "_call", lambda device: call)
    for settings in (AttentionSettings(0.3, window, softcap) for window in (None, 7, 40) for softcap in (None, 2.0)):
        for repeats in (1, 2, 4, 7, 30):
            segments = [(40, (20, 30)), (5, (6,))] * repeats
            tensors = [torch.randn(1, heads, 101 * repeats, 16) for heads in (4, 2, 2)]
            found, plain = (kind(segments, "cpu").attend(0, *tensors, settings) for kind in (FlexLayout, DenseLayout))
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 12  # of four kinds: for one tile, and for more
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target == "item"]


def test_where_it_fails_it_is_said_and_dense_blocks_serve():
    """On a CPU it has no gradient, and of a device without values nothing can be compared."""
    q, k, v = inputs(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"FlexAttention is not used for heads of 16 in torch.float32 \(\w+: .*CPU"):
        assert not flex_serves(q, k, v, None, DenseLayout)
    q, k, v = (x.to("meta") for x in (q, k, v))
    with pytest.warns(UserWarning, match="FlexAttention is not used"):
        attended = StreamLayout(SEGMENTS, "meta").attend(0, q, k, v, AttentionSettings(0.4, None, None))
    assert attended.shape == (1, NUM_TOKENS, 4, 16)
