"""Finds the processes of one run by the part that they play, and kills them as an out-of-memory killer would."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

ACTORS = {
    "target": "ray::TargetServer",
    "shard": "ray::ReplayShard",
    "coordinator": "ray::Coordinator",
    "rank": "ray::TrainerRank",
    "evaluator": "ray::EvaluatorActor",
}
MODULES = {"supervisor": "services.replay.supervisor", "dashboard": "services.dashboard.server"}
SERVERS = ("redis-server", "valkey-server")

PARTS = (*ACTORS, *MODULES, "redis")
"""What `kill` knows."""


def find(driver: int, part: str) -> list[psutil.Process]:
    """Living processes below a driver's that play a part; none if it has ended."""
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if _plays(process, part)]


def kill(driver: int, part: str) -> int | None:
    """SIGKILL one process of a part; its process id, or None if there is none now."""
    for process in find(driver, part):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        return process.pid
    return None


def _plays(process: psutil.Process, part: str) -> bool:
    try:
        words = process.cmdline()
        if not words or process.status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.Error:  # it ended just now
        return False
    if part == "redis":
        return Path(words[0].split()[0]).name in SERVERS
    if part in MODULES:
        return MODULES[part] in words
    return words[0].startswith(ACTORS[part])
