"""The reported figures against quadratic loops, hand calculations and repeated experiments."""

import math

import numpy as np
import pytest

from fgrlhf.evaluate import (
    Judged, auc, auc_matched, auc_within, bootstrap, compare, constant, over_seeds, pair_accuracy,
    reward_intervals, reward_table, standard_error, t_quantile, win_rate, win_rates)


# ----- win rate -----------------------------------------------------------------------------------

def test_compare_gives_1_for_fewer_errors_and_half_for_as_many():
    assert compare([0, 2, 5], [1, 2, 3]) == [1.0, 0.5, 0.0]
    assert win_rate(compare([0, 2, 5, 0], [1, 2, 3, 9])) == 2.5 / 4
    with pytest.raises(ValueError, match="expected 3 values, got 2"):
        compare([1, 2], [1, 2, 3])


def test_win_rate_of_a_system_and_of_its_rival_sum_to_one():
    a, b = np.random.default_rng(0).integers(0, 4, (2, 50)).tolist()
    assert win_rate(compare(a, b)) + win_rate(compare(b, a)) == pytest.approx(1)


def test_win_rates_by_hand():
    """.45 three times and .9: mean .5625, sd .225; as wins and losses one of four, sd 1/2."""
    found = win_rates([0.45, None, 0.45, 0.9, None, 0.45])
    low, high = found.pop("interval_95")
    assert 0.45 <= low < 0.5625 < high <= 0.9
    assert found == {
        "win_rate": pytest.approx(0.5625), "standard_error": pytest.approx(0.1125),
        "discrete_win_rate": 0.25, "discrete_standard_error": 0.25,
        "wins": 1, "ties": 0, "losses": 3, "left_out": 2}
    found = win_rates([1.0, 0.5, 0.5, 0.0, 1.0])
    assert found["win_rate"] == found["discrete_win_rate"] == 0.6
    assert (found["wins"], found["ties"], found["losses"], found["left_out"]) == (2, 2, 1, 0)


def test_standard_error_by_hand_and_of_a_single_value():
    assert standard_error([0, 1]) == pytest.approx(0.5)
    assert standard_error([0.7]) is None and standard_error([0.7, 0.7]) == 0
    assert win_rates([None, 0.7])["standard_error"] is None


def test_pair_accuracy_counts_higher_rewards_and_half_of_the_ties():
    assert pair_accuracy([1.0, -2.0, 0.5, 3.0], [0.0, -1.0, 0.5, -3.0]) == 2.5 / 4


# ----- intervals ----------------------------------------------------------------------------------

def test_bootstrap_covers_the_truth_95_times_in_100():
    """300 experiments of 60 wins, ties and losses; 95% +- 4 standard deviations of a count."""
    rng, p = np.random.default_rng(1), (0.5, 0.1, 0.4)
    truth = 0.5 + 0.05
    hits = 0
    for i in range(300):
        found = bootstrap(rng.choice([1.0, 0.5, 0.0], 60, p=p), seed=i, draws=400)
        hits += found.low <= truth <= found.high
    assert abs(hits - 285) <= 4 * math.sqrt(300 * 0.95 * 0.05)


def test_bootstrap_width_is_that_of_the_normal_for_many_values():
    values = np.random.default_rng(2).normal(3.0, 2.0, 2000)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(2000)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)


def test_bootstrap_is_a_function_of_its_seed_and_of_a_single_value():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("n", [1, 7, 200])
def test_bootstrap_is_the_percentiles_of_means_over_random_picks(n):
    """All picks at once: the plain formula, which needs draws * n numbers of memory."""
    values = np.random.default_rng(4).random(n)
    picks = np.random.default_rng(5).integers(0, n, (2000, n))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    assert bootstrap(values, 5) == (values.mean(), low, high)


def test_bootstrap_of_paired_differences_is_narrower_than_of_either_side():
    """Prompts differ more than systems do: pairing removes what they share."""
    rng = np.random.default_rng(3)
    prompt = rng.normal(0, 1, 200)
    a, b = prompt + rng.normal(0, 0.1, 200), prompt + rng.normal(0, 0.1, 200)
    width = lambda i: i.high - i.low
    assert width(bootstrap(a - b)) < 0.3 * width(bootstrap(a))


def test_over_seeds_by_hand():
    """1, 2, 3, 4: mean 2.5, sd sqrt(5/3), t(3) = 3.182: half width 3.182 * 1.29099 / 2 = 2.0540."""
    found = over_seeds([1, 2, 3, 4])
    assert found == pytest.approx((2.5, 2.5 - 2.0540, 2.5 + 2.0540), abs=1e-4)
    half = 3.1824 * (5 / 3) ** 0.5 * (1 / 4 + 1) ** 0.5                    # one more seed: 4.5935
    assert over_seeds([1, 2, 3, 4], more=1) == pytest.approx((2.5, 2.5 - half, 2.5 + half),
                                                             abs=1e-3)
    assert over_seeds([0.7]).mean == 0.7 and math.isnan(over_seeds([0.7]).low)


@pytest.mark.parametrize("degrees", [*range(1, 13), 19, 99])
def test_t_quantile_leaves_a_fortieth_above_it(degrees):
    """The density of Student's t integrated numerically from 0 to the quantile is 0.475."""
    x = np.linspace(0, t_quantile(degrees), 200_001)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    constant /= math.sqrt(degrees * math.pi)
    density = constant * (1 + x ** 2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=1e-4)


# ----- AUC ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_the_loop_over_all_pairs(seed):
    """Scores of few distinct values, so that ties between the classes abound."""
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 80) / 4, rng.random(80) < 0.3
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def test_auc_by_hand():
    assert auc([0.9, 0.8, 0.1], [True, True, False]) == 1
    assert auc([0.1, 0.8, 0.9], [True, False, False]) == 0
    assert auc([0.5, 0.5, 0.5, 0.5], [True, False, True, False]) == 0.5
    assert math.isnan(auc([0.5, 0.6], [True, True])) and math.isnan(auc([], []))


def test_auc_within_averages_responses_that_hold_both_classes():
    groups = [([1, 2], [False, True]), ([1, 2], [True, False]), ([5, 6], [True, True]),
              ([1, 2, 3], [False, True, True])]
    assert auc_within(groups) == pytest.approx(2 / 3)
    assert math.isnan(auc_within(groups[2:3]))


def test_auc_matched_equals_the_loop_over_near_tokens():
    """Scores of few values, so that ties abound. The third response has no right token after a."""
    rng = np.random.default_rng(0)
    groups = [(rng.integers(0, 4, n), kinds == 1, kinds == 0) for n in (35, 60, 8)
              for kinds in [rng.integers(0, 3, n)]]
    groups.append(([1, 2, 3], [False, True, True], [True, False, False]))
    means = {-1: [], 1: []}
    for order, found in means.items():
        for scores, positive, negative in groups:
            n, wins = len(scores), []
            for a in range(n):
                for b in range(n):
                    if positive[a] and negative[b] and 0 < order * (b - a) <= max(1, n / 10):
                        wins.append((scores[a] > scores[b]) + (scores[a] == scores[b]) / 2)
            found += [sum(wins) / len(wins)] if wins else []
    assert len(means[-1]) == 4 and len(means[1]) == 3
    expected = (np.mean(means[-1]) + np.mean(means[1])) / 2
    assert auc_matched(groups) == pytest.approx(expected, abs=1e-12)


def test_auc_matched_of_the_position_is_a_half_though_late_tokens_are_wrong():
    """A trend is worth nothing, an offset of a response neither. A missing order gives NaN."""
    rng, errors = np.random.default_rng(1), []
    for n in (20, 45, 90):
        errors.append(rng.random(n) < np.linspace(0, 1, n))
    groups_of = lambda scores: [(s, wrong, ~wrong) for s, wrong in zip(scores, errors)]
    places = [np.arange(len(wrong)) / len(wrong) for wrong in errors]
    assert auc_within([(t, wrong) for t, wrong in zip(places, errors)]) > 0.75
    for power in (1, 3, -1):                                           # also a falling function
        assert auc_matched(groups_of([(t + 1) ** power for t in places])) == 0.5
    assert auc_matched(groups_of([wrong + 7.0 * len(wrong) for wrong in errors])) == 1
    assert auc_matched(groups_of([wrong * 9 + t for wrong, t in zip(errors, places)])) == 1
    assert math.isnan(auc_matched([([1, 2], [False, True], [True, False])]))


# ----- the table of a reward model ----------------------------------------------------------------

JUDGED = [Judged("a", 2.0, 1.0, 0.1, [-1.0, 0.5, -2.0], ["", "", "fact"]),
          Judged("b", 0.0, 1.0, 0.2, [3.0, -3.0], ["omit", ""]),
          Judged("c", 1.0, 1.0, 0.9, [-5.0, 1.0, 0.0, 0.2], ["fact", "fact", "", ""]),
          Judged("d", 3.0, 1.0, 0.4, [], []),
          Judged("e", 2.0, 1.0, 0.4, [9.0, -9.0], ["", ""])]    # no span: in no AUC of spans


def test_reward_table_by_hand():
    """Costs -r against spans; a: 2 | 1 -.5, b: -3 | 3, c: 5 -1 | 0 -.2 (error | clean)."""
    table = reward_table(JUDGED)
    assert table["pairs"] == 5 and table["pair_accuracy"] == 3.5 / 5
    assert table["minimal/pairs"] == 2                                     # 0.4 is not below 0.4
    assert table["minimal/pair_accuracy"] == 0.5
    clean = [1, -0.5, 3, 0, -0.2]
    share = lambda costs: sum(c > x for c in costs for x in clean) / (len(costs) * len(clean))
    assert table["token_auc"] == pytest.approx(share([2, -3, 5, -1]))
    assert table["token_auc/fact"] == pytest.approx(share([2, 5, -1]))
    assert table["token_auc/omit"] == pytest.approx(share([-3])) == 0
    assert table["token_auc_within"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert table["token_auc_within/fact"] == pytest.approx((1 + 0.5) / 2)
    assert table["position_auc_within/fact"] == 0.5 and table["token_auc_within/omit"] == 0
    # Neighbours only: a has 2 behind -.5, b has -3 before 3, and c has -1 before 0.
    assert table["token_auc_matched"] == (1 + (0 + 0) / 2) / 2
    assert table["token_auc_matched/fact"] == (1 + 0) / 2 and "token_auc_matched/omit" not in table
    assert table["minimal/token_auc_within"] == pytest.approx((1 + 0) / 2)
    assert table["position_auc_within"] == pytest.approx((1 + 0 + 0) / 3)      # early or late alone
    places = {"error": [2.5 / 3, 0.5 / 2, 0.5 / 4, 1.5 / 4],
              "clean": [0.5 / 3, 1.5 / 3, 1.5 / 2, 2.5 / 4, 3.5 / 4]}
    wins = [(e > c) + 0.5 * (e == c) for e in places["error"] for c in places["clean"]]
    assert table["position_auc"] == pytest.approx(sum(wins) / 20)


def test_reward_table_says_where_rewards_are_low_and_how_far_unchanged_tokens_drift():
    """In standard deviations: errors -3 and -1, behind the first of them 0 and 2, before it 2."""
    judged = [Judged("a", 1.0, 0.0, 0.1, [2.0, -3.0, 0.0, -1.0, 2.0], ["", "fact", "", "fact", ""],
                     drift=[1.0, -2.0])]
    table, spread = reward_table(judged), math.sqrt((4 + 9 + 0 + 1 + 4) / 5)
    assert table["r_errors"] == pytest.approx(-2 / spread)
    assert table["r_behind"] == pytest.approx(1 / spread)
    assert table["r_elsewhere"] == pytest.approx(2 / spread)
    assert table["u0_drift"] == pytest.approx(math.sqrt(2.5) / spread)
    plain = reward_table([judged[0]._replace(types=[])])            # an edit without error spans
    assert plain["u0_drift"] == table["u0_drift"] and "r_errors" not in plain


def test_reward_table_has_no_auc_without_spans():
    assert reward_table(JUDGED[3:4]) == {"pairs": 1, "pair_accuracy": 1.0, "minimal/pairs": 0}


def test_constant_compares_sums_per_token_and_up_to_rounding():
    assert "every response the reward 0.25" in constant([0.25, 0.25 + 1e-9])
    assert "every token the reward -0.5" in constant([-1.0, -1.5], [2, 3])
    assert constant([-1.0, -1.5]) is None and constant([-1.0, -1.0], [2, 3]) is None
    assert constant([0.0, 1e-9]) is None and "reward 0 and" in constant([0.0, 0.0])


def test_reward_table_leaves_out_an_auc_without_both_classes():
    """Every token is inside a span: there is no AUC, and no NaN in its place."""
    table = reward_table([Judged("a", 1.0, 0.0, 0.1, [-1.0, 0.5], ["fact", "fact"], (2, 2))])
    figures = {"pairs": 1, "pair_accuracy": 1.0, "pair_accuracy_per_token": 1.0,
               "pair_accuracy_shorter": 0.5}
    assert table == {stratum + name: value for name, value in figures.items()
                     for stratum in ("", "minimal/", "equal_length/")}


@pytest.mark.parametrize("bad", [Judged("b", math.nan, 0.0, 0.1), Judged("b", 0.0, math.inf, 0.1),
                                 Judged("b", 1.0, 0.0, 0.1, [math.nan], ["fact"], (1, 1))])
def test_reward_table_stops_at_a_reward_that_is_not_finite(bad):
    """Otherwise NaN would lose every comparison."""
    with pytest.raises(FloatingPointError, match="record 'b': expected finite rewards"):
        reward_table([*JUDGED, bad])


def test_reward_table_compares_means_and_lengths_where_lengths_are_known():
    """a: 4/4 against 3/2, b: -1/1 against -8/4; only b's chosen side is shorter; c has no lengths.

    By the sum R both are right.
    """
    judged = [Judged("a", 4.0, 3.0, 0.1, [], [], (4, 2)),
              Judged("b", -1.0, -8.0, 0.1, [], [], (1, 4)),
              Judged("c", 0.0, 1.0, 0.1, [], [])]
    table = reward_table(judged)
    assert table["pair_accuracy"] == pytest.approx(2 / 3)
    assert table["pair_accuracy_per_token"] == 0.5 and table["pair_accuracy_shorter"] == 0.5
    assert "pair_accuracy_per_token" not in reward_table(judged[2:])


def test_reward_table_compares_what_an_editor_took_out_with_the_rest():
    """Costs a: 2 taken out | 1 -1; b: 0 -3 taken out | 5; nothing was taken out of c."""
    judged = [Judged("a", 1.0, 0.0, 0.1, [-1.0, -2.0, 1.0], removed=[False, True, False]),
              Judged("b", 1.0, 0.0, 0.1, [0.0, 3.0, -5.0], removed=[True, True, False]),
              Judged("c", 1.0, 0.0, 0.1, [-9.0, 9.0], removed=[False, False])]
    table = reward_table(judged)
    assert table["edit_auc"] == pytest.approx((2 + 1 + 0) / 9)          # 2, 0 and -3 over 1, -1, 5
    assert table["edit_auc_within"] == pytest.approx((1 + 0) / 2)
    assert table["edit_position_auc_within"] == pytest.approx((0.5 + 0) / 2)
    assert "token_auc" not in table and "equal_length/pairs" not in table


def test_reward_table_of_means_and_of_sides_of_equal_length():
    """a: mean 2 of 2 tokens against mean 1 of 5, b: 1 of 3 against 3 of 4; c is sequence-level."""
    judged = [Judged("a", 2.0, 1.0, 0.1, lengths=(2, 5), response="mean"),
              Judged("b", 1.0, 3.0, 0.1, lengths=(3, 4), response="mean")]
    table = reward_table(judged)
    assert table["pair_accuracy"] == 0.5 and table["pair_accuracy_sum"] == 0
    assert table["pair_accuracy_shorter"] == 1 and "pair_accuracy_per_token" not in table
    assert table["equal_length/pairs"] == 1 and table["equal_length/pair_accuracy"] == 0
    table = reward_table([Judged("c", 2.0, 1.0, 0.1, lengths=(2, 5), response="last")])
    assert table["pair_accuracy_shorter"] == 1 and table["equal_length/pairs"] == 0
    assert not {"pair_accuracy_sum", "pair_accuracy_per_token"} & set(table)


def test_reward_intervals_are_those_of_the_share_of_right_pairs():
    """80 of 100 pairs right: the normal's half-width is 1.96 sqrt(.8 .2 / 100) = .078."""
    judged = [Judged(str(i), float(i % 5 > 0), 0.5, 0.1) for i in range(100)]
    found = reward_intervals(judged, 400)
    low, high = found["pair_accuracy_95"]
    assert 0.8 - low == pytest.approx(0.078, abs=0.02) and high - 0.8 == pytest.approx(0.078,
                                                                                       abs=0.02)
    assert "pairs_95" not in found and reward_intervals(judged, 0) == {}
