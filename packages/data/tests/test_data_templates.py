"""Masks: golden texts for every template, transformers' own mask beside ours, and properties of any conversation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.bridge.data.instruction.encoding import Encoded, encode
from megatron.bridge.data.instruction.formats import dataset_format
from megatron.bridge.data.instruction.messages import ASSISTANT, BadRow, Conversation, Message
from megatron.bridge.data.instruction.rendering import LOSSES, Renderer
from megatron.bridge.data.instruction.templates import TEMPLATES, PromptTemplate, prompt_template
from megatron.bridge.data.instruction.truncation import fit, without_oldest_exchange
from megatron.bridge.errors import BridgeError

# As published with the models, without marks.
PUBLISHED = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = "
    "'<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
    "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
# An earlier answer is written otherwise once a later one follows, as templates of reasoning models do.
FORGETFUL = (
    "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '!' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]]},
    "dolly": {"instruction": "Add.", "context": "", "response": "3"},
    "oasst": {
        "prompt": {
            "role": "prompter",
            "text": "Hi",
            "replies": [
                {
                    "role": "assistant",
                    "text": "Ho",
                    "replies": [
                        {"role": "prompter", "text": "Add.", "replies": [{"role": "assistant", "text": "3"}]},
                    ],
                }
            ],
        }
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Ho"},
            {"from": "human", "value": "Add."},
            {"from": "gpt", "value": "3"},
        ]
    },
    "chat": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "3"},
        ]
    },
    "prompt_completion": {"prompt": "1 + 2 =", "completion": "3"},
}
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
# (template, format) -> the whole text, answers between « and ».
GOLDEN = {
    ("alpaca", "alpaca"): WITH_INPUT + f"### Instruction:\nHi\n\n### Response:\n«Ho{END}»\n\n"
    f"### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n«3{END}»",
    ("alpaca", "dolly"): PREAMBLE + f"### Instruction:\nAdd.\n\n### Response:\n«3{END}»",
    ("alpaca", "oasst"): PREAMBLE
    + f"### Instruction:\nHi\n\n### Response:\n«Ho{END}»\n\n### Instruction:\nAdd.\n\n### Response:\n«3{END}»",
    ("alpaca", "sharegpt"): "Be brief.\n\n"
    f"### Instruction:\nHi\n\n### Response:\n«Ho{END}»\n\n### Instruction:\nAdd.\n\n### Response:\n«3{END}»",
    ("alpaca", "chat"): f"Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n«3{END}»",
    ("alpaca", "prompt_completion"): PREAMBLE + f"### Instruction:\n1 + 2 =\n\n### Response:\n«3{END}»",
    ("chatml", "alpaca"): "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Ho<|im_end|>»\n"
    "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n",
    ("chatml", "dolly"): "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n",
    ("chatml", "oasst"): "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Ho<|im_end|>»\n"
    "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n",
    ("chatml", "sharegpt"): "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Ho<|im_end|>»\n"
    "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n",
    ("chatml", "chat"): "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n"
    "<|im_start|>assistant\n«3<|im_end|>»\n",
    ("chatml", "prompt_completion"): "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n",
    ("llama2", "alpaca"): f"{BEGIN}[INST] Hi [/INST]« Ho {END}»{BEGIN}[INST] Add.\n\n1 2 [/INST]« 3 {END}»",
    ("llama2", "dolly"): f"{BEGIN}[INST] Add. [/INST]« 3 {END}»",
    ("llama2", "oasst"): f"{BEGIN}[INST] Hi [/INST]« Ho {END}»{BEGIN}[INST] Add. [/INST]« 3 {END}»",
    ("llama2", "sharegpt"): f"{BEGIN}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]« Ho {END}»"
    f"{BEGIN}[INST] Add. [/INST]« 3 {END}»",
    ("llama2", "chat"): f"{BEGIN}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd. [/INST]« 3 {END}»",
    ("llama2", "prompt_completion"): f"{BEGIN}[INST] 1 + 2 = [/INST]« 3 {END}»",
    ("plain", "alpaca"): f"Hi«Ho{END}»Add.\n\n1 2«3{END}»",
    ("plain", "dolly"): f"Add.«3{END}»",
    ("plain", "oasst"): f"Hi«Ho{END}»Add.«3{END}»",
    ("plain", "sharegpt"): f"Be brief.Hi«Ho{END}»Add.«3{END}»",
    ("plain", "chat"): f"Be brief.Add.«3{END}»",
    ("plain", "prompt_completion"): f"1 + 2 =«3{END}»",
}


def _llama3(*turns: tuple[str, str]) -> str:
    written = BEGIN
    for role, content in turns:
        answer = (f"«{content}<|eot_id|>»") if role == "assistant" else f"{content}<|eot_id|>"
        written += f"<|start_header_id|>{role}<|end_header_id|>\n\n{answer}"
    return written


_HI, _ADD = [("user", "Hi"), ("assistant", "Ho")], [("user", "Add."), ("assistant", "3")]
GOLDEN |= {
    ("llama3", "alpaca"): _llama3(*_HI, ("user", "Add.\n\n1 2"), ("assistant", "3")),
    ("llama3", "dolly"): _llama3(*_ADD),
    ("llama3", "oasst"): _llama3(*_HI, *_ADD),
    ("llama3", "sharegpt"): _llama3(("system", "Be brief."), *_HI, *_ADD),
    ("llama3", "chat"): _llama3(("system", "Be brief."), *_ADD),
    ("llama3", "prompt_completion"): _llama3(("user", "1 + 2 ="), ("assistant", "3")),
}


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_folder)


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    """The tokenizer with a chat template of its own."""

    def make(jinja: str) -> Any:
        own = copy.copy(tokenizer)
        own.chat_template = jinja
        return own

    return make


def conversation_of(name: str) -> Conversation:
    (found,) = dataset_format(name).conversations([ROWS[name]])
    return found


def encoded(tokenizer: Any, template: PromptTemplate, loss: str, conversation: Conversation) -> Encoded:
    (found,) = encode(tokenizer, [Renderer(template, tokenizer, loss)(conversation)])
    assert isinstance(found, Encoded), found
    return found


def trained_text(tokenizer: Any, found: Encoded) -> str:
    return str(tokenizer.decode(found.ids[found.trained]))


def expected(golden: str, loss: str) -> str:
    """The trained part of a golden text."""
    answers = [piece.split("»")[0] for piece in golden.split("«")[1:]]
    bare = golden.replace("«", "").replace("»", "")
    from_first = golden[golden.index("«") :].replace("«", "").replace("»", "").rstrip()
    return {"assistant": "".join(answers), "last_turn": answers[-1], "completion": from_first, "all": bare}[loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("template", "form"), GOLDEN)
def test_golden_texts_and_masks(tokenizer: Any, template: str, form: str, loss: str) -> None:
    golden = GOLDEN[template, form]
    found = encoded(tokenizer, prompt_template(template, tokenizer), loss, conversation_of(form))
    assert tokenizer.decode(found.ids) == golden.replace("«", "").replace("»", "")
    assert trained_text(tokenizer, found) == expected(golden, loss)


def test_every_format_meets_every_template() -> None:
    assert {template for template, _ in GOLDEN} == set(TEMPLATES)
    assert len(GOLDEN) == len(list(TEMPLATES)) * len(ROWS)


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_transformers_gives_the_same_tokens_and_mask(tokenizer: Any, name: str, form: str) -> None:
    template, conversation = prompt_template(name, tokenizer), conversation_of(form)
    found = encoded(tokenizer, template, "assistant", conversation)
    theirs = tokenizer.apply_chat_template(
        [message.as_dict() for message in conversation.messages],
        chat_template=template.jinja,
        begin="",
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.trained.tolist() == [bool(each) for each in theirs["assistant_masks"]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_unmarked_templates_as_published_give_what_ours_do(with_template: Any, name: str, form: str, loss: str) -> None:
    """The tokenizer's own template, its answers found by rendering prefixes, beside our marked one."""
    tokenizer, conversation = with_template(PUBLISHED[name]), conversation_of(form)
    own, ours = prompt_template("chat_template", tokenizer), prompt_template(name, tokenizer)
    assert not own.marks_answers
    assert ours.marks_answers
    theirs, mine = (encoded(tokenizer, template, loss, conversation) for template in (own, ours))
    assert theirs.ids.tolist() == mine.ids.tolist()
    assert theirs.trained.tolist() == mine.trained.tolist()


def test_a_template_that_rewrites_earlier_answers_is_refused_but_for_the_last(with_template: Any) -> None:
    tokenizer, conversation = with_template(FORGETFUL), conversation_of("alpaca")
    own = prompt_template("chat_template", tokenizer)
    with pytest.raises(BadRow, match=r"cannot be proven; put \{% generation %\}"):
        Renderer(own, tokenizer, "assistant")(conversation)
    found = encoded(tokenizer, own, "last_turn", conversation)
    assert trained_text(tokenizer, found) == f"3{END}!{END}"


@pytest.mark.parametrize(
    ("jinja", "trained"),
    [
        # The end token stands behind the mark: it is trained all the same.
        ("{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}", f"Ho{END}3{END}"),
        # White space within the mark, behind the end token: never generated.
        ("{% generation %}{{ message.content + eos_token + '\n' }}{% endgeneration %}", f"Ho{END}3{END}"),
    ],
)
def test_the_end_of_a_turn_is_trained(with_template: Any, jinja: str, trained: str) -> None:
    tokenizer = with_template(
        "{% for message in messages %}{% if message.role == 'assistant' %}" + jinja + "{% else %}{{ message.content }}"
        "{% endif %}{% endfor %}"
    )
    found = encoded(tokenizer, prompt_template("chat_template", tokenizer), "assistant", conversation_of("alpaca"))
    assert trained_text(tokenizer, found) == trained


def test_a_template_given_by_the_user(tokenizer: Any, tmp_path: Path) -> None:
    jinja = "Q: {{ messages[0].content }}\nA: {% generation %}{{ messages[1].content + eos_token }}{% endgeneration %}"
    (tmp_path / "mine.jinja").write_text(jinja)
    for given_as in (jinja, str(tmp_path / "mine.jinja")):
        template = prompt_template("custom", tokenizer, given_as)
        found = encoded(tokenizer, template, "assistant", conversation_of("dolly"))
        assert tokenizer.decode(found.ids) == f"Q: Add.\nA: 3{END}"
        assert trained_text(tokenizer, found) == f"3{END}"


def test_templates_that_do_not_fit_are_refused(tokenizer: Any, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tokenizer_folder)
    for arguments, why in (
        (("chatlm", tokenizer), "did you mean 'chatml'"),
        (("chat_template", tokenizer), "has no chat template; choose a dataset.prompt_template: alpaca, chatml"),
        (("chatml", bare), r"writes <\|im_start\|>, <\|im_end\|>, which the tokenizer"),
        (("custom", tokenizer), "custom_template is the template of"),
        (("alpaca", tokenizer, "x"), "custom_template is the template of"),
        (("custom", tokenizer, "absent.jinja"), "neither a Jinja template nor a file"),
    ):
        with pytest.raises(BridgeError, match=why):
            prompt_template(*arguments)
    with pytest.raises(BridgeError, match="did you mean 'assistant'"):
        Renderer(prompt_template("alpaca", bare), bare, "assistent")


def refused(tokenizer: Any, template: PromptTemplate, why: str, *messages: Message, tools: Any = None) -> None:
    with pytest.raises(BadRow, match=why):
        Renderer(template, tokenizer, "assistant")(Conversation(messages, tools))


def test_conversations_that_a_template_cannot_write_are_refused(tokenizer: Any) -> None:
    chatml = prompt_template("chatml", tokenizer)
    asked, answer = Message("user", "a"), Message("assistant", "b")
    refused(tokenizer, chatml, "no place for tools", asked, answer, tools=[{}])
    refused(tokenizer, chatml, "no place for a tool message", asked, Message("tool", "x"), answer)
    refused(tokenizer, chatml, "no place for a tool call", asked, Message("assistant", "", {"tool_calls": [1]}))
    refused(tokenizer, chatml, r"contains '<\|im_end\|>', a special token", Message("user", "a<|im_end|>"), answer)
    no_end = prompt_template("custom", tokenizer, "{{ messages[0].content }}{% generation %}b{% endgeneration %}")
    refused(tokenizer, no_end, "no end-of-turn token behind an answer", asked, answer)
    one_mark = prompt_template("custom", tokenizer, "{% generation %}{{ eos_token }}{% endgeneration %}")
    refused(tokenizer, one_mark, "marks 1 answers, and the conversation has 2", asked, answer, asked, answer)
    broken = prompt_template("custom", tokenizer, "{{ raise_exception('not so') }}")
    refused(tokenizer, broken, "refuses the conversation: not so", asked, answer)
    with pytest.raises(BadRow, match="the last answer has weight 0"):
        Renderer(chatml, tokenizer, "last_turn")(
            Conversation([asked, answer, asked, Message("assistant", "b", trained=False)])
        )


def test_a_token_over_the_edge_of_an_answer_is_cut_there(tokenizer: Any) -> None:
    """ " 3" is one token; at inference the prompt with its blank is tokenized before there is an answer."""
    prompt, answer = "1 + 2 = ", "3"
    apart = [tokenizer(text)["input_ids"] for text in (prompt, answer + END)]
    assert tokenizer(prompt + answer + END)["input_ids"] != apart[0] + apart[1]
    conversation = Conversation([Message("user", prompt), Message("assistant", answer)])
    found = encoded(tokenizer, prompt_template("plain", tokenizer), "assistant", conversation)
    assert found.ids.tolist() == apart[0] + apart[1]
    assert found.trained.tolist() == [False] * len(apart[0]) + [True] * len(apart[1])


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())


@st.composite
def conversations(draw: Any) -> Conversation:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXT)), Message("assistant", draw(TEXT), trained=draw(st.booleans()))]
    if not any(message.trained for message in messages if message.role == ASSISTANT):
        messages[-1] = Message("assistant", messages[-1].content)
    return Conversation(messages)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations(), name=st.sampled_from(["alpaca", "chatml", "llama2", "llama3", "plain"]))
def test_trained_is_what_the_assistant_said_and_all_of_it(
    tokenizer: Any, conversation: Conversation, name: str
) -> None:
    template = prompt_template(name, tokenizer)
    found = encoded(tokenizer, template, "assistant", conversation)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, END)
    said = [message.content for message in conversation.messages if message.role == ASSISTANT and message.trained]
    stripped = [text.strip() if name.startswith("llama") else text for text in said]
    spaced = [f" {text} " if name == "llama2" else text for text in stripped]
    assert trained_text(tokenizer, found) == "".join(text + end for text in spaced)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations(), longest=st.integers(4, 60), policy=st.sampled_from(["right", "turns", "drop"]))
def test_labels_are_lost_only_where_truncation_says_so(
    tokenizer: Any, conversation: Conversation, longest: int, policy: str
) -> None:
    template = prompt_template("llama3", tokenizer)

    def again(shorter: Conversation) -> Encoded:
        return encoded(tokenizer, template, "assistant", shorter)

    whole = again(conversation)
    try:
        kept = fit(conversation, whole, longest, policy, again)
    except BadRow:
        assert len(whole.ids) > longest or not whole.trained[1:].any()
        return
    if len(whole.ids) <= longest:
        assert kept is whole
    elif policy == "drop":
        assert kept is None
    else:
        assert kept is not None
        assert len(kept.ids) <= longest
        assert kept.trained[1:].any()
    if kept is not None and policy == "right":
        assert np.array_equal(kept.ids, whole.ids[: len(kept.ids)])
        assert np.array_equal(kept.trained, whole.trained[: len(kept.ids)])
    if kept is not None and policy == "turns" and kept is not whole:
        rest = conversation
        while len(again(rest).ids) > longest:
            shorter = without_oldest_exchange(rest)
            assert shorter is not None
            rest = shorter
        assert np.array_equal(kept.ids, again(rest).ids)
        assert rest.messages[-2:] == conversation.messages[-2:]
