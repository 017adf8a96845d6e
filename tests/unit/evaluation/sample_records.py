"""Records of samples that nobody decoded."""

from __future__ import annotations

from evaluation.benchmark import PlannedTask, Sample
from evaluation.records import PlainRecord, SampleRecord, hash_of
from evaluation.timing import Timing


def timing(total_s: float, num_tokens: int) -> Timing:
    return Timing(
        prefill_s=0.0, draft_s=total_s / 4, verify_s=total_s / 2, overhead_s=total_s / 4, num_tokens=num_tokens
    )


def planned(task: str, domain: str, count: int, num_skipped: int = 0) -> PlannedTask:
    samples = tuple(
        Sample(task=task, domain=domain, index=index, seed=index, prompt_ids=(1, 2, index)) for index in range(count)
    )
    return PlannedTask(name=task, domain=domain, samples=samples, num_skipped=num_skipped)


def sample_record(task: str, index: int, committed: list[int], **changes) -> SampleRecord:
    """Rounds of three drafts each, of which all but the bonus token were kept."""
    values = {
        "task": task, "domain": "code", "index": index, "prompt_hash": hash_of((1, 2, index)), "num_prompt_tokens": 3,
        "seed": index, "accepted_lengths": committed, "proposal_lengths": [3] * len(committed),
        "accepted_draft_lengths": [tokens - 1 for tokens in committed], "output_hash": "same",
        "timing": timing(1.0, sum(committed) + 1),
    }  # fmt: skip
    return SampleRecord.model_validate(values | changes)


def plain_record(task: str, index: int, total_s: float, num_tokens: int, output_hash: str = "same") -> PlainRecord:
    return PlainRecord(
        task=task,
        index=index,
        prompt_hash=hash_of((1, 2, index)),
        output_hash=output_hash,
        timing=timing(total_s, num_tokens),
    )
