# SPDX-License-Identifier: Apache-2.0
"""Dropping, pooling and merging of random pairs in place of matching."""

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel

from harness.baselines.matching import RandomDrop, RandomPairs, average_pool, matching
from support.helpers import assert_valid


@pytest.mark.parametrize("by", [RandomDrop(), RandomPairs(), average_pool])
@pytest.mark.parametrize(("tokens", "protected", "r"), [(9, 1, 2), (54, 5, 8), (13, 4, 99), (6, 1, 0)])
def test_the_plans_have_the_shape_of_a_matching(by, tokens, protected, r):
    metric = torch.randn(3, 2, tokens, 8)
    plan, like = by(metric, r, protected), stk.match(metric, r, protected)
    assert_valid(plan)
    assert (plan.tokens_in, plan.tokens_out, plan.protected) == (like.tokens_in, like.tokens_out, protected)


def test_dropped_tokens_leave_no_trace_in_those_that_stay():
    x = torch.randn(4, 20, 3)
    plan = RandomDrop(1)(x, 6, 2)
    y, size = stk.merge(x, plan)
    assert (size == 1).all()
    for item in range(4):
        kept = [row for row in x[item].tolist() if row in y[item].tolist()]
        assert kept == y[item].tolist(), "the rows that stay, in their order"
    assert not torch.equal(plan.dest[0], plan.dest[1]), "other tokens in each item"
    again, other = RandomDrop(1)(x, 6, 2), RandomDrop(2)(x, 6, 2)
    assert torch.equal(again.dest, plan.dest)
    assert not torch.equal(other.dest, plan.dest)


def test_every_token_is_dropped_as_often():
    members = RandomDrop(0)(torch.zeros(4000, 11, 1), 4, 1).members
    dropped = ~members[members < 0]  # weight-0 members stand as ~i
    share = torch.bincount(dropped, minlength=11) / 4000
    assert share[0] == 0, "the protected token"
    torch.testing.assert_close(share[1:], torch.full((10,), 0.4), atol=0.03, rtol=0)


def test_random_pairs_keep_the_sum_of_all_tokens_and_differ_from_item_to_item():
    x = torch.randn(4, 20, 3, dtype=torch.float64)
    plan = RandomPairs(1)(x, 6, 2)
    y, size = stk.merge(x, plan)
    torch.testing.assert_close((y * size[..., None]).sum(1), x.sum(1))
    assert torch.equal(y[:, :2], x[:, :2]), "the protected tokens"
    assert (size.sum(1) == 20).all()
    assert not torch.equal(plan.dest[0], plan.dest[1])
    assert torch.equal(RandomPairs(1)(x, 6, 2).dest, plan.dest)
    assert not torch.equal(RandomPairs(2)(x, 6, 2).dest, plan.dest)


def test_every_pair_of_tokens_is_drawn_as_often():
    plan = RandomPairs(0)(torch.zeros(6000, 6, 1), 1, 1)
    merged = plan.members.gather(1, plan.offsets.diff(dim=1).argmax(1)[:, None].long())  # first of the two
    other = plan.members.gather(1, plan.offsets.diff(dim=1).argmax(1)[:, None].long() + 1)
    counts = torch.bincount((merged * 6 + other).flatten().long(), minlength=36).view(6, 6)
    assert counts[0].sum() == counts[:, 0].sum() == 0, "the protected token"
    pairs = counts.triu(1)[1:, 1:]
    expected = torch.full((5, 5), 600).triu(1)
    assert ((pairs - expected).abs() <= 100).all(), pairs


def test_pooling_takes_the_mean_of_neighbours():
    x = torch.arange(10.0)[None, :, None]
    y, size = stk.merge(x, average_pool(x, 2, 2))
    assert y[0, :, 0].tolist() == [0, 1, 2.5, 4, 5, 6.5, 8, 9]
    assert size[0].tolist() == [1, 1, 2, 1, 1, 2, 1, 1]


def test_a_tower_matches_by_them_and_then_by_similarity_again():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "embed_dim": 32, "text_width": 64,
             "text_heads": 1, "text_layers": 1, "frames": 2}  # fmt: skip
    model = StopModel(StopConfig(**sizes, temporal_prompt="DGL")).eval()
    stk.apply_tome_patch(model, tome_r=4)
    video = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        before = model.encode_video(video)
        with matching(average_pool):
            pooled = model.encode_video(video)
        with matching(None):
            same = model.encode_video(video)
    assert not torch.allclose(pooled, before, atol=1e-4)
    assert torch.equal(same, before)


def test_a_vision_transformer_matches_by_them_and_then_by_similarity_again():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 17, 32)
    stk.apply_tome_patch(encoder, tome_r=4, trace_source=True)
    with torch.no_grad():
        before = encoder(x)
        with matching(average_pool):
            pooled = encoder(x)
            traced = stk.tome_trace(encoder).dest[:, 0]
        with matching(None):
            same = encoder(x)
    left = 17
    expected = torch.arange(17).expand(2, -1)
    for _ in range(3):
        plan = average_pool(torch.zeros(2, left, 1), 4, 1)
        expected, left = plan.dest.long().gather(1, expected), left - min(4, (left - 1) // 2)
    assert torch.equal(traced.long(), expected)
    assert not torch.allclose(pooled, before, atol=1e-4)
    assert torch.equal(same, before)


def test_blocks_whose_norm_is_not_fused_match_by_them_too():
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, norm_layer="rmsnorm"
    ).eval()
    stk.apply_tome_patch(model, tome_r=4, trace_source=True)
    with torch.no_grad(), matching(average_pool):
        model(torch.randn(1, 3, 64, 64))
    first = average_pool(torch.zeros(1, 17, 1), 4, 1).dest.long()
    second = average_pool(torch.zeros(1, 13, 1), 4, 1).dest.long()
    assert torch.equal(stk.tome_trace(model).dest[:, 0].long(), second.gather(1, first))
