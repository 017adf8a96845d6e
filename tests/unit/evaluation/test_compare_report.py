from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from sample_records import plain_record, planned, sample_record, timing

from evaluation.benchmark import BenchmarkSettings
from evaluation.compare.comparison import Comparison, compare, reached_counts
from evaluation.compare.entrants import Entrant, Match, Parameters
from evaluation.compare.match import PLAIN, Decoded
from evaluation.compare.outputs import as_json, write_outputs
from evaluation.compare.report import markdown, verdict
from evaluation.records import SampleRecord
from evaluation.session import Session
from trainer.compare_console import CompareDisplay, comparison_tables

TASKS = (planned("gsm8k", "math", 2), planned("mbpp", "code", 2), planned("humaneval", "code", 2))

AHEAD = {"gsm8k": [[3, 2], [3, 3]], "mbpp": [[4, 4], [1, 2]], "humaneval": [[2], [2]]}
BEHIND = {"gsm8k": [[2, 2], [2, 3]], "mbpp": [[3, 3], [2, 1]], "humaneval": [[2], [2]]}

PROVENANCE = {
    "command": ["slipstream", "compare", "a b", "c"],
    "git_sha": "f00",
    "packages": {"torch": "2.13.0"},
    "python": "3.11",
    "platform": "Linux",
}


def entrant(label: str, **changes) -> Entrant:
    settings = BenchmarkSettings.model_validate({"target": "demo", "drafter": f"/runs/{label}"} | changes)
    session = Session(
        settings=settings,
        tasks=TASKS,
        identity=settings.model_dump(mode="json") | {"drafter_digest": label * 8, "target_fingerprint": "fade"},
        algorithm="dspark",
        warnings=(),
        published={},
    )
    return Entrant(label=label, session=session, parameters=Parameters(own=780_000, in_all=1_000_000))


def records(rounds: dict[str, list[list[int]]], **changes) -> dict[tuple[str, int], SampleRecord]:
    found = [
        sample_record(task.name, index, committed, domain=task.domain, **changes)
        for task in TASKS
        for index, committed in enumerate(rounds[task.name])
    ]
    return {record.key: record for record in found}


def comparison(**changes) -> Comparison:
    plain = {sample.key: plain_record(sample.task, sample.index, 2.0, 4) for task in TASKS for sample in task.samples}
    measured = changes.get("measure_speedup", True)
    decoded = Decoded(samples=(records(AHEAD), records(BEHIND)), plain=plain if measured else {})
    match = Match(entrants=(entrant("ahead", **changes), entrant("behind", **changes)))
    return compare(match, decoded, PROVENANCE, "an abacus")


def test_figures_of_each_drafter_are_those_of_its_own_records():
    found = comparison()
    ahead, behind = found.standings
    assert ahead.figures(("task", "gsm8k")).accepted_length == pytest.approx(11 / 4)
    assert behind.figures(("task", "gsm8k")).accepted_length == pytest.approx(9 / 4)
    assert ahead.figures(("domain", "code")).accepted_length == pytest.approx(15 / 6)
    assert ahead.cost(("all", "all")).round_s == pytest.approx(6 * 0.25 / 10)
    assert ahead.cost(("all", "all")).share == pytest.approx(0.25)
    assert found.shown_groups == [
        ("task", "gsm8k"), ("task", "mbpp"), ("task", "humaneval"), ("domain", "code"), ("all", "all"),
    ]  # fmt: skip


def test_differences_are_of_each_pair_and_group():
    found = comparison()
    assert found.pairs == [("ahead", "behind")]
    pair = found.pairs[0]
    gsm8k = found.difference(pair, ("task", "gsm8k"))
    assert gsm8k is not None
    assert gsm8k.difference == pytest.approx(0.5)
    assert gsm8k.is_clear
    code = found.difference(pair, ("domain", "code"))
    assert code is not None
    assert code.num_prompts == 4
    same = found.difference(pair, ("task", "humaneval"))
    assert same is not None
    assert not same.is_clear
    assert len(found.differences) == 6


def test_rounds_that_got_to_a_position_are_counted():
    record = sample_record("mbpp", 0, [1, 2, 4, 2], proposal_lengths=[3, 3, 3, 1])
    assert reached_counts([record]) == (4, 2, 1)
    assert reached_counts([]) == ()


def test_clear_lead_and_open_race_are_told_apart_in_words():
    found = comparison()
    assert verdict(found).startswith("**ahead** has the longest τ over all samples, 2.60")
    assert "its lead over behind has a paired 95 % interval above 0" in verdict(found)
    same = Decoded(samples=(records(AHEAD), records(AHEAD)), plain={})
    match = Match(entrants=(entrant("one", measure_speedup=False), entrant("two", measure_speedup=False)))
    open_race = verdict(compare(match, same, PROVENANCE, "an abacus"))
    assert "do not tell it apart from two" in open_race
    assert "above 0" not in open_race


def test_report_names_how_it_was_measured_and_links_its_pictures(tmp_path):
    found = comparison()
    write_outputs(found, tmp_path)
    page = (tmp_path / "report.md").read_text()
    for words in (
        "`fade`",
        "an abacus",
        "torch 2.13.0",
        "$ slipstream compare 'a b' c",
        "0.78 M",
        "2.75 (2.50 – 3.00)",
    ):
        assert words in page
    assert "| gsm8k | **+0.50 (+0.50 – +0.50)** |" in page
    assert "> **Mind:** fewer than 20 prompts (gsm8k 2, mbpp 2, humaneval 2)" in page
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(pictures) == 3
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert not list(tmp_path.glob("*.new"))


def test_acceptance_stands_with_the_rounds_it_is_of():
    page = markdown(comparison())
    assert "| 1 | 0.90 (of 10) · 0.90 | 0.90 (of 10) · 0.90 |" in page


def test_without_speedup_nothing_claims_one(tmp_path):
    found = comparison(measure_speedup=False)
    write_outputs(found, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "no drafter" not in page
    assert "×" not in page


def test_sample_groups_without_rounds_have_dashes():
    silent = {task.name: [[], []] for task in TASKS}
    spent = timing(1.0, 1)
    decoded = Decoded(samples=(records(silent, timing=spent), records(silent, timing=spent)), plain={})
    match = Match(entrants=(entrant("one", measure_speedup=False), entrant("two", measure_speedup=False)))
    found = compare(match, decoded, PROVENANCE, "an abacus")
    assert verdict(found) == "Every sample ended at its first token, so there is no accepted length."
    assert "| gsm8k | 2 | – | – |" in markdown(found)


def test_json_and_csv_hold_the_same_figures(tmp_path):
    found = comparison()
    write_outputs(found, tmp_path)
    answer = json.loads((tmp_path / "comparison.json").read_text())
    assert answer == json.loads(json.dumps(as_json(found, tmp_path)))
    ahead = answer["drafters"]["ahead"]
    assert ahead["overall"]["accepted_length"] == pytest.approx(2.6)
    assert ahead["parameters"]["own"] == 780_000
    rows = list(csv.DictReader((tmp_path / "drafters.csv").read_text().splitlines()))
    assert len(rows) == 12
    mbpp = next(row for row in rows if (row["drafter"], row["name"]) == ("ahead", "mbpp"))
    assert float(mbpp["accepted_length"]) == ahead["tasks"]["mbpp"]["accepted_length"]
    assert float(mbpp["draft_share"]) == 0.25
    assert float(mbpp["cond_accept_rate@0"]) == 0.75
    differences = list(csv.DictReader((tmp_path / "differences.csv").read_text().splitlines()))
    assert [row["name"] for row in differences] == ["gsm8k", "mbpp", "humaneval", "math", "code", "all"]
    assert float(differences[0]["low"]) == answer["differences"][0]["interval"][0]
    assert answer["differences"][0]["is_clear"]


def test_greedy_output_that_differs_is_warned_of_by_drafter():
    plain = {sample.key: plain_record(sample.task, sample.index, 2.0, 4) for task in TASKS for sample in task.samples}
    decoded = Decoded(samples=(records(AHEAD), records(BEHIND, output_hash="other")), plain=plain)
    match = Match(entrants=(entrant("ahead", temperature=0.0), entrant("behind", temperature=0.0)))
    warnings = compare(match, decoded, PROVENANCE, "an abacus").warnings
    assert warnings[0].startswith("behind: greedy output differs from the target's own in 6 of 6 samples")
    assert not any(warning.startswith("ahead") for warning in warnings)


def test_terminal_shows_progress_and_tables(tmp_path: Path):
    with (tmp_path / "screen").open("w") as file:
        console = Console(width=110, record=True, file=file)
        with CompareDisplay(console) as display:
            display.begin(1, 3)
            display.on_record("ahead", sample_record("mbpp", 0, [3, 2]))
            display.on_record(PLAIN, plain_record("mbpp", 0, 2.0, 4))
        console.print(comparison_tables(comparison()))
        text = console.export_text()
    assert "going on where it stopped: 1 of 3 records are there" in text
    assert "2/3 · mbpp, ahead · τ ahead 2.50" in text
    assert "+0.50 (+0.50–+0.50)" in text
    assert "ahead has the longest τ" in text
    assert "! fewer than 20 prompts" in text
