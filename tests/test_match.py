"""Laws of matching: what every backend must do with any keys."""

import brute_force
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from judge import judge, judge_match
from strategies import FINITE, LAYOUTS, Case, cases, strided

from tome import ops


def prefix_stays(slot: torch.Tensor, prefix: int) -> bool:
    return torch.equal(slot[:, :prefix].cpu(), torch.arange(prefix, dtype=torch.int32).expand(len(slot), -1))


def assert_onto(slot: torch.Tensor, tokens: int) -> None:
    for row in slot.cpu().tolist():
        assert sorted(set(row)) == list(range(tokens))


@given(case=cases())
def test_slot_is_onto_and_the_prefix_stays(device, case):
    slot = ops.match(case.keys(device), case.r, case.prefix)
    assert slot.dtype == torch.int32
    assert slot.shape == (case.batch, case.n)
    assert slot.is_contiguous()
    assert_onto(slot, case.tokens)
    assert prefix_stays(slot, case.prefix)


@given(case=cases(features=("exact",)))
def test_exact_inputs_match_the_brute_force_to_the_last_index(device, case):
    slot = ops.match(case.keys(device), case.r, case.prefix)
    exact = brute_force.scores(case.keys("cpu"))
    assert slot.tolist() == [brute_force.match(image, case.r, case.prefix) for image in exact]


@given(case=cases(features=FINITE))
def test_real_inputs_go_to_the_best_target_or_a_near_tie(device, case):
    slot = ops.match(case.keys(device), case.r, case.prefix)
    assert judge_match(case.keys(device), slot, case.r, case.prefix).is_right()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_near_ties_are_rare(device, dtype, record_property):
    differing = total = 0
    for seed in range(20):
        case = Case(2, 197, 64, 6, 16, 1, dtype, "packed", "normal", seed)
        slot = ops.match(case.keys(device), case.r, case.prefix)
        exact = [brute_force.match(image, case.r, case.prefix) for image in brute_force.scores(case.keys("cpu"))]
        differing += int((slot.cpu() != torch.tensor(exact)).sum())
        total += slot.numel()
    record_property("differing", f"{differing} of {total}")
    assert differing <= 0.002 * total


@given(case=cases(features=("nan", "inf", "normal"), dtypes=(torch.float32,)))
def test_bad_numbers_follow_the_rule_for_nan(device, case):
    slot = ops.match(case.keys(device), case.r, case.prefix)
    assert judge_match(case.keys(device), slot, case.r, case.prefix).is_right()


@given(case=cases(features=("exact",)), data=st.data())
def test_batch_permutation(device, case, data):
    order = data.draw(st.permutations(range(case.batch)))
    keys = case.keys(device)
    assert torch.equal(ops.match(keys[order], case.r, case.prefix), ops.match(keys, case.r, case.prefix)[order])


@given(case=cases(features=("normal", "exact", "duplicates"), dtypes=(torch.float32,)), exponent=st.integers(-90, 90))
def test_scale_invariance(device, case, exponent):
    keys = case.keys(device).contiguous()
    assert torch.equal(ops.match(keys * 2.0**exponent, case.r, case.prefix), ops.match(keys, case.r, case.prefix))


def test_scale_of_each_token_does_not_matter(device):
    case = Case(2, 65, 16, 0, 20, 1, torch.float32, "contiguous", "exact", 3)
    keys = case.keys(device)
    factors = 2.0 ** torch.arange(65, device=device).remainder(60).sub(30)[:, None]
    assert torch.equal(ops.match(keys * factors, 20, 1), ops.match(keys, 20, 1))


@given(case=cases())
def test_repetition_changes_no_bit_and_keys_stay(device, case):
    keys = case.keys(device)
    before = keys.clone()
    slot = ops.match(keys, case.r, case.prefix)
    assert torch.equal(slot, ops.match(keys, case.r, case.prefix))
    assert torch.equal(keys.nan_to_num(), before.nan_to_num())


@given(case=cases(features=("exact",)))
def test_layout_does_not_matter(device, case):
    keys = case.keys(device)
    assert torch.equal(ops.match(keys, case.r, case.prefix), ops.match(keys.contiguous(), case.r, case.prefix))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_ties_take_the_lowest_index(device, prefix):
    keys = torch.ones(1, 12, 4, device=device)
    slot = ops.match(keys, 2, prefix)[0].tolist()
    assert slot == brute_force.match(brute_force.scores(keys)[0], 2, prefix)
    first_a = prefix + prefix % 2
    first_b = prefix + 1 - prefix % 2
    assert slot[first_a] == slot[first_a + 2] == slot[first_b]


def test_a_zero_vector_scores_zero_and_nan_below_everything(device):
    # A tokens 0, 2, 4; B tokens 1, 3, 5. Scores: token 0 is zero, token 2 opposes its targets, token 4 is NaN.
    keys = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [torch.nan, 0.0], [1.0, 0.0]]])
    keys = keys.to(device)
    assert ops.match(keys, 1, 0).tolist() == [[2, 2, 0, 3, 1, 4]]
    assert ops.match(keys, 2, 0).tolist() == [[1, 1, 1, 2, 0, 3]]
    assert ops.match(keys, 3, 0).tolist() == [[0, 0, 0, 1, 0, 2]]


def test_no_gradient_and_no_graph(device):
    keys = torch.randn(1, 8, 4, device=device, requires_grad=True)
    assert not ops.match(keys, 2).requires_grad


def test_autocast_does_not_lower_the_precision_of_scores(device):
    case = Case(4, 197, 64, 0, 40, 1, torch.float32, "contiguous", "normal", 11)
    keys = case.keys(device)
    with torch.autocast(device.type, torch.bfloat16):
        slot = ops.match(keys, 40)
    assert torch.equal(slot, ops.match(keys, 40))


@given(case=cases(), k=st.integers(1, 9))
def test_kth_match(device, case, k):
    slot = ops.kth_match(case.keys(device), k, case.prefix)
    free = case.n - case.prefix
    k = max(1, min(k, free))
    assert_onto(slot, case.prefix + free // k)
    assert prefix_stays(slot, case.prefix)
    targets = [case.prefix + k - 1 + i * k for i in range(free // k)]
    kept = torch.arange(case.prefix, case.prefix + len(targets), dtype=torch.int32, device=device)
    assert torch.equal(slot[:, targets], kept.expand(case.batch, -1))


@given(case=cases(features=("exact",)), k=st.integers(2, 9))
def test_kth_match_sends_each_token_to_its_best_target(device, case, k):
    slot = ops.kth_match(case.keys(device), k, case.prefix).tolist()
    free = case.n - case.prefix
    k = min(k, free)
    targets = [case.prefix + k - 1 + i * k for i in range(free // k)] if k > 1 else []
    for row, score in zip(slot, brute_force.scores(case.keys("cpu")), strict=True):
        for i in range(case.prefix, case.n):
            if targets and i not in targets:
                best = max(targets, key=lambda j: (score[i, j], -j))
                assert row[i] == case.prefix + targets.index(best)


@given(case=cases())
def test_random_match(device, case):
    slot = ops.random_match(case.keys(device), case.r, case.prefix)
    assert_onto(slot, case.tokens)
    assert prefix_stays(slot, case.prefix)


def test_random_match_draws_per_image_and_from_the_generator(device):
    keys = Case(4, 64, 16, 0, 20, 1, torch.float32, "contiguous", "normal", 0).keys(device)

    def draw(seed: int) -> torch.Tensor:
        return ops.random_match(keys, 20, 1, torch.Generator(device).manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len({tuple(row) for row in ops.random_match(keys[:1].expand(4, -1, -1), 20).tolist()}) > 1


def test_random_match_merges_into_the_best_kept_token(device):
    case = Case(2, 33, 16, 0, 10, 1, torch.float32, "contiguous", "exact", 5)
    slot = ops.random_match(case.keys(device), 10, 1, torch.Generator(device).manual_seed(0)).tolist()
    drawn = torch.rand(2, 32, generator=torch.Generator(device).manual_seed(0), device=device).argsort(dim=1) + 1
    for row, order, score in zip(slot, drawn.tolist(), brute_force.scores(case.keys("cpu")), strict=True):
        sources, kept = order[:10], [0, *sorted(order[10:])]
        assert [row[t] for t in kept] == list(range(23))
        for i in sources:
            assert row[i] == kept.index(max(kept[1:], key=lambda j: (score[i, j], -j)))


@given(case=cases(), share=st.floats(0.1, 0.9))
def test_matching_between_given_sets(device, case, share):
    free = case.n - case.prefix
    assume(free >= 2 and case.batch > 0)
    count = min(max(round(share * free), 1), free - 1)
    order = (
        torch.rand(case.batch, free, generator=torch.Generator().manual_seed(case.seed)).argsort(dim=1) + case.prefix
    )
    keys, sources, targets = (t.to(device) for t in (case.keys("cpu"), order[:, :count], order[:, count:]))
    for r in sorted({1, (count + 1) // 2, count}):
        slot = ops.set_match(keys, sources, targets, r, case.prefix)
        assert_onto(slot, case.n - r)
        assert judge(keys, slot, sources, targets, r, case.prefix).is_right()
    assert torch.equal(ops.set_match(keys, sources, targets, case.n, case.prefix), slot)  # r is clipped


def test_sets_of_which_one_is_empty_merge_nothing(device):
    keys = torch.randn(2, 6, 4, device=device)
    everyone, nobody = (torch.arange(n, device=device).expand(2, -1) for n in (6, 0))
    for sets in ((everyone, nobody), (nobody, everyone)):
        assert ops.set_match(keys, *sets, 3).tolist() == [list(range(6))] * 2


def test_sets_of_even_and_odd_positions_are_bipartite_matching(device):
    keys = torch.randn(3, 2, 20, 8, device=device)
    sets = (torch.arange(first, 20, 2, device=device).expand(3, -1) for first in (0, 1))
    assert torch.equal(ops.set_match(keys, *sets, 7), ops.match(keys, 7, 0))


def test_strided_builder_keeps_the_values():
    x = torch.arange(24.0).view(2, 3, 4)
    for layout in LAYOUTS:
        assert torch.equal(strided(x, layout), x)
    assert not strided(x, "packed").is_contiguous()
