"""The controls of a run on Ray. Ray is imported, and attached to, with the first request and not before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.dashboard.controls import Scale, Steer

if TYPE_CHECKING:
    from services.control.records import Reply


class RayControls:
    """Asks the run's driver, as `slipstream scale` and its like do.

    Args:
        output_dir: The run's; says where its driver can be reached.
        stays_attached: To the run's Ray cluster between requests, which are then quicker. Only for a process that ends
            with the run: Ray ends processes whose cluster has gone away.
    """

    def __init__(self, output_dir: Path, *, stays_attached: bool) -> None:
        self._output_dir = output_dir
        self._stays_attached = stays_attached

    def act(self, run_id: str, action: Scale | Steer) -> str:
        """Carry an action out.

        Raises:
            SlipstreamError: The run is not there any more, or refuses.
        """
        from services.control.client import attach, read_beacon

        where = run_id if read_beacon(self._output_dir) is None else str(self._output_dir)
        try:
            run = attach(where)
            request_id = action.request_id
            reply: Reply
            if isinstance(action, Scale):
                reply = run.scale(action.targets, request_id=request_id)
            elif action.action == "pause":
                reply = run.pause(request_id=request_id)
            elif action.action == "continue":
                reply = run.continue_(request_id=request_id)
            else:
                reply = run.stop(request_id=request_id)
            return reply.message
        finally:
            if not self._stays_attached:
                import ray

                ray.shutdown()
