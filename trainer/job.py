"""A training job, from an empty output directory to a drafter: start the parts, watch them, sum up.

    prompts ─► Coordinator ─► work queue ─► ReplayShard ◄── gRPC ── TargetServer × N
                    │                           ▼
                    └─ step leases ─► ranks ◄─ Redis ─► checkpoints ─► Evaluator ─► τ

The driver carries no tensors: it places actors, reads telemetry and ends everything in order.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import ray
import ray.exceptions

from services.contracts import DTYPE_BYTES, Event, TableSignature
from services.control.board import StatusBoard
from services.control.records import RunStatus
from services.errors import ReplayUnavailableError, SlipstreamError, StoppedError, TargetError
from services.logs import EventLog, process_log
from services.placement import address_for_others, on_this_node, this_node
from services.prompts.coordinator import Coordinator, CoordinatorSettings
from services.replay.connect import connect
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.replay.urls import hide_passwords
from services.security import Credentials
from services.target.listening import Listening
from services.target.pool import TargetPool
from services.telemetry import HistoryFile, Journal, RunOutcome, Sink, TelemetryReader
from services.views.prometheus import PrometheusSink
from services.views.tensorboard import TensorBoardSink
from trainer.checkpoint import checkpoint_path, checkpoint_step, latest_checkpoint
from trainer.cluster import ANSWER_DEADLINE_S, Part, ray_cluster, result_of, start_part, wait_started
from trainer.console import RunConsole
from trainer.evaluations import Evaluations
from trainer.figures import TrainResult
from trainer.observer import Observer
from trainer.output import OutputDir, claim_output_dir, replace_text
from trainer.page import own_dashboard
from trainer.preparation import Preparation, prepare
from trainer.rank import TrainerRank
from trainer.recipe import Recipe
from trainer.run_redis import RunRedis, run_redis, table_prefix
from trainer.steering import Steering
from trainer.summary import Summary

POLL_S = 0.25
"""How often the driver looks at the run."""

LOAD_DEADLINE_S = 600.0
"""How long a target may take to load its weights."""

LOOKAHEAD = 2
"""Captures in the work queue for each one that the shard pulls at once."""

STOP_DEADLINE_S = 60.0
"""A run that is asked to stop has this long to finish its step and write a checkpoint."""


def run_job(
    recipe: Recipe, console: RunConsole, *, local_ray: bool, started_s: float, dashboard: bool = False
) -> Summary:
    """Run a training job, or go on with the one in the recipe's output directory.

    Args:
        recipe: What to train.
        console: Where progress is shown.
        local_ray: Start a Ray of its own even if a cluster is running.
        started_s: Wall-clock time at which the user's command began, for the figures.
        dashboard: Serve the run's page, and show where.

    Raises:
        SlipstreamError: Something the user can act on: a wrong setting, a part that failed.
        StoppedError: The run was asked to stop; it has been ended in order and can be resumed.
        KeyboardInterrupt: The user stopped it; likewise.
    """
    prepared = prepare(recipe)
    console.phase("starting Redis and Ray")
    with (
        claim_output_dir(prepared.recipe) as output,
        process_log(output.log_place("driver")),
        own_dashboard(output.path, console) if dashboard else contextlib.nullcontext(),
        ray_cluster(local=local_ray),
        run_redis(recipe.replay, output, address_for_others()) as redis,
        Job(prepared, output, redis, console, started_s) as job,
    ):
        job.start()
        try:
            job.watch()
        except (KeyboardInterrupt, StoppedError):
            job.stop_after_step()
            raise
        return job.finish()


class Job:
    """The parts of one attempt of a run; leaving the context ends them all."""

    def __init__(
        self, prepared: Preparation, output: OutputDir, redis: RunRedis, console: RunConsole, started_s: float
    ) -> None:
        self._prepared = prepared
        self._recipe = prepared.for_actors()
        self._output = output
        self._console = console
        self._started_s = started_s
        self._resume = latest_checkpoint(output.path)
        self._where = (redis.url, table_prefix(output))
        self._keep_redis_alive = redis.keep_alive
        self._redis = connect(redis.url)
        self._table = RedisTable(self._redis, table_prefix(output))
        self._registry = TargetRegistry(self._redis, table_prefix(output))
        credentials = Credentials.make(insecure=self._recipe.target.insecure)
        self._listening = Listening(self._recipe.target.listen, credentials, this_node())
        self._pool = TargetPool(self._recipe.target, self._publish_targets, output.log_place("target"), self._listening)
        self._evaluations = Evaluations(
            prepared.recipe, str(prepared.target_folder), output.evaluations, output.log_place("evaluator")
        )
        self._board = StatusBoard(self._beginning())
        views: list[Sink] = [EventLog(), TensorBoardSink(output.tensorboard), PrometheusSink(output.run_id)]
        self._journal = Journal([HistoryFile(output.telemetry), self._board, *views])
        self._steering = Steering(self._board, self, self._report)
        self._parts: list[Part] = []
        self._heldout: list[list[int]] = []
        self._training: dict[Any, str] = {}
        self._results: list[TrainResult] = []
        self._start_is_due = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with contextlib.ExitStack() as stack:  # whatever fails, or is interrupted, the rest still happens
            stack.callback(self._journal.close)
            stack.callback(self._write_end, error)
            stack.callback(self._steering.close)
            stack.callback(self._redis.close)
            stack.callback(self._destroy_table)
            stack.callback(self._pool.stop)
            stack.callback(self._end, self._parts)
            stack.callback(self._evaluations.close)

    def start(self) -> None:
        """Place every part and let the ranks begin."""
        recipe, signature = self._recipe, self._prepared.signature
        self._steering.open()
        self._write_run()
        self._evaluations.check()
        self._table.destroy()  # what a killed attempt left in a user's own Redis: all of it can be made again
        replay = recipe.replay
        self._table.create(replay.capacity, signature, replay.reuse, replay.rate_limiter, replay.sampling)
        self._table.set_generation(self._output.attempt)
        self._pool.start()
        self._coordinator = self._start_coordinator()
        self._observer = Observer(
            self._console,
            self._journal,
            TelemetryReader(self._redis, table_prefix(self._output)),
            self._table,
            self._coordinator,
            self._pool.states,
            self._started_s,
        )
        self._observer.phase("starting target, replay shard, coordinator and trainer")
        shard = self._start(
            ReplayShard,
            *self._where,
            recipe.replay,
            signature,
            self._output.answers,
            self._listening.credentials.for_client(),
            max_concurrency=4,
            log=self._output.log_place("shard"),
            scheduling_strategy=on_this_node(),  # beside the embedded Redis
        )
        ranks = [self._start_rank(rank) for rank in range(recipe.trainer.world_size)]
        wait_started(self._parts, self._steering.look)
        if self._evaluations.is_enabled:
            self._heldout = self._ask_coordinator("heldout_prompts", recipe.evaluation.max_samples)
        self._pool.wait_ready(LOAD_DEADLINE_S, self._steering.look)
        self._check_target()
        self._shard_run = shard.run.remote()
        store = result_of(ranks[0].open_store.remote(), "trainer rank 0", timeout_s=ANSWER_DEADLINE_S)
        self._training = {actor.train.remote(store): f"trainer rank {rank}" for rank, actor in enumerate(ranks)}
        if self._resume:
            self._console.say(f"resumed from {self._resume}")

    def watch(self) -> None:
        """Follow the run until every rank has finished; raises what a part died of, or `StoppedError`."""
        self._observer.phase("filling the replay buffer")
        self._steering.enter("training")
        while self._training:
            done, _ = ray.wait([self._shard_run, *self._training], num_returns=1, timeout=POLL_S)
            for future in done:
                if future == self._shard_run:
                    result_of(future, "the replay shard")
                    raise SlipstreamError("the replay shard ended before training did")
                self._results.append(result_of(future, self._training.pop(future)))
            if message := self._keep_redis_alive():
                self._observer.report(Event(time_s=time.time(), kind="redis", message=message))
            self._pool.check()
            for event in self._pool.events():
                self._observer.report(event)
            self._observer.look()
            self._steering.look()
            if self._observer.first_step_s is not None and self._start_is_due:
                self._try_start_evaluation()

    def stop_after_step(self) -> None:
        """Let the ranks finish their step and write a checkpoint, for at most `STOP_DEADLINE_S`.

        Raises:
            SlipstreamError: What a rank died of: then that checkpoint is not written.
        """
        if not self._training:
            return
        self._console.say("stopping after this step; press Ctrl-C again to stop at once")
        self._steering.enter("stopping")
        self._ask_coordinator("stop_granting")
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        while self._training and time.monotonic() < deadline_s:
            done, _ = ray.wait(list(self._training), num_returns=1, timeout=POLL_S)
            for future in done:
                result_of(future, self._training.pop(future))
            self._observer.look()
            self._steering.look()
        self._observer.drain()
        if self._training:
            self._console.say(f"the step did not end within {STOP_DEADLINE_S:g} s: the run is stopped without it")

    def scale(self, targets: int) -> None:
        """Have this many targets; the ranks do not notice. Raises `UsageError` if that is out of bounds."""
        self._pool.scale(targets)

    def pause(self) -> int:
        """Grant no further step; returns the last one that is granted. Full buffers make the targets idle."""
        last_step: int = self._ask_coordinator("pause")
        self._observer.phase("paused")
        return last_step

    def continue_(self) -> None:
        """Grant steps again."""
        self._ask_coordinator("go_on")
        self._observer.phase("training")

    def finish(self) -> Summary:
        """Measure the trained drafter and sum up."""
        self._observer.look()
        ledger, progress = self._ask_coordinator("finish"), self._observer.progress()
        result, buffer = self._results[0], self._table.info()
        newest = latest_checkpoint(self._output.path)
        if newest is None:
            raise SlipstreamError(
                f"not one step was trained: of {ledger.planned} planned uses {ledger.skipped} were skipped, and a step "
                f"takes {self._recipe.trainer.global_batch_size}. Lower trainer.global_batch_size, give more "
                "prompts or epochs, or set trainer.tail=pad"
            )
        self._pool.stop()
        self._end(self._parts)  # the evaluator may need what they hold
        self._evaluate(newest)
        start, end = self._evaluations.report(self._untrained), self._evaluations.report(newest)
        summary = Summary(
            run_id=self._output.run_id,
            output_dir=str(self._output.path),
            steps=result.steps,
            resumed_from_step=checkpoint_step(self._resume) if self._resume else None,
            final_loss=result.final_loss,
            accepted_length_start=start.accepted_length if start else None,
            accepted_length_start_interval=start.interval if start else None,
            accepted_length_end=end.accepted_length if end else None,
            accepted_length_end_interval=end.interval if end else None,
            lossless=end.lossless if end else None,
            tokens_trained=progress.tokens_trained,
            tokens_captured=progress.tokens_captured,
            peak_buffer_bytes=max(buffer.peak_bytes, self._output.earlier_peak_bytes()),
            buffer_capacity_bytes=buffer.capacity_bytes,
            cache_bytes_avoided=cache_bytes(progress.distinct_tokens, self._prepared.signature),
            trainer_wait_fraction=result.wait_fraction,
            first_step_s=self._observer.first_step_s,
            total_s=time.time() - self._started_s,
            ledger=ledger,
            checkpoint=str(newest),
            events=tuple(self._observer.events),
        )
        replace_text(self._output.summary, summary.model_dump_json(indent=2) + "\n")
        return summary

    def _beginning(self) -> RunStatus:
        recipe, now_s = self._recipe, time.time()
        return RunStatus(
            run_id=self._output.run_id,
            name=recipe.name,
            output_dir=str(self._output.path),
            attempt=self._output.attempt,
            target_model=recipe.target.model,
            algorithm=recipe.drafter.algorithm,
            step=checkpoint_step(self._resume) if self._resume else 0,
            total_steps=recipe.trainer.max_steps or 0,
            capacity_bytes=int(recipe.replay.capacity),
            num_targets_wanted=recipe.target.replicas,
            num_targets_most=recipe.target.max_replicas,
            started_s=now_s,
            posted_s=now_s,
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def _report(self, event: Event) -> None:
        self._observer.report(event)

    def _write_run(self) -> None:
        recipe, trainer = self._recipe, self._recipe.trainer
        self._journal.write(
            "run",
            run_id=self._output.run_id,
            name=recipe.name,
            attempt=self._output.attempt,
            resumed_from_step=checkpoint_step(self._resume) if self._resume else None,
            target=recipe.target.model,
            algorithm=recipe.drafter.algorithm,
            block_size=recipe.drafter.block_size,
            reuse=recipe.replay.reuse,
            total_steps=trainer.max_steps,
            command=shlex.join(["slipstream", *hide_passwords(sys.argv[1:])]),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def _write_end(self, error: BaseException | None) -> None:
        outcome: RunOutcome = "failed"
        message = str(error)
        if error is None:
            outcome, message = "finished", "the run is done"
        elif isinstance(error, KeyboardInterrupt | StoppedError):
            outcome, message = "stopped", "stopped; the same command goes on from the last checkpoint"
        elif not isinstance(error, SlipstreamError):  # a defect: its traceback is in the terminal
            message = f"{type(error).__name__}: {message.rstrip().rpartition(chr(10))[2]}"
        self._journal.write("end", outcome=outcome, message=message)

    def _start(self, cls: type, *args: Any, **options: Any) -> Any:
        part = start_part(cls, *args, **options)
        self._parts.append(part)
        return part.actor

    def _start_coordinator(self) -> Any:
        recipe, trainer = self._recipe, self._recipe.trainer
        settings = CoordinatorSettings(
            reuse=recipe.replay.reuse,
            last_rows=self._prepared.last_rows,
            world_size=trainer.world_size,
            micro_batch_size=trainer.micro_batch_size,
            accumulation=trainer.accumulation,
            max_steps=trainer.max_steps,
            deterministic=trainer.deterministic,
            tail=trainer.tail,
            lookahead_captures=LOOKAHEAD * recipe.replay.pulls,
            capture_log=str(self._output.capture_log),
            answers=str(self._output.answers),
            ledger=str(self._resume / "ledger.jsonl") if self._resume else None,
            generation=self._output.attempt,
        )
        concurrency = 2 * trainer.world_size + 4  # every rank may wait for a lease while the driver asks
        model = str(self._prepared.target_folder)
        return self._start(
            Coordinator,
            recipe.prompts,
            model,
            *self._where,
            settings,
            max_concurrency=concurrency,
            log=self._output.log_place("coordinator"),
        )

    def _start_rank(self, rank: int) -> Any:
        trainer = self._recipe.trainer
        return self._start(
            TrainerRank,
            rank,
            self._recipe,
            *self._where,
            self._prepared.signature,
            self._coordinator,
            str(self._output.path),
            str(self._resume) if self._resume else None,
            self._output.attempt,
            sys.argv,
            ask=trainer.ask,
            log=self._output.log_place("trainer", rank),
        )

    def _publish_targets(self, addresses: Sequence[str]) -> dict[str, str]:
        return self._registry.publish(addresses, time.time())

    def _check_target(self) -> None:
        described, expected = self._pool.describe(), self._prepared.signature
        if described.fingerprint != expected.fingerprint:
            raise TargetError(
                f"the target answers as {described.model_name} with fingerprint {described.fingerprint}, its config "
                f"here says {expected.fingerprint}: do all nodes see the same model folder?"
            )

    @property
    def _untrained(self) -> Path:
        return checkpoint_path(self._output.path, 0)

    def _try_start_evaluation(self) -> None:
        """Have the untrained drafter measured beside the training, which goes on if that fails: `_evaluate` retries."""
        try:
            self._evaluations.request(self._untrained, self._heldout)
            self._observer.show_reports(self._evaluations.collect())
        except (SlipstreamError, ray.exceptions.RayError) as error:
            self._start_is_due = False
            message = f"the untrained drafter is measured again at the end: {error}"
            self._observer.report(Event(time_s=time.time(), kind="evaluation", message=message))

    def _evaluate(self, trained: Path) -> None:
        """Have both ends of the training measured, unless they are."""
        self._observer.phase("decoding held-out prompts with the trained drafter")
        self._steering.enter("measuring")
        self._evaluations.request(self._untrained, self._heldout)
        self._evaluations.request(trained, self._heldout)
        self._evaluations.wait_started(self._steering.look)
        while not self._evaluations.is_idle:
            self._observer.show_reports(self._evaluations.collect(timeout_s=POLL_S))
            self._observer.beat()
            self._steering.look()

    def _ask_coordinator(self, question: str, *args: Any) -> Any:
        answer = getattr(self._coordinator, question).remote(*args)
        return result_of(answer, "the coordinator", timeout_s=ANSWER_DEADLINE_S)

    @staticmethod
    def _end(parts: list[Part]) -> None:
        while parts:
            ray.kill(parts.pop().actor)

    def _destroy_table(self) -> None:
        with contextlib.suppress(ReplayUnavailableError):  # Redis is gone, and the table with it
            self._table.destroy()


def cache_bytes(num_tokens: int, signature: TableSignature) -> int:
    """What a feature cache on disk would take: every row of every captured layer and of the last one, in bf16."""
    return num_tokens * (len(signature.layer_ids) + 1) * signature.hidden_size * DTYPE_BYTES["bf16"]
