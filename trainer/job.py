"""A training job, from an empty output directory to a drafter: start the parts, watch them, sum up.

    prompts ─► Coordinator ─► work queue ─► ReplayShard ◄── gRPC ── TargetServer × N
                    │                           ▼
                    └─ step leases ─► ranks ◄─ Redis ─► checkpoints ─► Evaluator ─► τ

The driver carries no tensors: it places actors, reads telemetry, starts again what was killed (`_take_in`), and ends
everything in order.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
from typing import Any, Self

import ray

from services.contracts import Event
from services.control.board import StatusBoard
from services.control.records import RunStatus
from services.errors import (
    NotBegunError,
    PartDiedError,
    SlipstreamError,
    StoppedError,
    TargetError,
)
from services.files import replace_text
from services.logs import EventLog, process_log
from services.placement import address_for_others, this_node
from services.prompts.coordinator import Progress
from services.replay.urls import hide_passwords
from services.security import Credentials
from services.target.listening import Listening
from services.target.pool import TargetPool
from services.telemetry import HistoryFile, Journal, RunOutcome, Sink, TelemetryReader
from services.views.prometheus import PrometheusSink
from services.views.tensorboard import TensorBoardSink
from trainer.checkpoint import checkpoint_path, checkpoint_step, latest_checkpoint
from trainer.cluster import ANSWER_DEADLINE_S, START_DEADLINE_S, ray_cluster, result_of, wait_started
from trainer.console import RunConsole
from trainer.draft_vocabulary import ensure_vocabulary
from trainer.evaluation_cost import EvaluationCostMeter
from trainer.evaluations import Evaluations
from trainer.measuring import Measuring
from trainer.observer import Observer
from trainer.output import OutputDir, claim_output_dir
from trainer.page import own_dashboard
from trainer.parts import Beginning, Parts
from trainer.preparation import Preparation, prepare
from trainer.recipe import Recipe
from trainer.run_redis import RunRedis, run_redis, table_prefix
from trainer.scaling import TargetScaling
from trainer.shards import Shards
from trainer.steering import Steering
from trainer.summary import Summary
from trainer.supervision import Restarts, persist
from trainer.traffic import cache_bytes, measure_traffic

POLL_S = 0.25
"""How often the driver looks at the run."""

LOAD_DEADLINE_S = 600.0
"""How long a target may take to load its weights."""

COORDINATOR, GROUP, EVALUATOR = "the coordinator", "a trainer rank", "the evaluator"
"""Parts that are started again when they lose their process, each so often and no more."""

STOP_DEADLINE_S = 180.0
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
        self._began_at_step = checkpoint_step(self._resume) if self._resume else None
        self._keep_redis_alive = redis.keep_alive
        self._tier = redis.tier
        self._prefix = table_prefix(output)
        credentials = Credentials.make(insecure=self._recipe.target.insecure)
        self._parts = Parts(prepared, output, (redis.urls, self._prefix), credentials)
        self._shards = Shards(redis.urls, self._prefix, self._parts, self._look_after_redis)
        self._listening = Listening(self._recipe.target.listen, credentials, this_node())
        self._pool = TargetPool(self._recipe.target, self._shards.publish, output.log_place("target"), self._listening)
        self._evaluations = Evaluations(
            prepared.recipe, str(prepared.target_folder), output.evaluations, output.log_place("evaluator")
        )
        self._board = StatusBoard(self._beginning())
        views: list[Sink] = [EventLog(), TensorBoardSink(output.tensorboard), PrometheusSink(output.run_id)]
        self._scaling = TargetScaling(
            self._recipe.target, self._pool, self._board, self._recipe.trainer.checkpoint_every, self._report
        )
        self._cost = EvaluationCostMeter()
        self._journal = Journal([HistoryFile(output.telemetry), self._board, self._scaling, self._cost, *views])
        self._steering = Steering(self._board, self, self._report)
        self._generation = 0
        self._restarts = {what: Restarts(what) for what in (COORDINATOR, GROUP, EVALUATOR)}
        self._attending: list[Any] = []
        """The call that the coordinator works in; none while it is set up."""
        self._is_paused = False
        self._is_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with contextlib.ExitStack() as stack:  # whatever fails, or is interrupted, the rest still happens
            stack.callback(self._journal.close)
            stack.callback(self._write_end, error)
            stack.callback(self._steering.close)
            stack.callback(self._shards.close)
            stack.callback(self._shards.destroy)
            stack.callback(self._pool.stop)
            stack.callback(self._parts.end)
            stack.callback(self._evaluations.close)

    def start(self) -> None:
        """Place every part and let the ranks begin."""
        recipe = self._recipe
        self._steering.open()
        self._write_run()
        self._evaluations.check()
        self._generation = self._output.next_generation()
        self._shards.make_tables(recipe.replay, self._prepared.signature, self._generation)
        self._pool.start()
        self._coordinator = self._parts.coordinator(Beginning(self._generation, self._resume))
        self._observer = Observer(
            self._console,
            self._journal,
            TelemetryReader(self._shards.control, self._prefix),
            self._shards,
            self._progress,
            self._pool.states,
            self._started_s,
            self._scaling.status,
        )
        if self._tier.reason:
            self._say("tier", self._tier.reason)
        self._observer.phase("starting target, replay shard, coordinator and trainer")
        self._shards.start()
        self._group = self._parts.group(self._coordinator, self._generation, self._resume)
        vocabulary = ensure_vocabulary(recipe, self._prepared.target_folder, self._output.path, self._resume)
        if vocabulary is not None:
            self._console.say(vocabulary.text)
        with contextlib.suppress(PartDiedError):  # whose it was shows when each is needed
            wait_started(self._parts.all, self._look)
        self._attending = [self._coordinator.actor.attend.remote()]
        self._measuring = Measuring(
            self._evaluations,
            self._output.path,
            self._ask_coordinator("heldout_prompts", recipe.evaluation.max_samples),
            self._restarts[EVALUATOR],
            self._pool.states,
            self._observer.show_report,
            self._say,
        )
        self._pool.wait_ready(LOAD_DEADLINE_S, self._look)
        self._check_target()
        self._shards.fill()
        self._begin_group()
        if self._resume:
            self._console.say(f"resumed from {self._resume}")

    def watch(self) -> None:
        """Follow the run until every rank has finished; raises what a part died of, or `StoppedError`."""
        self._observer.phase("filling the replay buffer")
        self._steering.enter("training")
        while self._group.calls:
            self._follow()
            if self._observer.first_step_s is not None:
                self._measuring.look(self._observer.state.total_steps or None)

    def _follow(self) -> None:
        """One look at everything, for at most `POLL_S` if nothing happens."""
        self._bring_redis_back()
        self._take_in_done([*self._shards.calls, *self._attending, *self._group.calls], POLL_S)
        self._pool.check()
        for event in self._pool.events():
            self._observer.report(event)
        self._observer.look()
        self._scaling.look(self._observer.tables)
        self._steering.look()

    def _progress(self) -> Progress:
        """The coordinator's figures; ranks that it has not heard of for too long are killed."""
        progress: Progress = self._ask_coordinator("progress")
        most_s = self._recipe.trainer.silent_s
        for rank in self._group.kill_silent(progress.silent_s, most_s):
            self._say("silent", f"trainer rank {rank} has given no sign of life for {most_s:g} s and was killed")
        return progress

    def _take_in_done(self, calls: list[Any], timeout_s: float = 0.0) -> None:
        done, _ = ray.wait(calls, num_returns=1, timeout=timeout_s) if calls else ([], [])
        for call in done:
            self._take_in(call)

    def _take_in(self, call: Any) -> None:
        """Take a call that came back, of which only a rank's should; what lost its process is started again."""
        if call in self._shards.calls:
            self._say("restart", self._shards.take(call))
            return
        try:
            if call in self._attending:
                result_of(call, "the coordinator")
                raise SlipstreamError("the coordinator ended before training did")
        except PartDiedError as error:
            self._revive_coordinator(error)
            return
        try:
            self._group.take(call)
        except PartDiedError as error:
            if self._is_stopping:
                raise
            self._renew_group(error)
            self._begin_group()

    def _revive_coordinator(self, cause: PartDiedError) -> None:
        """Set the coordinator up again in the process that Ray gives it; the ranks' accounts say where they are."""
        self._restarts[COORDINATOR].count(time.monotonic(), cause)
        self._attending = []
        actor = self._coordinator.actor

        def begin() -> None:
            try:
                result_of(actor.progress.remote(), "the coordinator", timeout_s=ANSWER_DEADLINE_S)
            except NotBegunError:
                self._resume = latest_checkpoint(self._output.path)
                arguments = self._parts.coordinator_arguments(self._beginning_of_coordinator())
                result_of(actor.begin.remote(*arguments), "the coordinator", timeout_s=START_DEADLINE_S)
                self._say("restart", "the coordinator lost its process; it goes on from ledger and ranks' accounts")

        persist(begin, self._look_after_buffer)
        self._attending = [actor.attend.remote()]

    def _renew_group(self, cause: PartDiedError) -> None:
        """End the ranks that are left, and place a group of the next generation at the last checkpoint."""
        self._restarts[GROUP].count(time.monotonic(), cause)
        self._parts.drop(*self._group.parts)
        self._resume = latest_checkpoint(self._output.path)
        step = checkpoint_step(self._resume) if self._resume else 0
        self._say("restart", f"a trainer rank lost its process; all ranks begin again after step {step}")
        self._generation = self._output.next_generation()
        begin = ("begin_group", self._generation, Beginning(self._generation, self._resume).ledger)
        persist(lambda: self._ask_coordinator(*begin), self._look)
        self._write_run()
        self._group = self._parts.group(self._coordinator, self._generation, self._resume)

    def _begin_group(self) -> None:
        """Let the ranks meet and train; where one dies before, all are placed again."""
        while True:
            try:
                wait_started(self._group.parts, self._look)
                self._group.begin()
            except PartDiedError as error:
                self._renew_group(error)
            else:
                return

    def stop_after_step(self) -> None:
        """Let the ranks finish their step and write a checkpoint, for at most `STOP_DEADLINE_S`.

        Raises:
            SlipstreamError: What a rank died of: then that checkpoint is not written.
        """
        if not self._group.calls:
            return
        self._console.say("stopping after this step; press Ctrl-C again to stop at once")
        self._steering.enter("stopping")
        self._is_stopping = True
        self._ask_coordinator("stop_granting")
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        while self._group.calls and time.monotonic() < deadline_s:
            self._follow()
        self._observer.look(now=True)
        if self._group.calls:
            self._console.say(f"the step did not end within {STOP_DEADLINE_S:g} s: the run is stopped without it")

    def scale(self, targets: int) -> str:
        """Have this many targets; the ranks do not notice. Raises `UsageError` if that is out of bounds."""
        return self._scaling.by_hand(targets)

    def autoscale(self, is_on: bool) -> str:
        """Let the run scale its targets by itself, or no more. Raises `UsageError` if its recipe gives no bounds."""
        return self._scaling.autoscale(is_on)

    def pause(self) -> int:
        """Grant no further step; returns the last one that is granted. Full buffers make the targets idle."""
        self._is_paused = True
        last_step: int = self._ask_coordinator("pause")
        self._observer.phase("paused")
        return last_step

    def continue_(self) -> None:
        """Grant steps again."""
        self._is_paused = False
        self._ask_coordinator("go_on")
        self._observer.phase("training")

    def finish(self) -> Summary:
        """Measure the trained drafter and sum up."""
        self._observer.look(now=True)
        ledger, progress = self._ask_coordinator("finish"), self._observer.progress()
        result = self._group.results[0]
        newest = latest_checkpoint(self._output.path)
        if newest is None:
            raise SlipstreamError(
                f"not one step was trained: of {ledger.planned} planned uses {ledger.skipped} were skipped, and a step "
                f"takes {self._recipe.trainer.global_batch_size}. Lower trainer.global_batch_size, give more "
                "prompts or epochs, or set trainer.tail=pad"
            )
        self._pool.stop()
        self._parts.end()  # the evaluator may need what they hold
        self._observer.phase("decoding held-out prompts with the trained drafter")
        self._steering.enter("measuring")
        self._measuring.finish(newest, self._look_while_measuring)
        untrained = checkpoint_path(self._output.path, 0)
        start, end = self._evaluations.report(untrained), self._evaluations.report(newest)
        summary = Summary(
            run_id=self._output.run_id,
            output_dir=str(self._output.path),
            steps=result.steps,
            resumed_from_step=self._began_at_step,
            final_loss=result.final_loss,
            accepted_length_start=start.accepted_length if start else None,
            accepted_length_start_interval=start.interval if start else None,
            accepted_length_end=end.accepted_length if end else None,
            accepted_length_end_interval=end.interval if end else None,
            lossless=end.lossless if end else None,
            tokens_trained=progress.tokens_trained,
            tokens_captured=progress.tokens_captured,
            peak_buffer_bytes=max(self._observer.peak_bytes, self._output.earlier_peak_bytes()),
            buffer_capacity_bytes=int(self._recipe.replay.capacity),
            cache_bytes_avoided=cache_bytes(progress.distinct_tokens, self._prepared.signature),
            features=measure_traffic(progress.traffic, self._prepared.signature),
            evaluation_cost=self._cost.cost() if self._evaluations.is_enabled else None,
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
            step=self._began_at_step or 0,
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

    def _say(self, kind: str, message: str) -> None:
        self._report(Event(time_s=time.time(), kind=kind, message=message))

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

    def _beginning_of_coordinator(self) -> Beginning:
        return Beginning(
            self._generation,
            self._resume,
            joins=bool(self._group.calls),
            is_paused=self._is_paused,
            is_stopped=self._is_stopping,
        )

    def _look(self) -> None:
        """What goes on while ranks are waited for. What a part waits for itself is brought back before it."""
        self._take_in_done(self._attending)
        self._look_after_buffer()

    def _look_after_buffer(self) -> None:
        """What goes on while the coordinator is waited for."""
        self._take_in_done(self._shards.calls)
        self._look_after_redis()

    def _look_after_redis(self) -> None:
        """What goes on while a replay shard is waited for."""
        self._bring_redis_back()
        self._steering.look()

    def _bring_redis_back(self) -> None:
        for news in self._keep_redis_alive():
            self._say("redis", news)

    def _check_target(self) -> None:
        described, expected = self._pool.describe(), self._prepared.signature
        if described.fingerprint != expected.fingerprint:
            raise TargetError(
                f"the target answers as {described.model_name} with fingerprint {described.fingerprint}, its config "
                f"here says {expected.fingerprint}: do all nodes see the same model folder?"
            )

    def _look_while_measuring(self) -> None:
        self._observer.beat()
        self._steering.look()

    def _ask_coordinator(self, question: str, *args: Any) -> Any:
        """Ask the coordinator, and set it up again first if its process was killed."""
        while True:
            answer = getattr(self._coordinator.actor, question).remote(*args)
            try:
                return result_of(answer, "the coordinator", timeout_s=ANSWER_DEADLINE_S)
            except NotBegunError as error:
                self._revive_coordinator(PartDiedError(str(error)))
            except PartDiedError as error:
                self._revive_coordinator(error)
