from __future__ import annotations

import pytest
from sample_records import plain_record, planned, sample_record

from evaluation.records import RecordLog, hash_of, read_records
from evaluation.work import Work, remaining
from services.errors import OutputDirError

SETTINGS = {"temperature": 1.0, "tasks": ["mbpp"], "ids": (1, 2)}


def test_records_come_back_as_they_were(tmp_path):
    spoken = sample_record("mbpp", 3, [1, 4], confidence=((0.5, -1.0, 2.0), (0.0, 0.0, 0.0)))
    records = [spoken, sample_record("mbpp", 4, []), plain_record("mbpp", 3, 2.0, 6)]
    with RecordLog(tmp_path / "out", SETTINGS) as log:
        for record in records:
            log.add(record)
    with RecordLog(tmp_path / "out", SETTINGS) as log:
        assert log.samples == {record.key: record for record in records[:2]}
        assert log.plain == {("mbpp", 3): records[2]}
    assert read_records(tmp_path / "out" / "records.jsonl") == records


def test_survival_is_the_running_product_of_confidences():
    record = sample_record("mbpp", 0, [2, 1], confidence=((0.0, 0.0), (800.0, -800.0)))
    assert record.survival == [[0.5, 0.25], [1.0, 0.0]]
    assert sample_record("mbpp", 0, [2]).survival is None


def test_half_a_line_is_cut_off_and_its_sample_decoded_again(tmp_path):
    with RecordLog(tmp_path, SETTINGS) as log:
        log.add(sample_record("mbpp", 0, [2]))
        log.add(sample_record("mbpp", 1, [3]))
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with RecordLog(tmp_path, SETTINGS) as log:
        assert list(log.samples) == [("mbpp", 0)]
        log.add(sample_record("mbpp", 1, [3]))
    assert [record.index for record in read_records(path)] == [0, 1]


def test_evaluation_with_other_settings_is_refused_and_the_settings_named(tmp_path):
    RecordLog(tmp_path, SETTINGS).__exit__(None, None, None)
    with pytest.raises(OutputDirError, match=r"temperature was 1.0 and is 0.0.*--output-dir"):
        RecordLog(tmp_path, SETTINGS | {"temperature": 0.0})


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputDirError, match=r"no evaluation \(thesis.txt\)"):
        RecordLog(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "sample"}', '{"kind": "other"}', "[" * 100_000])
def test_spoiled_line_of_records_is_named(tmp_path, line):
    with RecordLog(tmp_path, SETTINGS) as log:
        log.add(sample_record("mbpp", 0, [2]))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(OutputDirError, match=r"records\.jsonl:2: no record"):
        RecordLog(tmp_path, SETTINGS)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_spoiled_settings_of_an_evaluation_are_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(OutputDirError, match=r"evaluation\.json does not say what was evaluated"):
        RecordLog(tmp_path, SETTINGS)


def test_second_process_in_the_folder_is_refused(tmp_path):
    with RecordLog(tmp_path, SETTINGS), pytest.raises(OutputDirError, match="another process is evaluating"):
        RecordLog(tmp_path, SETTINGS)
    RecordLog(tmp_path, SETTINGS).__exit__(None, None, None)


def test_second_process_does_not_cut_the_line_that_the_first_one_writes(tmp_path):
    with RecordLog(tmp_path, SETTINGS):
        (tmp_path / "records.jsonl").write_bytes(b'{"kind": "sam')
        with pytest.raises(OutputDirError, match="another process is evaluating"):
            RecordLog(tmp_path, SETTINGS)
        assert (tmp_path / "records.jsonl").read_bytes() == b'{"kind": "sam'


def test_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputDirError, match=r"cannot make the folder .*out.*another --output-dir"):
        RecordLog(tmp_path / "out", SETTINGS)


def test_hash_tells_sequences_apart():
    assert len({hash_of(tokens) for tokens in ([], [1], [1, 2], [12], [2, 1])}) == 5


def test_work_is_what_the_log_lacks(tmp_path):
    task = planned("mbpp", "code", 5)
    with RecordLog(tmp_path, SETTINGS) as log:
        log.add(sample_record("mbpp", 0, [2]))
        log.add(sample_record("mbpp", 1, [2]))
        log.add(plain_record("mbpp", 1, 1.0, 2))
        works = remaining([task], log, measure_speedup=True, piece_size=2)
        assert works == [
            Work(plain=task.samples[:1]),
            Work(speculative=task.samples[2:4], plain=task.samples[2:4]),
            Work(speculative=task.samples[4:], plain=task.samples[4:]),
        ]
        assert [work.num_records for work in works] == [1, 4, 2]
        assert remaining([task], log, measure_speedup=False, piece_size=9) == [Work(speculative=task.samples[2:])]


def test_prompts_that_were_changed_since_are_refused(tmp_path):
    with RecordLog(tmp_path, SETTINGS) as log:
        log.add(sample_record("mbpp", 1, [2], prompt_hash="other"))
        with pytest.raises(OutputDirError, match="sample 1 of mbpp with another prompt"):
            remaining([planned("mbpp", "code", 2)], log, measure_speedup=False, piece_size=2)
