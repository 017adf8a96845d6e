"""The Ray actor of one target. Importing this module is quick: torch comes in when the actor loads its model."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from services.contracts import TargetDescription
from services.errors import DeadlineError, SlipstreamError, TargetError
from services.memory import keep_freed_memory
from services.placement import node_address, this_node
from services.security import Credentials
from services.target.config import TargetConfig
from services.target.listening import LOOPBACK, Listening

if TYPE_CHECKING:
    from services.target.engine import Engine
    from services.target.server import RunningServer


logger = logging.getLogger(__name__)


class TargetServer:
    """A target behind a gRPC server; use it through `ray.remote` with `max_concurrency` above 1.

    It loads in a thread, so that `ping` tells a target that is placed and still loading from one that Ray cannot place.
    A restarted actor loads again and has another address.
    """

    def __init__(self, config: TargetConfig, listening: Listening | None = None) -> None:
        """Begin to load.

        Args:
            config: What it is.
            listening: Where it serves, and with whose credentials; None is the loopback interface, open to its machine.
        """
        keep_freed_memory()
        self._config = config
        self._listening = listening
        self._settled = threading.Event()
        self._failure: SlipstreamError | None = None
        self._engine: Engine | None = None
        self._server: RunningServer | None = None
        threading.Thread(target=self._load, name="target-load", daemon=True).start()

    def ping(self) -> str | None:
        """host:port if the target serves, None while it loads.

        Raises:
            TargetError: It failed to load, or its device failed.
        """
        if not self._settled.is_set():
            return None
        if self._failure is not None:
            raise self._failure
        assert self._engine is not None
        assert self._server is not None
        self._engine.check()
        return self._server.address

    def address(self, timeout_s: float = 600.0) -> str:
        """host:port of the gRPC server, once it serves.

        Raises:
            TargetError: The target failed to load.
            DeadlineError: It did not load in time.
        """
        if not self._settled.wait(timeout_s):
            raise DeadlineError(f"target {self._config.model} did not load within {timeout_s:.0f} s")
        address = self.ping()
        assert address is not None
        return address

    def describe(self, timeout_s: float = 600.0) -> TargetDescription:
        """What the target is, once it serves; raises as `address` does."""
        self.address(timeout_s)
        assert self._engine is not None
        return self._engine.describe()

    def turn_away(self) -> None:
        """Take no new capture; each that comes is told to ask another target."""
        if self._server is not None:
            self._server.turn_away()

    def drain(self, grace_s: float) -> None:
        """Answer no more; returns when the running captures have finished, or are cut off after `grace_s`."""
        if self._server is not None:
            self._server.stop(grace_s)

    def _address(self) -> tuple[str, Credentials | None]:
        """Where to listen, with what."""
        if self._listening is None:
            return f"{LOOPBACK}:0", None
        host = self._listening.host(this_node(), node_address())
        return f"{host}:0", self._listening.credentials.at(host)

    def _load(self) -> None:
        try:
            import torch

            from services.target.engine import TransformersEngine
            from services.target.server import serve

            if self._config.threads is not None:
                torch.set_num_threads(self._config.threads)
            self._engine = TransformersEngine(self._config)
            self._server = serve(self._engine, self._config, *self._address())
            logger.info("serves %s at %s", self._config.model, self._server.address)
        except SlipstreamError as error:
            self._failure = error
            logger.error("%s", error)
        except Exception as error:  # handed to whoever asks, as the target's failure
            logger.exception("target %s failed to load", self._config.model)
            self._failure = TargetError(f"target {self._config.model} failed to load: {type(error).__name__}: {error}")
        finally:
            self._settled.set()
