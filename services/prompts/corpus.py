"""The conversations of a run: planned once, encoded when they are due."""

from __future__ import annotations

from pathlib import Path

from services.answers import AnswerBook
from services.contracts import CaptureJob, HeldoutPrompt
from services.errors import CheckpointError, PromptError
from services.models import find_model
from services.prompts.chat import ChatEncoder
from services.prompts.config import PromptsConfig
from services.prompts.intake import Intake, OwnAnswers, first_turns
from services.prompts.ledger import Ledger, PlanHeader
from services.prompts.plan import Plan
from services.prompts.records import CoordinatorSettings
from services.prompts.sources import STDLIB, Conversations, load_conversations
from services.stop_tokens import find_stop_token_ids


class Corpus:
    """What a run trains on.

    Attributes:
        plan: Which conversation is captured when.
        num_conversations: In the plan.
        rejected: Lines of the prompts file that are none.
    """

    def __init__(self, config: PromptsConfig, model: str, settings: CoordinatorSettings) -> None:
        """Load the prompts.

        Args:
            config: Which conversations.
            model: Folder or hub name of the target, for its tokenizer and chat template.
            settings: How the prompts are used.

        Raises:
            PromptError: The prompts or the tokenizer cannot be read.
        """
        if config.heldout not in (None, STDLIB) and config.heldout == config.source:
            raise PromptError(
                f"prompts.heldout and prompts.source are the same file {config.source!r}: a drafter must be measured "
                "on prompts it was not trained on. Split the file."
            )
        self._config = config
        conversations = load_conversations(config.source, split="train", strict=config.strict)
        self.rejected = conversations.rejected
        self.num_conversations = len(conversations.items)
        self._encoder = ChatEncoder(
            find_model(model, weights=False),
            system_prompt=config.system_prompt,
            enable_thinking=config.enable_thinking,
        )
        own_answers = None
        if config.answers == "target":
            stop_token_ids = find_stop_token_ids(find_model(model, weights=False))
            own_answers = OwnAnswers(AnswerBook(Path(settings.answers)), stop_token_ids)
        self._intake = Intake(conversations, self._encoder, config, settings.last_rows, own_answers)
        self.plan = Plan(self.num_conversations, config.epochs, settings.reuse, config.seed)
        self._header = _header(self.plan, conversations)
        self._heldout: Conversations | None = None

    def job(self, capture: int, attempt: int, ks: tuple[int, ...]) -> CaptureJob:
        """Encode a capture's conversation.

        Args:
            capture: Its number in the plan.
            attempt: Of the capture.
            ks: The uses that it shall feed.

        Raises:
            UnusablePromptError: It cannot be trained on; the detail names its file and line.
            PromptError: The prompts file was changed since the run began.
        """
        prompt, epoch = self.plan.capture(capture)
        reuse = self.plan.reuse
        return self._intake.job(
            capture=capture,
            attempt=attempt,
            prompt=prompt,
            epoch=epoch,
            reuse=reuse,
            ks=None if len(ks) == reuse else ks,
        )

    def heldout_prompts(self, count: int) -> list[HeldoutPrompt]:
        """Held-out prompts in a seeded order, each with the generation prompt; none without a source.

        Raises:
            PromptError: The held-out source cannot be read or has no usable prompt.
        """
        config = self._config
        if config.heldout is None or count == 0:
            return []
        if self._heldout is None:
            self._heldout = load_conversations(config.heldout, split="heldout", strict=config.strict)
        return first_turns(self._heldout, self._encoder, count=count, seed=config.seed, max_length=config.max_length)

    def open_ledger(self, path: str | None) -> Ledger:
        """The ledger of a checkpoint of this run; None begins one.

        Raises:
            CheckpointError: It is broken, or of another plan.
        """
        if path is None:
            return Ledger(self._header)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the ledger {path}: {error}") from error
        return Ledger.resume(text, self._header, origin=path)


def _header(plan: Plan, conversations: Conversations) -> PlanHeader:
    return PlanHeader(
        num_prompts=plan.num_prompts,
        epochs=plan.epochs,
        reuse=plan.reuse,
        seed=plan.seed,
        digest=conversations.digest,
    )
