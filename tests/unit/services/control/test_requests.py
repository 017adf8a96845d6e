from __future__ import annotations

from services.control.requests import RequestBook, Submitted


def test_request_is_handed_on_once_and_answered_as_often_as_it_comes() -> None:
    book = RequestBook()
    assert book.submit("a", b"scale 3") == Submitted()
    assert book.submit("a", b"scale 3") == Submitted()
    assert book.take() == [b"scale 3"]
    assert book.submit("a", b"scale 3") == Submitted(), "taken, not answered yet"
    assert book.take() == []
    book.answer("a", b"done")
    assert book.submit("a", b"scale 3") == Submitted(reply=b"done")
    assert book.take() == []


def test_requests_come_out_in_the_order_in_which_they_came() -> None:
    book = RequestBook()
    for name in ("c", "a", "b"):
        book.submit(name, name.encode())
    assert book.take() == [b"c", b"a", b"b"]


def test_other_request_under_a_known_id_is_refused_whatever_became_of_the_first() -> None:
    book = RequestBook()
    book.submit("a", b"scale 3")
    assert "'a' was used for another request" in book.submit("a", b"scale 2").refusal
    book.take()
    assert "another request" in book.submit("a", b"scale 2").refusal
    book.answer("a", b"done")
    assert "another request" in book.submit("a", b"scale 2").refusal
    assert book.take() == []


def test_oldest_replies_are_forgotten() -> None:
    book = RequestBook(most_replies=2)
    for name in ("a", "b", "c"):
        book.submit(name, b"pause")
        book.take()
        book.answer(name, b"done " + name.encode())
    assert book.submit("c", b"pause").reply == b"done c"
    assert book.submit("b", b"pause").reply == b"done b"
    assert book.submit("a", b"pause") == Submitted()
    assert book.take() == [b"pause"]


def test_too_many_waiting_requests_are_refused_and_known_ones_are_not() -> None:
    book = RequestBook(most_waiting=2)
    book.submit("a", b"1")
    book.submit("b", b"2")
    assert "2 requests wait" in book.submit("c", b"3").refusal
    assert book.submit("a", b"1") == Submitted()
    assert book.take() == [b"1", b"2"]
    assert book.submit("c", b"3") == Submitted()


def test_answer_to_what_was_never_taken_is_dropped() -> None:
    book = RequestBook()
    book.answer("a", b"done")
    assert book.submit("a", b"pause") == Submitted()
