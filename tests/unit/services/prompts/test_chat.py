from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.errors import PromptError
from services.prompts.chat import ChatEncoder, UnusablePromptError, mask_of_spans
from services.prompts.sources import Conversation


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogue(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return [turn(roles[number % 2], content) for number, content in enumerate(contents)]


def encoder(folder: Path, *, system_prompt: str | None = None, enable_thinking: bool = False) -> ChatEncoder:
    return ChatEncoder(folder, system_prompt=system_prompt, enable_thinking=enable_thinking)


def supervised(folder: Path, messages: Conversation, **options: bool) -> str:
    """The text of the tokens that count in the loss; a gap between spans shows as |."""
    encoded = encoder(folder, **options).encode(messages)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces, previous = [], 0
    for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if flag:
            pieces.append(tokenizer.decode([token], skip_special_tokens=False))
        elif previous:
            pieces.append("|")
        previous = flag
    return "".join(pieces)


def rendered(folder: Path, ids: list[int] | tuple[int, ...]) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def test_mask_covers_content_end_of_turn_and_newline_of_every_answer(make_folder):
    folder = make_folder()
    assert supervised(folder, dialogue("a", "yes", "b", "no")) == "yes<|im_end|>\n|no<|im_end|>\n"


def test_mask_is_exact_token_by_token(make_folder):
    encoded = encoder(make_folder()).encode(dialogue("u", "ab"))
    # <|im_start|> u s e r \n u <|im_end|> \n | <|im_start|> a s s i s t a n t \n | a b <|im_end|> \n
    assert encoded.loss_mask == (0,) * 9 + (0,) * 11 + (1, 1, 1, 1)
    assert encoded.num_loss_tokens == 4


def test_mask_leaves_out_what_follows_the_last_answer(make_folder):
    messages = [*dialogue("a", "yes"), turn("user", "more")]
    assert supervised(make_folder(), messages) == "yes<|im_end|>\n|"


def test_system_prompt_is_added_for_training_only_and_only_where_there_is_none(make_folder):
    folder = make_folder()
    chat = encoder(folder, system_prompt="Be brief.")
    own = [turn("system", "Own."), *dialogue("a", "yes")]
    assert rendered(folder, chat.encode(dialogue("a", "yes")).input_ids).startswith("<|im_start|>system\nBe brief.<|im")
    assert "Be brief." not in rendered(folder, chat.encode(own).input_ids)
    prompt = chat.encode_prompt([turn("user", "a")])
    assert rendered(folder, prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_multibyte_characters_count_as_a_whole(make_folder):
    encoded = encoder(make_folder()).encode(dialogue("ä", "né€"))
    assert encoded.num_loss_tokens == 1 + 2 + 3 + 2  # n, é, €, end of turn and newline


def test_a_token_across_the_header_belongs_to_the_header(make_folder):
    # The answer begins with a newline, which merges with the header's into one token that begins before the answer.
    folder = make_folder(merges=[("Ċ", "Ċ")])
    assert supervised(folder, dialogue("a", "\nyes")) == "yes<|im_end|>\n"


def test_qwen3_without_thinking_masks_the_empty_think_block(make_folder, qwen3_like):
    folder = make_folder(qwen3_like)
    messages = dialogue("a", "yes")
    text = rendered(folder, encoder(folder).encode(messages).input_ids)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>\n")
    assert supervised(folder, messages) == "yes<|im_end|>\n"


def test_qwen3_with_thinking_supervises_the_thoughts(make_folder, qwen3_like):
    messages = dialogue("a", "<think>\nwhy\n</think>\n\nyes")
    answer = "<think>\nwhy\n</think>\n\nyes<|im_end|>\n"
    assert supervised(make_folder(qwen3_like), messages, enable_thinking=True) == answer


@pytest.mark.parametrize("enable_thinking", [False, True])
def test_qwen3_earlier_turns_are_supervised_although_they_lose_their_think_block(
    make_folder, qwen3_like, enable_thinking
):
    messages = [turn("system", "s"), *dialogue("a", "<b>yes", "c", "no", "d", "maybe")]
    last = "<think>\n\n</think>\n\nmaybe" if enable_thinking else "maybe"
    expected = f"<b>yes<|im_end|>\n|no<|im_end|>\n|{last}<|im_end|>\n"
    assert supervised(make_folder(qwen3_like), messages, enable_thinking=enable_thinking) == expected


def test_thoughts_are_refused_where_the_generation_prompt_rules_them_out(make_folder, qwen3_like):
    chat = encoder(make_folder(qwen3_like), enable_thinking=False)
    with pytest.raises(UnusablePromptError, match=r"turn 1 .*enable_thinking is false") as caught:
        chat.encode(dialogue("a", "<think>\nwhy\n</think>\n\nyes"))
    assert caught.value.reason == "inconsistent rendering"


def test_trimming_templates_are_followed(make_folder):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert supervised(make_folder(template), dialogue("a", "  yes ", "b", "no")) == "yes</s>|no</s>"


def test_templates_that_end_a_turn_differently_later_are_refused(make_folder):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ '<last>' if loop.last else '<more>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(UnusablePromptError, match=r"turn 1 .*ends differently"):
        encoder(make_folder(template)).encode(dialogue("a", "yes", "b", "no"))


def test_templates_whose_header_differs_from_the_generation_prompt_are_refused(make_folder):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    with pytest.raises(UnusablePromptError, match="beginning of the generation prompt"):
        encoder(make_folder(template)).encode(dialogue("a", "yes"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([turn("user", "a")], "no assistant turn"),
        ([turn("user", "a"), turn("robot", "b")], "unknown role"),
        ([turn("user", " \n"), turn("assistant", "b")], "empty content"),
    ],
)
def test_unusable_conversations_are_refused_with_a_reason(make_folder, messages, reason):
    with pytest.raises(UnusablePromptError) as caught:
        encoder(make_folder()).encode(messages)
    assert caught.value.reason == reason


def test_what_the_template_raises_is_the_reason(make_folder):
    folder = make_folder("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    with pytest.raises(UnusablePromptError, match=r"no system role .*system, user, assistant.*system_prompt"):
        encoder(folder, system_prompt="s").encode(dialogue("a", "b"))


def test_template_environment_is_the_one_authors_write_for(make_folder):
    folder = make_folder(
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}{{ {'é': 1} | tojson }}{{ eos_token }}"
    )
    assert encoder(folder).render([turn("system", "s"), turn("user", "a")]) == 'a{"é": 1}<|im_end|>'


def test_template_of_the_tokenizer_config_is_used_without_a_template_file(make_folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}default"}]
    folder = make_folder(
        None, config={"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}, "chat_template": named}
    )
    assert encoder(folder).render([turn("user", "a")]) == "<s>default"


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "cannot read .*tokenizer_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read tokenizer .*tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "does not compile"),
    ],
)
def test_broken_model_folder_is_an_error_that_names_the_file(make_folder, breakage, message):
    folder = make_folder()
    breakage(folder)
    with pytest.raises(PromptError, match=message):
        encoder(folder)


def test_mask_of_spans_counts_tokens_that_begin_within():
    # Tokens begin at 0, 2, 2, 5, 9; the span [2, 5) holds two of them, [8, 10) one.
    assert mask_of_spans([0, 2, 2, 5, 9], [(2, 5), (8, 10)]) == (0, 1, 1, 0, 1)
    assert mask_of_spans([0, 2, 2, 5, 9], [(3, 5)]) == (0, 0, 0, 0, 0)


def test_unusable_prompt_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnusablePromptError("too long", "9 tokens")))
    assert (error.reason, error.detail, str(error)) == ("too long", "9 tokens", "too long: 9 tokens")


@pytest.mark.parametrize(
    ("roles", "kept"),
    [("ua", 1), ("u", 1), ("uaua", 3), ("uau", 3), ("uu", 1), ("uauu", 3), ("sua", 2), ("uat", 1)],
)
def test_question_ends_where_the_target_shall_answer(make_folder, roles, kept):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[role], "content": str(number)} for number, role in enumerate(roles)]
    encoder = ChatEncoder(make_folder(), system_prompt=None, enable_thinking=False)
    assert encoder.encode_question(messages) == encoder.encode_prompt(messages[:kept])


def test_question_has_the_training_systems_prompt(make_folder):
    encoder = ChatEncoder(make_folder(), system_prompt="Be brief.", enable_thinking=False)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "u"}
    assert encoder.encode_question([user]) == encoder.encode_prompt([system, user])


def test_conversation_without_a_user_turn_has_no_question(make_folder):
    encoder = ChatEncoder(make_folder(), system_prompt=None, enable_thinking=False)
    with pytest.raises(UnusablePromptError, match="no user turn"):
        encoder.encode_question([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize("content", ["ab", "<|channel>thought\n<channel|>ab"])
def test_gemma4_answer_without_a_thought_is_given_an_empty_one_as_context(make_folder, content):
    folder = make_folder()
    plain = ChatEncoder(folder, system_prompt=None, enable_thinking=False)
    (folder / "config.json").write_text('{"model_type": "gemma4_text"}')
    gemma = ChatEncoder(folder, system_prompt=None, enable_thinking=False)
    thinking = ChatEncoder(folder, system_prompt=None, enable_thinking=True)
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": content}]
    full = [chat[0], {"role": "assistant", "content": "<|channel>thought\n<channel|>ab"}]
    encoded, reference = gemma.encode(chat), plain.encode(full)
    assert encoded.input_ids == reference.input_ids
    assert encoded.num_loss_tokens == plain.encode([chat[0], {"role": "assistant", "content": "ab"}]).num_loss_tokens
    assert encoded.num_loss_tokens < reference.num_loss_tokens
    assert thinking.encode(chat) == plain.encode(chat)
