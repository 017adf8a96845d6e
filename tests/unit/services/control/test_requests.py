from __future__ import annotations

from services.control.requests import RequestBook, Submitted


def test_request_is_open_until_it_is_answered_and_answered_as_often_as_it_comes() -> None:
    book = RequestBook()
    for _ in range(2):
        assert book.submit("a", b"scale 3") == Submitted()
        assert book.open() == [b"scale 3"]
    book.answer("a", b"done")
    for _ in range(2):
        assert book.submit("a", b"scale 3") == Submitted(reply=b"done")
        assert book.open() == []


def test_requests_come_out_in_the_order_in_which_they_came() -> None:
    book = RequestBook()
    for name in ("c", "a", "b"):
        book.submit(name, name.encode())
    assert book.open() == [b"c", b"a", b"b"]


def test_other_request_under_a_known_id_is_refused_whatever_became_of_the_first() -> None:
    book = RequestBook()
    book.submit("a", b"scale 3")
    refused = book.submit("a", b"scale 2")
    assert "'a' was used for another request" in refused.refusal
    assert refused.is_wrong_usage
    book.answer("a", b"done")
    assert "another request" in book.submit("a", b"scale 2").refusal
    assert book.open() == []


def test_oldest_replies_are_forgotten() -> None:
    book = RequestBook(most_replies=2)
    for name in ("a", "b", "c"):
        book.submit(name, b"pause")
        book.answer(name, b"done " + name.encode())
    assert book.submit("c", b"pause").reply == b"done c"
    assert book.submit("b", b"pause").reply == b"done b"
    assert book.submit("a", b"pause") == Submitted()
    assert book.open() == [b"pause"]


def test_too_many_waiting_requests_are_refused_and_known_ones_are_not() -> None:
    book = RequestBook(most_waiting=2)
    book.submit("a", b"1")
    book.submit("b", b"2")
    refused = book.submit("c", b"3")
    assert "2 requests wait" in refused.refusal
    assert not refused.is_wrong_usage, "it may come again later"
    assert book.submit("a", b"1") == Submitted()
    assert book.open() == [b"1", b"2"]
    book.answer("a", b"done")
    assert book.submit("c", b"3") == Submitted()


def test_answer_to_what_was_never_asked_is_dropped() -> None:
    book = RequestBook()
    book.answer("a", b"done")
    assert book.submit("a", b"pause") == Submitted()
