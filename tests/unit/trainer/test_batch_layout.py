import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import StepLease
from trainer.batch_layout import BatchLayout


def layout(
    global_batch_size: int, world_size: int, micro_batch_size: int, *, deterministic: bool = True
) -> BatchLayout:
    return BatchLayout.of(
        global_batch_size=global_batch_size,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        deterministic=deterministic,
    )


def grant(layout: BatchLayout, world_size: int, num_samples: int) -> StepLease:
    """A step as the coordinator grants it: each pass of all ranks is one consecutive piece of the plan."""
    size = layout.samples_per_pass
    num_passes = math.ceil(num_samples / (size * world_size))
    captures = tuple(
        tuple(
            tuple(range(num_samples)[(index * world_size + rank) * size : (index * world_size + rank + 1) * size])
            for index in range(num_passes)
        )
        for rank in range(world_size)
    )
    return StepLease(step=1, num_micro_batches=num_passes, captures=captures)


def losses(layout: BatchLayout, lease: StepLease) -> list[list[int]]:
    """The samples that share a loss, in plan order; a loss without any is none."""
    assert lease.captures is not None
    shared: dict[tuple[int, int], list[int]] = {}
    for rank, passes in enumerate(lease.captures):
        for index, captures in enumerate(passes):
            shared.setdefault((index, rank // layout.ranks_per_loss), []).extend(captures)
    return sorted(samples for samples in shared.values() if samples)


def test_ranks_share_a_pass_that_is_larger_than_their_part_of_the_batch() -> None:
    assert layout(4, 2, 4) == BatchLayout(samples_per_pass=2, num_passes=1, ranks_per_loss=2)
    assert layout(4, 2, 4, deterministic=False) == BatchLayout(samples_per_pass=2, num_passes=1, ranks_per_loss=2)


def test_losses_of_a_deterministic_step_stay_with_their_rank_where_they_can() -> None:
    assert layout(8, 1, 2) == BatchLayout(samples_per_pass=2, num_passes=4, ranks_per_loss=1)
    assert layout(8, 2, 2) == BatchLayout(samples_per_pass=2, num_passes=2, ranks_per_loss=1)
    assert layout(8, 2, 2, deterministic=False) == BatchLayout(samples_per_pass=2, num_passes=2, ranks_per_loss=2)
    assert layout(8, 8, 2) == BatchLayout(samples_per_pass=1, num_passes=1, ranks_per_loss=2)


def test_micro_batch_that_does_not_divide_the_batch_is_taken_smaller() -> None:
    assert layout(4, 1, 3).samples_per_pass == 2
    assert layout(10, 2, 4, deterministic=False) == BatchLayout(samples_per_pass=1, num_passes=5, ranks_per_loss=2)


@given(
    share=st.integers(1, 12),
    world_size=st.integers(1, 12),
    micro_batch_size=st.integers(1, 16),
    rest=st.integers(0, 99),
)
def test_deterministic_step_has_the_losses_of_one_rank_on_any_number_of_ranks(
    share: int, world_size: int, micro_batch_size: int, rest: int
) -> None:
    global_batch_size = share * world_size
    num_samples = global_batch_size - rest % global_batch_size  # the last step of a plan is not full
    one, many = layout(global_batch_size, 1, micro_batch_size), layout(global_batch_size, world_size, micro_batch_size)
    assert world_size * many.samples_per_pass * many.num_passes == global_batch_size
    assert many.samples_per_pass <= micro_batch_size
    granted_one, granted_many = grant(one, 1, num_samples), grant(many, world_size, num_samples)
    expected = losses(one, granted_one)
    assert losses(many, granted_many) == expected
    assert many.num_losses(granted_many) == one.num_losses(granted_one) == len(expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_undetermined_step_has_one_loss_a_pass_of_all_ranks(world_size: int) -> None:
    whole = layout(8, world_size, 1, deterministic=False)
    assert whole.ranks_per_loss == world_size
    assert whole.num_losses(StepLease(step=1, num_micro_batches=whole.num_passes)) == whole.num_passes
