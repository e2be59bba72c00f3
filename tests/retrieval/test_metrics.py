# SPDX-License-Identifier: Apache-2.0
"""R@1 and its kin against values by hand and a slow twin; QB-Norm and DSL by hand and by what must always hold."""

import math
import statistics

import pytest
import torch

from retrieval import metrics, rerank

CAPTIONS_OF = [[1] * 7, [2, 1, 3], [1, 1, 4, 1, 1, 1, 1, 1, 1, 2, 1, 1], [2, 2]]  # captions of each video


def owners(counts) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def slow_rank(scores: list[float], right: int) -> int:
    return 1 + sum(score >= scores[right] for i, score in enumerate(scores) if i != right)


def slow(found: list[int], candidates: int, median) -> metrics.Retrieval:
    r1, r5, r10 = (100 * sum(rank <= k for rank in found) / len(found) for k in (1, 5, 10))
    mean = sum(found) / len(found)
    return metrics.Retrieval(r1, r5, r10, float(median(found)), mean, len(found), candidates)


def near(a: metrics.Retrieval, b: metrics.Retrieval) -> bool:
    return vars(a) == pytest.approx(vars(b), abs=1e-9)


def test_by_hand():
    similarity = torch.tensor([
        [0.9, 0.1, 0.2],  # of video 0: rank 1
        [0.3, 0.4, 0.5],  # of video 0: rank 3
        [0.1, 0.3, 0.8],  # of video 1: rank 2
        [0.6, 0.2, 0.7],  # of video 2: rank 1
    ])  # fmt: skip
    video = torch.tensor([0, 0, 1, 2])
    assert metrics.ranks(similarity, video).tolist() == [1, 3, 2, 1]
    # an even number of ranks, 1 1 2 3, and several captions of one video: STOP's median is the lower, 1
    assert near(metrics.text_to_video(similarity, video), metrics.Retrieval(50.0, 100.0, 100.0, 1.0, 1.75, 4, 3))
    # the captions of a video count as their best: video 0 sees 0.9 0.1 0.6, video 1 0.4 0.3 0.2, video 2 0.5 0.8 0.7
    assert near(metrics.video_to_text(similarity, video), metrics.Retrieval(100 / 3, 100.0, 100.0, 2.0, 5 / 3, 3, 3))


def test_median_of_single_captions_lies_between_two_ranks():
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.2]])  # ranks 1 and 2
    video = torch.tensor([0, 1])
    assert metrics.text_to_video(similarity, video).median_rank == 1.5
    assert metrics.video_to_text(similarity, video).median_rank == 1.0


@pytest.mark.parametrize("counts", CAPTIONS_OF)
@pytest.mark.parametrize("chunk", [1, 40, metrics.CHUNK])
def test_equals_the_slow_twin(counts, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    video, names = owners(counts), range(len(counts))
    similarity = torch.randn(len(video), len(counts), dtype=torch.float64)
    similarity[torch.arange(len(video)), video] += 1
    rows, own = similarity.tolist(), video.tolist()
    forth = [slow_rank(row, right) for row, right in zip(rows, own, strict=True)]
    median = statistics.median_low if max(counts) > 1 else statistics.median
    assert near(metrics.text_to_video(similarity, video), slow(forth, len(counts), median))

    def best(group, v):
        return max(row[v] for row, right in zip(rows, own, strict=True) if right == group)

    back = [slow_rank([best(group, v) for group in names], v) for v in names]
    assert near(metrics.video_to_text(similarity, video), slow(back, len(counts), statistics.median))
    mixed = torch.randperm(len(video))
    assert near(metrics.video_to_text(similarity[mixed], video[mixed]), slow(back, len(counts), statistics.median))


def test_a_model_to_which_all_is_alike_finds_nothing():
    similarity, video = torch.full((6, 12), 0.3), torch.arange(6)
    assert metrics.ranks(similarity, video).tolist() == [12] * 6
    assert metrics.text_to_video(similarity, video).r10 == 0
    alike = metrics.video_to_text(torch.full((12, 12), 0.3), torch.arange(12))
    assert (alike.r10, alike.mean_rank) == (0, 12)


def test_a_tie_counts_against_the_right_answer():
    assert metrics.ranks(torch.tensor([[0.5, 0.9, 0.5, 0.1]]), torch.tensor([2])).tolist() == [3]


def test_nan_is_below_everything():
    nan, inf = math.nan, math.inf
    similarity = torch.tensor([[nan, 0.1, -inf], [0.2, nan, nan], [nan] * 3, [nan, -inf, 0.0]])
    assert metrics.ranks(similarity, torch.tensor([0, 0, 1, 1])).tolist() == [3, 1, 3, 2]
    diverged = torch.full((4, 2), nan)
    for retrieval in (metrics.text_to_video, metrics.video_to_text):
        assert retrieval(diverged, torch.tensor([0, 0, 1, 1])).r1 == 0


def test_one_nan_does_not_hide_the_other_captions_of_a_video():
    similarity = torch.tensor([[math.nan, 0.0], [0.9, 0.1], [0.2, 0.8]])
    assert metrics.video_to_text(similarity, torch.tensor([0, 0, 1])).r1 == 100


def test_videos_without_captions_can_be_found_but_do_not_look():
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.1, 0.3]])
    video = torch.tensor([0, 2])
    assert metrics.ranks(similarity, video).tolist() == [2, 1]
    assert metrics.text_to_video(similarity, video).candidates == 3
    assert near(metrics.video_to_text(similarity, video), metrics.Retrieval(100.0, 100.0, 100.0, 1.0, 1.0, 2, 2))


def test_many_captions_of_one_video_do_not_pad_the_others():
    video = owners([2000] + [1] * 1999)  # padded to the longest: 32 GB
    similarity = torch.zeros(len(video), 2000)
    similarity[torch.arange(len(video)), video] = 1
    assert metrics.video_to_text(similarity, video).r1 == 100


def test_line():
    line = metrics.Retrieval(43.06, 70, 80.44, 2, 15.25, 1000, 1000).line("text_to_video")
    assert line == "Text-to-Video: R@1: 43.1 - R@5: 70.0 - R@10: 80.4 - Median R: 2.0 - Mean R: 15.2"
    assert metrics.Retrieval(0, 0, 0, 1, 1, 1, 1).line("video_to_text").startswith("Video-to-Text: R@1: 0.0 -")


@pytest.mark.parametrize(
    ("similarity", "video", "named"),
    [
        (torch.zeros(3), torch.arange(3), "similarity must be a matrix"),
        (torch.zeros(3, 3, dtype=torch.int64), torch.arange(3), "similarity must be a matrix of floats"),
        (torch.zeros(3, 3), torch.arange(2), "video_of_caption must be 3 int64"),
        (torch.zeros(3, 3), torch.arange(3).float(), "video_of_caption must be 3 int64"),
        (torch.zeros(3, 2), torch.arange(3), "video_of_caption must be from 0 to 1, got 0 to 2"),
        (torch.zeros(1, 2), torch.tensor([-1]), "video_of_caption must be from 0 to 1"),
        (torch.zeros(0, 3), torch.arange(0), "similarity must have queries"),
    ],
)
@pytest.mark.parametrize("retrieval", [metrics.text_to_video, metrics.video_to_text])
def test_bad_arguments(retrieval, similarity, video, named):
    with pytest.raises(ValueError, match=named):
        retrieval(similarity, video)


# first candidates: 0, 0, 2
BANK = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.2, 0.9]], dtype=torch.float64)
COSINES = torch.tensor([[0.5, 0.45, 0.1], [0.2, 0.6, 0.3], [0.3, 0.1, 0.4]], dtype=torch.float64)


def quotients(row: int, beta: float) -> list[float]:
    """The paper's formula."""
    return [math.exp(beta * COSINES[row, c]) / sum(math.exp(beta * BANK[b, c]) for b in range(3)) for c in range(3)]


@pytest.mark.parametrize(
    ("k", "theta", "normalised"),
    [(1, 1, [0, 2]), (1, 2, [0]), (1, 3, []), (2, 1, [0, 1, 2]), (2, 2, [0, 1, 2]), (2, 3, []), (9, 3, [0, 1, 2])],
)
@pytest.mark.parametrize("beta", [1.0, 20.0])
def test_qb_norm_by_hand(k, theta, normalised, beta):
    # among the first two of a bank query: 0 twice, 1 twice, 2 twice
    result = rerank.qb_norm(COSINES, BANK, k=k, beta=beta, theta=theta)
    for row in range(3):
        if row in normalised:
            assert (beta * result[row]).exp().tolist() == pytest.approx(quotients(row, beta))
        else:
            assert torch.equal(result[row], COSINES[row])


def test_a_hub_loses_what_it_attracts():
    right, hub = torch.eye(5) * 0.5, torch.full((5, 1), 0.6)
    similarity = torch.cat((right, hub), 1)
    assert metrics.ranks(similarity, torch.arange(5)).tolist() == [2] * 5
    bank = torch.cat((torch.rand(20, 5) * 0.3, torch.full((20, 1), 0.6)), 1)
    assert metrics.ranks(rerank.qb_norm(similarity, bank), torch.arange(5)).tolist() == [1] * 5


def test_qb_norm_of_a_query_depends_on_it_and_the_bank_alone():
    similarity, bank = torch.rand(30, 8), torch.rand(50, 8)
    together = rerank.qb_norm(similarity, bank, theta=7)
    changed = (together != similarity).any(1)
    assert changed.any()
    assert not changed.all()
    alone = torch.cat([rerank.qb_norm(row[None], bank, theta=7) for row in similarity])
    assert torch.equal(together, alone)


def test_an_empty_bank_changes_nothing():
    similarity = torch.rand(4, 6)
    assert torch.equal(rerank.qb_norm(similarity, torch.zeros(0, 6)), similarity)


def test_logits_take_settings_divided_by_their_scale():
    similarity, bank = torch.rand(9, 6, dtype=torch.float64), torch.rand(7, 6, dtype=torch.float64)
    expected = rerank.qb_norm(similarity, bank, beta=20.0)
    torch.testing.assert_close(rerank.qb_norm(100 * similarity, 100 * bank, beta=0.2) / 100, expected)
    expected = rerank.dual_softmax(similarity, temperature=0.01)
    torch.testing.assert_close(rerank.dual_softmax(100 * similarity, temperature=1.0) / 100, expected)


def test_dual_softmax_by_hand():
    a, b, c, d = 0.4, 0.1, 0.2, 0.3
    result = rerank.dual_softmax(torch.tensor([[a, b], [c, d]], dtype=torch.float64), temperature=0.1)
    left, right = 1 / (1 + math.exp((c - a) / 0.1)), 1 / (1 + math.exp((d - b) / 0.1))
    expected = [2 * a * left, 2 * b * right, 2 * c * (1 - left), 2 * d * (1 - right)]
    assert result.flatten().tolist() == pytest.approx(expected)


def test_dual_softmax_gives_a_wanted_candidate_to_who_wants_it_most():
    # both queries like candidate 0 best, the first more so
    result = rerank.dual_softmax(torch.tensor([[0.9, 0.5], [0.8, 0.7]]))
    assert result.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_logits_stay_finite_and_in_order(dtype):
    logits = (100 * (2 * torch.rand(40, 30) - 1)).to(dtype)
    bank = (100 * (2 * torch.rand(50, 30) - 1)).to(dtype)
    normalised = rerank.qb_norm(logits, bank)
    assert normalised.isfinite().all()
    assert normalised.dtype == torch.float32
    exact = logits.double() - (20 * bank.double()).logsumexp(0) / 20
    hubs = bank.argmax(1).unique()
    exact = torch.where(torch.isin(logits.argmax(1), hubs)[:, None], exact, logits.double())
    torch.testing.assert_close(normalised.double(), exact, rtol=1e-6, atol=1e-4)
    softened = rerank.dual_softmax(logits.abs(), temperature=1.0)
    assert softened.isfinite().all()
    # a candidate that another query likes better by 100 has a prior of 1e-43, and still an order
    assert (rerank.dual_softmax(torch.tensor([[1.0, 2.0], [120.0, 120.0]]), 1.0)[0].diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_are_left_as_they_were(dtype):
    similarity, bank = torch.rand(5, 4, dtype=dtype), torch.rand(6, 4, dtype=dtype)
    before = similarity.clone(), bank.clone()
    rerank.qb_norm(similarity, bank)
    rerank.dual_softmax(similarity)
    metrics.video_to_text(similarity, torch.tensor([0, 1, 2, 3, 3]))
    assert torch.equal(similarity, before[0])
    assert torch.equal(bank, before[1])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rerank.qb_norm(COSINES, BANK[:, :2]), "bank_similarity must be"),
        (lambda: rerank.qb_norm(COSINES[0], BANK), "similarity must be"),
        (lambda: rerank.qb_norm(COSINES, BANK, k=0), "k and theta must be"),
        (lambda: rerank.qb_norm(COSINES, BANK, theta=0), "k and theta must be"),
        (lambda: rerank.qb_norm(COSINES, BANK, beta=0), "beta above 0"),
        (lambda: rerank.dual_softmax(COSINES[0]), "similarity must be"),
        (lambda: rerank.dual_softmax(COSINES, 0), "temperature must be"),
    ],
)
def test_bad_settings(call, named):
    with pytest.raises(ValueError, match=named):
        call()
