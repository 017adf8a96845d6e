from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

import trainer.export
from drafters import build_drafter, copy_target_embeddings, load_drafter, save_drafter
from drafters.drafter import Drafter
from drafters.export.formats import Tables
from drafters.export.sglang import load_sglang
from evaluation.confidence.temperatures import ConfidenceTemperatures
from evaluation.origin import Origin, read_origin
from evaluation.weights import weights_digest
from services.answers import AnswerWriter
from trainer.cli import app

TARGET = Path(__file__).parents[3] / "trainer" / "demo" / "target"
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {"num_draft_layers": 1, "block_size": 3, "mask_token_id": 3, "markov_rank": 4},
    "dspark_rnn": {
        "num_draft_layers": 1,
        "block_size": 3,
        "mask_token_id": 3,
        "markov_rank": 4,
        "markov_head_type": "rnn",
    },
    "eagle3": {"algorithm": "eagle3", "ttt_length": 3},
    "eagle3_llama": {"algorithm": "eagle3", "ttt_length": 3, "layout": "llama"},
}
REPORT = {
    "accepted_length": 2.5,
    "interval": [2.25, 2.75],
    "accept_rate": [0.75, 0.5],
    "temperature": 0.0,
    "num_samples": 12,
}


def new_drafter(kind: str) -> Drafter:
    torch.manual_seed(3)
    drafter = build_drafter(AutoConfig.from_pretrained(TARGET), **KINDS[kind])
    copy_target_embeddings(drafter, TARGET)
    return drafter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory, with a recipe that trains on two answers of the target's own."""
    folder = tmp_path / "run"
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    line = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "return self.value"}]}
    prompts.write_text(json.dumps(line) + "\n")
    (folder / "run.json").write_text("{}")
    writer = AnswerWriter(folder / "answers.jsonl")
    writer.append(0, (40, 41, 40, 42))
    writer.close()
    untrained = folder / "step_0"
    untrained.mkdir()
    for name in ("config.json", "model.safetensors"):
        (untrained / name).write_text("untrained")
    return folder


def measured(checkpoint: Path, settings: dict[str, Any] | None = None, **figures: Any) -> None:
    """Add a line to the results of the checkpoint's run."""
    label = checkpoint.resolve().name
    report = REPORT | {"label": label, "weights": weights_digest(checkpoint)} | figures
    with (checkpoint.parent / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"settings": settings or {}, "report": report}) + "\n")


def figures_rows(folder: Path) -> list[str]:
    """Of the card, without the table's head."""
    section = (folder / "README.md").read_text().partition("## Accepted length")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def checkpoint(run: Path, kind: str, **prompts: Any) -> Path:
    folder = run / "step_7"
    save_drafter(new_drafter(kind), folder)
    measured(folder)
    measured(run / "step_0", accepted_length=1.125)
    measured(folder, label="step_5", accepted_length=9.0)
    with (run / "evaluations.jsonl").open("a") as file:
        file.write("{}\n")
    recipe = {
        "target": {"model": str(TARGET)},
        "drafter": KINDS[kind],
        "prompts": {"source": str(run / "prompts.jsonl"), "answers": "target"} | prompts,
    }
    for place in (run, folder):
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "provenance.json").write_text(json.dumps({"git_sha": "abc123", "packages": {"torch": "2.13"}}))
    (run / "step_best").symlink_to("step_7")
    return run / "step_best"


def export(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize(
    ("kind", "to", "architecture"),
    [
        ("dspark", "sglang", "Qwen3DSparkModel"),
        ("dspark_rnn", "sglang", "Qwen3DSparkModel"),
        ("eagle3_llama", "sglang", "LlamaForCausalLMEagle3"),
        ("dspark", "vllm", "DSparkSpeculator"),
        ("eagle3", "vllm", "Eagle3Speculator"),
        ("eagle3", "native", "Qwen3Eagle3Model"),
    ],
)
def test_export_writes_a_checked_folder_with_its_card(run: Path, kind: str, to: str, architecture: str) -> None:
    out = run.parent / "exports" / "drafter"
    done = export(checkpoint(run, kind), "--to", to, "--output-dir", out, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["architecture"] == architecture
    assert result["checkpoint"] == str(run / "step_7")
    assert result["max_logit_difference"] == 0
    assert result["num_drafts_compared"] == 9
    assert result["accepted_length"] == 2.5
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    files = {"config.json", "model.safetensors", "README.md"} | ({"provenance.json"} if to == "native" else set())
    assert {path.name for path in out.iterdir()} == set(result["files"]) == files
    assert [path.name for path in out.parent.iterdir()] == ["drafter"], "nothing hidden is left"
    card = (out / "README.md").read_text()
    for expected in (
        "| step_7 | all | 2.50 (2.25 – 2.75) | 12 | 0 | 0.75, 0.50 |",
        "| untrained | all | 1.12 ",
        result["target_fingerprint"],
        "non-thinking mode",
        "abc123",
        "torch 2.13",
        f"algorithm: {kind.partition('_')[0]}",
        "source: prompts.jsonl",
        "licence",
    ):
        assert expected in card
    assert str(run) not in card, "where it was trained is nobody's business"


def test_card_shows_what_these_weights_did_with_the_newest_settings(run: Path) -> None:
    source, out = checkpoint(run, "eagle3"), run.parent / "out"
    old, new = {"max_new_tokens": 8}, {"max_new_tokens": 9}
    measured(run / "step_7", new, accepted_length=3.0, num_samples=20, began_s=40.0)
    measured(run / "step_7", new, accepted_length=3.5, num_samples=5, began_s=50.0)
    measured(run / "step_7", new, accepted_length=9.0, num_samples=99, began_s=60.0, weights="trained before")
    measured(run / "step_7", old, accepted_length=8.0, num_samples=99, began_s=30.0)
    measured(run / "step_0", old, accepted_length=7.0, began_s=70.0)
    measured(run / "step_0", new, accepted_length=1.5, began_s=10.0)
    done = export(source, "--to", "native", "--output-dir", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accepted_length"] == 3.0
    assert figures_rows(out) == [
        "| untrained | all | 1.50 (2.25 – 2.75) | 12 | 0 | 0.75, 0.50 |",
        "| step_7 | all | 3.00 (2.25 – 2.75) | 20 | 0 | 0.75, 0.50 |",
    ]


def test_retrained_checkpoint_that_nobody_measured_has_no_figures(run: Path) -> None:
    source, out = checkpoint(run, "eagle3"), run.parent / "out"
    drafter = new_drafter("eagle3")
    drafter.norm.weight.data.mul_(2)
    save_drafter(drafter, run / "step_7")
    done = export(source, "--to", "native", "--output-dir", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accepted_length"] is None
    assert "Not measured by the run" in (out / "README.md").read_text()


def test_card_shows_domains_where_there_are_several(run: Path) -> None:
    source, out = checkpoint(run, "eagle3"), run.parent / "out"
    code = {"num_samples": 9, "accepted_length": 3.0, "interval": [2.5, 3.5], "accept_rate": [0.8, 0.6]}
    math = {"num_samples": 3, "accepted_length": None, "interval": None, "accept_rate": []}
    measured(run / "step_0", {"seed": 1}, began_s=1.0, domains={"code": code})
    measured(run / "step_7", {"seed": 1}, began_s=1.0, domains={"all": math, "code": code, "math": math})
    assert export(source, "--to", "native", "--output-dir", out).exit_code == 0
    assert figures_rows(out) == [
        "| untrained | all | 2.50 (2.25 – 2.75) | 12 | 0 | 0.75, 0.50 |",
        "| step_7 | all | 2.50 (2.25 – 2.75) | 12 | 0 | 0.75, 0.50 |",
        "| step_7 | other | – | 3 | 0 |  |",
        "| step_7 | code | 3.00 (2.50 – 3.50) | 9 | 0 | 0.80, 0.60 |",
        "| step_7 | math | – | 3 | 0 |  |",
    ]


def test_exported_drafter_is_read_back_by_its_format(run: Path) -> None:
    out = run.parent / "out"
    assert export(checkpoint(run, "dspark"), "--to", "sglang", "--output-dir", out).exit_code == 0
    trained = load_drafter(run / "step_7")
    loaded = load_sglang(out, Tables.of(trained))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def test_native_export_keeps_origin_and_fitted_temperatures(run: Path) -> None:
    source, out = checkpoint(run, "dspark"), run.parent / "out"
    origin = {"model": str(TARGET), "fingerprint": "of another", "enable_thinking": True}
    (source / "provenance.json").write_text(json.dumps({"target": origin}))
    fitted = ConfidenceTemperatures(
        temperatures=(1.5, 2.0), decoding_temperature=0.0, tasks=("code",), num_samples=3, num_rounds=9
    )
    fitted.save(source)
    for _ in range(2):
        assert export(source, "--to", "native", "--output-dir", out, "--force").exit_code == 0
    assert read_origin(out) == read_origin(source) == Origin.model_validate(origin)
    assert ConfidenceTemperatures.load(out) == fitted


def test_what_the_format_cannot_express_is_refused_with_the_recipe_line(run: Path) -> None:
    done = export(checkpoint(run, "dspark_rnn"), "--to", "vllm", "--output-dir", run.parent / "out")
    assert done.exit_code == 2
    assert "drafter.markov_head_type: vanilla" in done.output
    assert not (run.parent / "out").exists()


def test_export_that_drafts_otherwise_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(folder: Path, **options: Any) -> Drafter:
        drafter = load_sglang(folder, **options)
        drafter.norm.weight.data.mul_(1.01)
        return drafter

    monkeypatch.setattr(trainer.export, "load_sglang", spoiled)
    done = export(checkpoint(run, "dspark"), "--to", "sglang", "--output-dir", run.parent / "exports" / "out")
    assert done.exit_code == 1
    assert "logits of what was written differ" in done.output
    assert list((run.parent / "exports").iterdir()) == []


def test_folder_that_is_not_empty_is_replaced_only_by_force(run: Path) -> None:
    source, out = checkpoint(run, "eagle3"), run.parent / "out"
    assert export(source, "--to", "vllm", "--output-dir", out).exit_code == 0
    again = export(source, "--to", "native", "--output-dir", out)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert export(source, "--to", "native", "--output-dir", out, "--force").exit_code == 0
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3Eagle3Model"]


def test_folder_that_holds_something_else_is_left_as_it_is(run: Path) -> None:
    source = checkpoint(run, "eagle3")
    done = export(source, "--to", "native", "--output-dir", run / "step_7", "--force")
    assert done.exit_code == 2
    assert "what no export wrote" in done.output
    assert (run / "step_7" / "recipe.yaml").exists()


def test_what_a_killed_export_left_is_no_obstacle(run: Path) -> None:
    (run.parent / ".out.partial").mkdir()
    (run.parent / ".out.partial" / "model.safetensors").write_text("half")
    assert export(checkpoint(run, "eagle3"), "--to", "vllm", "--output-dir", run.parent / "out").exit_code == 0
    assert not (run.parent / ".out.partial").exists()


def test_vocabulary_is_cut_by_the_tokens_of_the_captured_stream(run: Path) -> None:
    out = run.parent / "out"
    done = export(
        checkpoint(run, "eagle3_llama"), "--to", "sglang", "--output-dir", out, "--draft-vocab-size", 5, "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["draft_vocab_size"] == 5
    tensors = load_file(out / "model.safetensors")
    kept = (tensors["d2t"] + torch.arange(5)).tolist()
    assert set(kept) >= {40, 41, 42}
    head = load_drafter(run / "step_7").lm_head.weight
    assert torch.equal(tensors["lm_head.weight"], head[kept])


def test_other_drafters_vocabulary_is_not_cut(run: Path) -> None:
    done = export(
        checkpoint(run, "dspark"), "--to", "vllm", "--output-dir", run.parent / "out", "--draft-vocab-size", 90
    )
    assert done.exit_code == 2
    assert "only Eagle3" in done.output


def test_drafter_of_another_target_is_refused(run: Path, tmp_path: Path) -> None:
    source = checkpoint(run, "eagle3")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((TARGET / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 99}))
    done = export(source, "--to", "vllm", "--output-dir", tmp_path / "out", "--target", other)
    assert done.exit_code == 1
    assert "hidden size" in done.output
    assert "99" in done.output


def test_drafter_whose_head_is_not_the_targets_is_refused(run: Path, tmp_path: Path) -> None:
    source = checkpoint(run, "eagle3")
    drafter = new_drafter("eagle3")
    drafter.lm_head.weight.data[5] += 1
    save_drafter(drafter, run / "step_7")
    done = export(source, "--to", "vllm", "--output-dir", tmp_path / "out")
    assert done.exit_code == 1
    assert "lm_head differ from the target's" in done.output


def test_run_directory_names_its_checkpoints(run: Path, tmp_path: Path) -> None:
    checkpoint(run, "eagle3")
    done = export(run, "--to", "vllm", "--output-dir", tmp_path / "out")
    assert done.exit_code == 2
    assert "step_best" in done.output
    assert "step_7" in done.output


def test_folder_without_a_drafter_is_refused(tmp_path: Path) -> None:
    done = export(tmp_path, "--to", "vllm", "--output-dir", tmp_path / "out")
    assert done.exit_code == 2
    assert "is no checkpoint" in done.output


def test_drafter_from_elsewhere_needs_its_target_named(tmp_path: Path) -> None:
    save_drafter(new_drafter("eagle3"), tmp_path / "drafter")
    done = export(tmp_path / "drafter", "--to", "vllm", "--output-dir", tmp_path / "out")
    assert done.exit_code == 2
    assert "--target" in done.output
    named = export(tmp_path / "drafter", "--to", "vllm", "--output-dir", tmp_path / "out", "--target", TARGET)
    assert named.exit_code == 0, named.output
    assert "is not known" in named.output, "nobody says in which mode it was trained"


def test_target_that_is_gone_is_named_with_the_way_out(run: Path, tmp_path: Path) -> None:
    done = export(
        checkpoint(run, "eagle3"), "--to", "vllm", "--output-dir", tmp_path / "out", "--target", "./gone/away"
    )
    assert done.exit_code == 1
    assert "--target FOLDER" in done.output


@pytest.mark.parametrize(
    ("trained", "option", "warned"),
    [(False, "--thinking", True), (True, "--no-thinking", True), (False, "--no-thinking", False), (False, None, False)],
)
def test_other_thinking_mode_is_warned_of(
    run: Path, tmp_path: Path, trained: bool, option: str | None, warned: bool
) -> None:
    source = checkpoint(run, "eagle3", enable_thinking=trained)
    done = export(source, "--to", "native", "--output-dir", tmp_path / "out", *([option] if option else []))
    assert done.exit_code == 0, done.output
    assert ("will be served in the other one" in done.output) == warned
    assert ("will be served in the other one" in (tmp_path / "out" / "README.md").read_text()) == warned


def test_template_with_modes_says_which_one_to_serve(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "thinker"
    shutil.copytree(TARGET, target)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>"
    (target / "chat_template.jinja").write_text(template + "{% if not enable_thinking %}<no>{% endif %}{% endif %}")
    source = checkpoint(run, "eagle3")
    done = export(source, "--to", "native", "--output-dir", tmp_path / "out", "--target", target)
    assert done.exit_code == 0, done.output
    assert 'chat_template_kwargs {"enable_thinking": false}' in done.output
