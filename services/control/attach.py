"""Attaching this process to a Ray cluster: quickly, quietly, and with an error that says what to do.

Ray itself tries a cluster that does not answer, or refuses the token, for half a minute and more, and writes a line a
second about it. One plain gRPC call to the cluster's head tells the same at once.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from services.errors import ClusterError

AUTO = "auto"

PROBE_TIMEOUT_S = 30.0
"""How long the head of a cluster may take to answer, and its machine may be busy; where nobody listens that shows at
once."""

_PROBE = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that every Ray head answers, and whose request may be empty."""


class NoAnswerError(ClusterError):
    """No Ray cluster answers at an address."""


class NoClusterError(NoAnswerError):
    """There is no Ray cluster on this machine, and none was named."""


def attach_ray(address: str | None = None) -> None:
    """Attach to a Ray cluster; nothing happens if this process is attached to one already.

    Args:
        address: host:port of its head; None takes RAY_ADDRESS, or the cluster that runs on this machine.

    Raises:
        NoClusterError: No address was given and none is found.
        ClusterError: The cluster does not answer, refuses the token, or runs another version of Ray or Python.
    """
    import ray
    import ray.exceptions

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # notes about finding a cluster are not the user's concern
    wanted = address or os.environ.get("RAY_ADDRESS") or AUTO
    head = _find_head(wanted)
    named = head if wanted == AUTO else wanted
    _probe(head, wanted, named)
    try:
        ray.init(address=wanted, log_to_driver=False, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError as error:
        raise _refused(named) from error
    except RuntimeError as error:  # what Ray raises for another version of itself or of Python
        raise ClusterError(
            f"the Ray cluster at {named} cannot be used from here: {_one_line(error)}. Run Slipstream with the "
            "cluster's own Ray and Python"
        ) from error
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"the Ray cluster at {named} cannot be used: {_one_line(error)}") from error


def has_token() -> bool:
    """Whether Ray finds a token of its own accord."""
    return bool(_read_token())


def _find_head(wanted: str) -> str:
    """host:port of the cluster's head.

    Raises:
        NoClusterError: There is none.
        ClusterError: The address is none.
    """
    # Ray has no public way to find the cluster of this machine without attaching to it.
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in wanted:
        raise ClusterError(
            f"{wanted} is the address of a job server or of a Ray Client; the cluster itself is named by the host:port "
            "that `ray start --head` printed, by --address or RAY_ADDRESS"
        )
    try:
        head: str | None = canonicalize_bootstrap_address(wanted)
    except ConnectionError as error:
        raise NoClusterError(
            "no Ray cluster runs on this machine: start one with `ray start --head`, or name one with RAY_ADDRESS or "
            "--address host:port"
        ) from error
    except (ValueError, OSError) as error:
        raise ClusterError(f"{wanted!r} is no address of a Ray cluster, which looks like host:port: {error}") from error
    if head is None:
        raise ClusterError(f"{wanted!r} is no address of a running Ray cluster, which looks like host:port")
    return head


def _probe(head: str, wanted: str, named: str) -> None:
    """Ask the head of a cluster who it is; raises `ClusterError` if nobody answers or the token is refused."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # Ray knows the certificates
    token = _token(wanted)
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    with grpc.insecure_channel(head, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_PROBE)(b"", timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise _refused(named) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                kind = NoClusterError if wanted == AUTO else NoAnswerError
                raise kind(
                    f"no Ray cluster answers at {named}: check that it runs (`ray status`), and name another with "
                    "RAY_ADDRESS or --address host:port"
                ) from error
            # Anything else came from a head that Ray may get along with.


def _refused(head: str) -> ClusterError:
    found = "the token that Ray finds here" if has_token() else "no token is found here, and the cluster wants one"
    if has_token() and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        found += " is sent only with RAY_AUTH_MODE=token"
    elif has_token():
        found += " is not the cluster's"
    return ClusterError(
        f"the Ray cluster at {head} refuses this process: {found}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
        "cluster's token, or put it into ~/.ray/auth_token; `ray get-auth-token` on the cluster's head prints it"
    )


def _token(wanted: str) -> str:
    """The token that Ray will send, by its own documented rules; empty for none."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        return _read_token() if wanted == AUTO and not os.environ.get("RAY_ADDRESS") else ""
    return _read_token() if mode.lower() == "token" else ""


def _read_token() -> str:
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
