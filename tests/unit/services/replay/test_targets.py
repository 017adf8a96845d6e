"""Which target is chosen, and which never again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from services.contracts import CaptureJob, Chunk, TableSignature, TargetDescription, WireDtype
from services.errors import SignatureError, TargetUnavailableError
from services.replay.targets import Targets, check_description

SIGNATURE = TableSignature(fingerprint="abc", layer_ids=(0, 3), hidden_size=4, dtype="bf16")


def describe(**changes: object) -> TargetDescription:
    values: dict[str, object] = {
        "model_name": "tiny",
        "fingerprint": "abc",
        "num_layers": 4,
        "hidden_size": 4,
        "vocab_size": 10,
        "dtype": "float32",
        "max_tokens": 100,
        "engine": "fake",
    }
    return TargetDescription.model_validate(values | changes)


class FakeClient:
    def __init__(self, description: TargetDescription | None) -> None:
        self.description = description
        self.is_closed = False

    def describe(self, timeout_s: float) -> TargetDescription:
        if self.description is None:
            raise TargetUnavailableError("nobody there")
        return self.description

    def capture(
        self,
        job: CaptureJob,
        *,
        layer_ids: Sequence[int],
        wire_dtype: WireDtype,
        chunk_bytes: int,
        timeout_s: float,
        first_chunk_s: float,
        progress_s: float,
        on_answer: Callable[[Sequence[int]], None] | None = None,
    ) -> Iterator[tuple[Chunk, memoryview]]:
        raise AssertionError("not called here")

    def close(self) -> None:
        self.is_closed = True


class Network:
    """Makes the clients of a fixed set of targets, and remembers them."""

    def __init__(self, **descriptions: TargetDescription | None) -> None:
        self.descriptions = descriptions
        self.clients: list[FakeClient] = []

    def connect(self, address: str) -> FakeClient:
        self.clients.append(FakeClient(self.descriptions[address]))
        return self.clients[-1]


def test_least_busy_live_target_is_chosen() -> None:
    targets = Targets(SIGNATURE, Network(a=describe(), b=describe()).connect)
    assert targets.choose([], 0.0) is None
    assert [targets.choose(["a", "b"], 0.0) for _ in range(3)] == ["a", "b", "a"]
    targets.leave("a")
    targets.leave("a")
    assert targets.choose(["a", "b"], 0.0) == "a"
    assert targets.choose(["b"], 0.0) == "b"


def test_failed_target_is_left_alone_twice_as_long_each_time() -> None:
    targets = Targets(SIGNATURE, Network(a=describe()).connect)
    now_s, pauses = 100.0, []
    for _ in range(6):
        targets.choose(["a"], now_s)
        assert targets.failed("a", now_s)
        assert not targets.failed("a", now_s), "another capture fell with it: no second doubling"
        targets.leave("a")
        pause = next(pause for pause in (0.5, 1.0, 2.0, 4.0, 8.0) if targets.choose(["a"], now_s + pause) == "a")
        targets.leave("a")
        pauses.append(pause)
        assert targets.choose(["a"], now_s + pause - 0.01) is None
        now_s += pause
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    targets.succeeded("a")
    targets.choose(["a"], now_s)
    targets.failed("a", now_s)
    assert targets.choose(["a"], now_s + 0.5) == "a"


def test_target_is_described_once_and_again_after_a_failure() -> None:
    network = Network(a=describe())
    targets = Targets(SIGNATURE, network.connect)
    targets.choose(["a"], 0.0)
    first = targets.client("a")
    assert targets.client("a") is first
    targets.failed("a", 0.0)
    assert targets.client("a") is not first
    assert len(network.clients) == 2


def test_client_of_a_failed_target_is_closed_when_its_last_capture_has_left() -> None:
    network = Network(a=describe())
    targets = Targets(SIGNATURE, network.connect)
    for _ in range(2):
        targets.choose(["a"], 0.0)
    targets.client("a")
    targets.failed("a", 0.0)
    targets.leave("a")
    assert not network.clients[0].is_closed
    targets.leave("a")
    assert network.clients[0].is_closed


def test_target_that_is_live_no_more_is_forgotten_once_nothing_is_pulled_from_it() -> None:
    network = Network(a=describe(), b=describe())
    targets = Targets(SIGNATURE, network.connect)
    for _ in range(2):
        targets.client(targets.choose(["a", "b"], 0.0) or "")
    of_a, of_b = network.clients
    targets.leave("b")
    targets.choose([], 0.0)
    assert (of_a.is_closed, of_b.is_closed) == (False, True), "a capture still runs at a"
    targets.leave("a")
    targets.choose([], 0.0)
    assert of_a.is_closed
    assert targets.client(targets.choose(["a"], 0.0) or "") is network.clients[2], "it may come back"


def test_target_that_does_not_answer_leaves_no_open_client() -> None:
    network = Network(a=None)
    targets = Targets(SIGNATURE, network.connect)
    targets.choose(["a"], 0.0)
    with pytest.raises(TargetUnavailableError):
        targets.client("a")
    assert network.clients[0].is_closed


def test_target_that_failed_a_capture_is_its_last_choice_and_not_at_once() -> None:
    targets = Targets(SIGNATURE, Network(a=describe(), b=describe()).connect)
    assert targets.choose(["a"], 10.0, {"a": 11.0}) is None
    assert [targets.choose(["a", "b"], 10.0, {"a": 11.0}) for _ in range(2)] == ["b", "b"]
    assert targets.choose(["a", "b"], 12.0, {"a": 11.0}) == "b", "busier, but it has not failed this capture"
    assert targets.choose(["a"], 12.0, {"a": 11.0}) == "a"


def test_full_target_is_asked_again_a_moment_later_by_the_same_client() -> None:
    network = Network(a=describe())
    targets = Targets(SIGNATURE, network.connect)
    targets.choose(["a"], 0.0)
    client = targets.client("a")
    targets.busy("a", 0.0)
    assert targets.choose(["a"], 0.09) is None
    assert targets.choose(["a"], 0.1) == "a"
    assert targets.client("a") is client


def test_target_of_other_weights_leaves_no_open_client() -> None:
    network = Network(a=describe(fingerprint="other"))
    targets = Targets(SIGNATURE, network.connect)
    targets.choose(["a"], 0.0)
    with pytest.raises(SignatureError, match="other"):
        targets.client("a")
    assert network.clients[0].is_closed


def test_close_closes_every_client() -> None:
    network = Network(a=describe(), b=describe())
    targets = Targets(SIGNATURE, network.connect)
    for _ in range(2):
        targets.client(targets.choose(["a", "b"], 0.0) or "")
    targets.failed("b", 0.0)
    targets.close()
    assert [client.is_closed for client in network.clients] == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "xyz"}, "fingerprint xyz"),
        ({"hidden_size": 8}, "hidden size 8"),
        ({"num_layers": 3}, r"has 3 layers, the replay table wants \[3\]"),
    ],
)
def test_description_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    check_description(describe(), SIGNATURE)
    with pytest.raises(SignatureError, match=message):
        check_description(describe(**changes), SIGNATURE)
