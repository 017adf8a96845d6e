from pathlib import Path

import pytest

from services.answers import AnswerBook, AnswerWriter
from services.append_log import open_append_log
from services.errors import CheckpointError


def test_reader_finds_what_the_writer_has_appended(tmp_path: Path) -> None:
    book, writer = AnswerBook(tmp_path / "answers.jsonl"), AnswerWriter(tmp_path / "answers.jsonl")
    assert book.find(3) is None
    writer.append(3, (7, 8))
    writer.append(5, (9,))
    assert (book.find(3), book.find(5), book.find(4)) == ((7, 8), (9,), None)
    writer.append(3, (1,))
    assert book.find(3) == (1,)


def test_half_a_line_is_not_read_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    book = AnswerBook(path)
    line = b'{"prompt":1,"token_ids":[2,3]}\n'
    path.write_bytes(line[:12])
    assert book.find(1) is None
    path.write_bytes(line)
    assert book.find(1) == (2, 3)


def test_a_new_writer_cuts_off_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"prompt":1,"token_ids":[2]}\n{"prompt":2,"tok')
    AnswerWriter(path).append(3, (4,))
    book = AnswerBook(path)
    assert (book.find(1), book.find(2), book.find(3)) == ((2,), None, (4,))


def test_line_that_is_no_answer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"prompt":1}\n')
    with pytest.raises(CheckpointError, match="not a line of answers"):
        AnswerBook(tmp_path / "answers.jsonl").find(1)


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"ab", b""), (b"a\nb", b"a\n"), (b"a\n", b"a\n")])
def test_append_log_begins_after_its_last_whole_line(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "new" / "log"
    path.parent.mkdir()
    path.write_bytes(before)
    with open_append_log(path) as file:
        file.write(b"z\n")
    assert path.read_bytes() == after + b"z\n"
