import pytest
import torch
from tiny_decoding import ScriptedDrafter, tiny_target

from evaluation import plain_generate
from evaluation.speedup import Speedup, measure_speedup, timed_decode
from evaluation.timing import PhaseClock, Timing, total

PROMPTS = [[5, 11, 2, 30], [7], [1, 2, 3, 4, 5, 6, 7]]


def timing(prefill_s=1.0, draft_s=0.0, verify_s=0.0, overhead_s=0.0, num_tokens=10):
    return Timing(prefill_s=prefill_s, draft_s=draft_s, verify_s=verify_s, overhead_s=overhead_s, num_tokens=num_tokens)


class Steps:
    """A clock that each reading moves on."""

    def __init__(self, *readings):
        self._readings = iter(readings)

    def __call__(self):
        return next(self._readings)


def test_what_no_phase_took_is_overhead(monkeypatch):
    # running 0 … 20; draft 1 … 4 and 5 … 6, verify 7 … 15
    monkeypatch.setattr("evaluation.timing.time.perf_counter", Steps(0, 1, 4, 5, 6, 7, 15, 20))
    clock = PhaseClock(torch.device("cpu"))
    with clock.running():
        for name in ("draft", "draft", "verify"):
            with clock.phase(name):
                pass
    assert clock.timing(5) == timing(prefill_s=0, draft_s=4, verify_s=8, overhead_s=8, num_tokens=5)


def test_timings_add_up_and_tell_seconds_a_token():
    whole = total([timing(draft_s=2, num_tokens=10), timing(verify_s=3, overhead_s=1, num_tokens=4)])
    assert whole == timing(prefill_s=2, draft_s=2, verify_s=3, overhead_s=1, num_tokens=14)
    assert whole.total_s == 8
    assert whole.token_s == 8 / 14


def test_speedup_is_the_ratio_of_seconds_a_token():
    speedup = Speedup(
        plain=timing(prefill_s=8, num_tokens=4), speculative=timing(num_tokens=2), accepted_length=2.0, batch_size=1
    )
    assert speedup.ratio == 4.0


def test_timed_decoding_gives_what_untimed_does():
    target = tiny_target(seed=7)
    rows, timing = timed_decode(target, None, PROMPTS, batch_size=2, max_new_tokens=6)
    assert [row.tokens for row in rows] == plain_generate(target, PROMPTS, max_new_tokens=6)
    assert timing.num_tokens == 18
    assert timing.prefill_s > 0
    assert timing.verify_s > 0
    assert timing.draft_s == 0


def test_both_sides_decode_the_same_prompts_and_tokens():
    target = tiny_target(seed=7)
    speedup = measure_speedup(
        target, ScriptedDrafter(lambda num_context: [0, 0]), PROMPTS, batch_size=2, max_new_tokens=6
    )
    assert speedup.plain.num_tokens == speedup.speculative.num_tokens == 18
    assert speedup.speculative.draft_s > 0
    assert 1 <= speedup.accepted_length <= 3
    assert speedup.ratio == speedup.plain.token_s / speedup.speculative.token_s


def test_prompts_that_end_at_once_have_no_speedup():
    target = tiny_target(seed=7)
    with pytest.raises(ValueError, match="no round was decoded"):
        measure_speedup(
            target,
            ScriptedDrafter(lambda num_context: []),
            PROMPTS,
            batch_size=2,
            max_new_tokens=6,
            stop_token_ids=range(37),
        )
