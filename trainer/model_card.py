"""The README.md of an export: what the drafter is, how to serve it, what it measured, where it comes from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from drafters.config import FOREIGN_SETTINGS, DrafterConfig
from services.contracts import ALL_DOMAINS
from trainer.export_source import UNTRAINED, ExportSource, Measured, MeasuredDomain, SourceTarget

if TYPE_CHECKING:
    from evaluation.self_check import SelfCheck

PLATFORMS = {"sglang": "SGLang", "vllm": "vLLM (speculators format)", "native": "the reference toolkit's format"}
SGLANG_ALGORITHMS = {"eagle3": "EAGLE3", "dflash": "DFLASH", "dspark": "DSPARK"}


def model_card(
    *,
    kind: str,
    source: ExportSource,
    target: SourceTarget | None,
    settings: DrafterConfig,
    checked: SelfCheck,
    warnings: Sequence[str],
) -> str:
    """The card's text.

    Args:
        kind: ``sglang``, ``vllm`` or ``native``.
        source: Where the drafter comes from.
        target: What it drafts for, as far as that is known.
        settings: Of the exported drafter.
        checked: What the self-check found.
        warnings: What its reader should know.
    """
    served = f"`{target.public_name}`" if target else "its target"
    parts = [
        _front_matter(settings, target),
        f"# {settings.algorithm} drafter for {served}",
        f"Drafts up to {settings.num_drafts} tokens a round for speculative decoding with {served}, whose output stays "
        f"what it is. In {PLATFORMS[kind]}.",
        _serving(kind, settings, target),
        _mode(source),
        *(["## Mind", "\n".join(f"- {warning}" for warning in warnings)] if warnings else []),
        _figures(source),
        _facts(source, target, settings, checked),
        _recipe(source),
        "## Licence",
        f"What these files have of embedding and head is copied from {served}, and the rest was trained on its hidden "
        "states: its licence says what may be done with them.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(settings: DrafterConfig, target: SourceTarget | None) -> str:
    values: dict[str, Any] = {"tags": ["speculative-decoding", settings.algorithm]}
    if target and not target.is_folder:
        values["base_model"] = target.name
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _serving(kind: str, settings: DrafterConfig, target: SourceTarget | None) -> str:
    name, drafts = shlex.quote(target.public_name) if target else "TARGET", settings.num_drafts
    if kind == "native":
        return (
            "## Use\n\n```python\nfrom drafters import load_drafter\nfrom evaluation import speculative_generate\n\n"
            'drafter = load_drafter("this-folder")\nout = speculative_generate(target_model, drafter, input_ids, '
            "max_new_tokens=128)\n```"
        )
    if kind == "vllm":
        chosen = {"model": "this-folder", "method": settings.algorithm, "num_speculative_tokens": drafts}
        return f"## Serve\n\n```console\n$ vllm serve {name} --speculative-config '{json.dumps(chosen)}'\n```"
    lines = [
        f"$ python -m sglang.launch_server --model-path {name} \\",
        f"    --speculative-algorithm {SGLANG_ALGORITHMS[settings.algorithm]} \\",
        "    --speculative-draft-model-path this-folder",
    ]
    if settings.algorithm == "eagle3":
        lines[-1] += " \\"
        lines.append(
            f"    --speculative-num-steps {drafts} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {drafts + 1}"
        )
    return "## Serve\n\n```console\n" + "\n".join(lines) + "\n```"


def _mode(source: ExportSource) -> str:
    if source.recipe is None:
        return ""
    on = source.recipe.prompts.enable_thinking
    mode = "thinking" if on else "non-thinking"
    return (
        f"Trained on chats rendered in **{mode} mode** (`enable_thinking={on}`). In the other mode it accepts fewer "
        "tokens."
    )


def _figures(source: ExportSource) -> str:
    if not source.measured:
        return "## Accepted length\n\nNot measured by the run that trained it."
    rows = [
        "| drafter | domain | τ (95 % interval) | prompts | temperature | accepted at position 1, 2, … |",
        "|---|---|---|---|---|---|",
    ]
    for report in source.measured:
        what = "untrained" if report.label == UNTRAINED else report.label
        rows.append(_figures_row(what, "all", report, report.temperature))
        if len(report.domains) > 1:
            rows += [
                _figures_row(what, "other" if name == ALL_DOMAINS else name, found, report.temperature)
                for name, found in report.domains.items()
            ]
    return (
        "## Accepted length\n\nτ: tokens a forward pass of the target, bonus token included; decoded on held-out "
        "prompts.\n\n" + "\n".join(rows)
    )


def _figures_row(what: str, domain: str, found: Measured | MeasuredDomain, temperature: float) -> str:
    accepted = "–"
    if found.accepted_length is not None and found.interval is not None:
        low, high = found.interval
        accepted = f"{found.accepted_length:.2f} ({low:.2f} – {high:.2f})"
    rates = ", ".join(f"{rate:.2f}" for rate in found.accept_rate)
    return f"| {what} | {domain} | {accepted} | {found.num_samples} | {temperature:g} | {rates} |"


def _facts(source: ExportSource, target: SourceTarget | None, settings: DrafterConfig, checked: SelfCheck) -> str:
    provenance = source.provenance
    packages: dict[str, str] = provenance.get("packages") or {}
    rows = {
        "target": target.public_name if target else None,
        "target's fingerprint (config and weights' index)": target.shape.fingerprint if target else None,
        "captured layers": ", ".join(map(str, settings.target_layer_ids or ())),
        "draft vocabulary": f"{settings.draft_vocab_size:,} tokens" if settings.draft_vocab_size else "the target's",
        "checkpoint": source.name,
        "code": provenance.get("git_sha"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()) or None,
        "self-check": f"{checked.num_logits:,} logits and {checked.num_drafts} greedy drafts equal the trained "
        f"drafter's (largest difference {checked.max_logit_difference:.1g})",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "## Provenance\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _recipe(source: ExportSource) -> str:
    if source.recipe is None:
        return ""
    shown = source.recipe.model_dump(mode="json", include={"drafter", "prompts", "trainer"})
    for name in ("source", "heldout"):
        if shown["prompts"].get(name):
            shown["prompts"][name] = Path(shown["prompts"][name]).name
    foreign = FOREIGN_SETTINGS[source.recipe.drafter.algorithm]
    for section in ("drafter", "trainer"):
        shown[section] = {
            name: value
            for name, value in shown[section].items()
            if value not in (None, {}, []) and not (section == "drafter" and name in foreign)
        }
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"
