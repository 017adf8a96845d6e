"""Brings requests of concurrent callers together into forward passes: one queue, one thread, batching.py's policy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.errors import SlipstreamError, TargetError, TargetUnavailableError
from services.target.batching import Waiting, is_full, next_batch
from services.target.request import CaptureInputs

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class Ticket(Generic[Result]):
    """One submitted request; its future ends with the result, an error, or cancelled."""

    inputs: CaptureInputs
    future: Future[Result] = field(default_factory=Future)


class Dispatcher(Generic[Result]):
    """Runs `compute` on batches of submitted requests, in a thread of its own.

    The queue is bounded by its callers: the server admits at most `max_concurrent_captures`.
    """

    def __init__(
        self,
        compute: Callable[[list[CaptureInputs]], Sequence[Result]],
        *,
        max_batch_tokens: int,
        max_batch_samples: int,
        batch_wait_s: float,
    ) -> None:
        self._compute = compute
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_samples = max_batch_samples
        self._batch_wait_s = batch_wait_s
        self._queue: list[Ticket[Result]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="target-dispatcher", daemon=True)
        self._thread.start()

    def submit(self, inputs: CaptureInputs) -> Ticket[Result]:
        """Queue a request.

        Raises:
            TargetUnavailableError: The dispatcher is closed.
        """
        ticket: Ticket[Result] = Ticket(inputs)
        with self._changed:
            if self._closed:
                raise TargetUnavailableError("the target is stopping; ask another one")
            self._queue.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket[Result]) -> None:
        """Give up a request: it leaves the queue if it is still there, and whoever waits for it is woken."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
            ticket.future.cancel()
            self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue; those being computed are no longer in it."""
        with self._changed:
            return len(self._queue)

    def close(self) -> None:
        """Refuse what is queued, let the running pass end, and end the thread."""
        with self._changed:
            self._closed = True
            refused, self._queue = self._queue, []
            self._settle(refused, error=TargetUnavailableError("the target is stopping; ask another one"))
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._let_others_join()
                batch = [self._queue[i] for i in next_batch(self._waiting(), **self._limits)]
                self._queue = [ticket for ticket in self._queue if ticket not in batch]
            if batch:
                self._compute_batch(batch)

    def _let_others_join(self) -> None:
        """Hold the next pass back until it is full, or the wait is over."""
        deadline = time.monotonic() + self._batch_wait_s
        while self._queue and not self._closed and not is_full(self._waiting(), **self._limits):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            self._changed.wait(remaining)

    @property
    def _limits(self) -> dict[str, int]:
        return {"max_batch_tokens": self._max_batch_tokens, "max_batch_samples": self._max_batch_samples}

    def _waiting(self) -> list[Waiting]:
        return [Waiting(ticket.inputs.num_tokens, ticket.inputs.group) for ticket in self._queue]

    def _compute_batch(self, batch: list[Ticket[Result]]) -> None:
        try:
            results = list(zip(batch, self._compute([ticket.inputs for ticket in batch]), strict=True))
        except SlipstreamError as error:
            with self._changed:
                self._settle(batch, error=error)
        except Exception as error:  # handed to the callers, who report it
            lengths = [ticket.inputs.num_tokens for ticket in batch]
            logger.exception("forward pass over %d samples of %s tokens failed", len(batch), lengths)
            wrapped = TargetError(f"forward pass over {len(batch)} samples of {lengths} tokens failed: {error!r}")
            wrapped.__cause__ = error
            with self._changed:
                self._settle(batch, error=wrapped)
        else:
            with self._changed:
                for ticket, result in results:
                    if not ticket.future.cancelled():
                        ticket.future.set_result(result)

    def _settle(self, tickets: Sequence[Ticket[Result]], *, error: SlipstreamError) -> None:
        for ticket in tickets:
            if not ticket.future.cancelled():
                ticket.future.set_exception(error)
