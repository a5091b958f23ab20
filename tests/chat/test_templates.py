"""Chat templates of model families: allowed roles, the switch for thinking, continuing an answer.

The templates are short ones written for the tests that behave like those of the families.
"""

import json

import pytest
import tokenizers
from support.fake_engine import EOS, FakeEngine
from support.threads import watched_threads
from tokenizers import decoders, models, pre_tokenizers

from specchat.chat.answer import Turn
from specchat.chat.session import ChatSession
from specchat.errors import AllocationError, UsageError
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{{ m.content.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}A: {{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}{% endif %}\n{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if thinking %}Think. {% endif %}{% if add_generation_prompt %}A: {% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' and m.thinking and loop.last %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "granite": GRANITE,
    "harmony": HARMONY,
}
CHAT = [Message("user", "Hi"), Message("assistant", "Hello there", "Be nice."), Message("user", "Bye")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tokenizer(folder):
    def load(name):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": TEMPLATES.get(name, name)})
        )
        return load_tokenizer(folder)

    return load


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_chat_ends_where_the_answer_begins(tokenizer, name):
    tokenizer = tokenizer(name)
    rendered = tokenizer.render(CHAT)
    assert rendered.startswith(tokenizer.render(CHAT[:1], ending="none").removesuffix("\n").removesuffix("Hi")[:4])
    assert rendered.index("Hi") < rendered.index("Hello there") < rendered.index("Bye")
    assert len(rendered) >= len(tokenizer.render(CHAT, ending="none"))
    assert tokenizer.encode(rendered).count(EOS + 1) == rendered.count("<bos>") <= 1


OPERATORS = (
    "{{ 'ab' * 3 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 2.5 * 2 }}{{ 7 % 4 }}{{ '%5.2f|%s|%%' % (1.5, 'x') }}{{ [1] + [2] }}"
    "{{ 'a' + 'b' }}{{ messages[0].content | tojson }}{{ strftime_now('%%') }}{{ eos_token ~ tools ~ documents }}"
    "{% set x = namespace(n=1) %}{% for i in range(30) %}{% set x.n = x.n * 7 %}{% endfor %}{{ x.n }}\n"
    "{%- macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{% set y %} z {% endset %}{{ y | trim }}"
)


@pytest.mark.parametrize("name", [*TEMPLATES, pytest.param(OPERATORS, id="operators")])
@pytest.mark.parametrize("ending", ["answer", "none"])
def test_text_is_the_same_as_from_transformers(tokenizer, name, ending):
    ours = tokenizer(name)
    turns = [{"role": each.role, "content": each.content} for each in CHAT]
    for field in ("reasoning_content", "thinking", "reasoning"):
        turns[1][field] = CHAT[1].reasoning
    expected = ours._hf.apply_chat_template(turns, add_generation_prompt=ending == "answer", tokenize=False)
    assert ours.render(CHAT, ending=ending) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["Hello", "Hello ", "Hello\n", "Hel"])
def test_answer_is_continued_from_its_end(tokenizer, name, text):
    tokenizer = tokenizer(name)
    begun = tokenizer.render([CHAT[0], Message("assistant", text)], ending="continue")
    whole = tokenizer.render([CHAT[0], Message("assistant", f"{text}!")], ending="none")
    assert whole.startswith(f"{begun}!")
    assert begun.endswith(text)


@pytest.mark.parametrize(("name", "opening"), [("qwen3", "<think>\nHm, "), ("harmony", "<|message|>Hm, ")])
def test_thinking_is_continued_from_its_end(tokenizer, name, opening):
    begun = tokenizer(name).render([CHAT[0], Message("assistant", "", "Hm, ")], ending="continue")
    assert begun.endswith(opening)


def test_template_that_cannot_render_a_continuation_is_refused(tokenizer):
    with pytest.raises(UsageError, match="cannot be continued"):
        tokenizer("chatml").render([CHAT[0], Message("assistant", "", "Hm, ")], ending="continue")


@pytest.mark.parametrize(
    ("name", "switch"), [("qwen3", "enable_thinking"), ("granite", "thinking"), ("harmony", None), ("llama3", None)]
)
def test_thinking_switch_is_found(tokenizer, name, switch):
    tokenizer = tokenizer(name)
    assert tokenizer.thinking_switch == switch
    texts = [tokenizer.render(CHAT, thinking=thinking) for thinking in (None, True, False)]
    assert len(set(texts)) == (1 if switch is None else 2)


def test_template_decides_on_earlier_thinking(tokenizer):
    assert "Be nice." not in tokenizer("qwen3").render(CHAT)
    assert "<think>\nBe nice.\n</think>\n\nHello there" in tokenizer("qwen3").render(CHAT[:2], ending="none")


TOO_LARGE = {
    "macro": (
        "{% macro f() %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endmacro %}{{ f() }}",
        "renders",
    ),
    "times": ("{{ 'x' * 30000000 }}", "it computes a value of more than 4,194,304 parts"),
    "times less": ("{{ 10 ** 18 * 'x' }}", "it computes a value of more than"),
    "power": ("{% set n = 9 ** 99 %}{{ 9 ** n }}", "it computes a value of more than 4,096"),
    "factors": (
        "{% set x = namespace(n=3) %}{% for i in range(99) %}{% set x.n = x.n * x.n %}{% endfor %}",
        "more than",
    ),
    "width": ("{{ '%0999999999d' % 1 }}", "it computes a value of more than"),
    "given width": ("{{ '%*d' % (999999999, 1) }}", "it computes a value of more than"),
    "sums": (
        "{% set x = namespace(s='x') %}{% for i in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "more than",
    ),
    **{
        name: (
            f"{{% set x = namespace(s=messages[0].content) %}}{{% for i in range(99) %}}{grow}{{% endfor %}}",
            "more than",
        )
        for name, grow in {
            "tilde": "{% set x.s = x.s ~ x.s %}",
            "tilde of many": "{% set x.s = x.s ~ 1 ~ x.s ~ x.s %}",
            "join": "{% set x.s = [x.s, x.s, x.s] | join(x.s) %}",
            "join method": "{% set x.s = x.s.join([x.s, x.s]) %}",
            "join of attributes": "{% set x.s = [{'a': x.s}, {'a': x.s}] | join('', attribute='a') %}",
            "join by map": "{% set x.s = [[x.s, x.s]] | map('join') | first %}",
            "replace": "{% set x.s = x.s | replace('', x.s) %}",
            "replace method": "{% set x.s = x.s.replace('i', x.s ~ 'i') %}",
            "format": "{% set x.s = '%s%s' | format(x.s, x.s) %}",
            "format by name": "{% set x.s = '%(a)s%(a)s' | format(a=x.s) %}",
            "format method": "{% set x.s = '{0}{0}'.format(x.s) %}",
            "format map": "{% set x.s = '{a}{a}'.format_map({'a': x.s}) %}",
            "percent": "{% set x.s = '%s%s' % (x.s, x.s) %}",
            "indent": "{% set x.s = ('a\n' * 4000) | indent(x.s) %}",
            "block": "{% set y %}{{ x.s }}{{ x.s }}{% endset %}{% set x.s = y %}",
        }.items()
    },
    "center": ("{{ 'x' | center(999999999) }}", "more than"),
    "ljust": ("{{ 'x'.ljust(999999999) }}", "more than"),
    "zfill": ("{{ 'x'.zfill(999999999) }}", "more than"),
    "tabs": ("{{ ('\t' * 9999).expandtabs(999999999) }}", "more than"),
    "indent width": ("{{ 'x\ny' | indent(999999999) }}", "more than"),
    "format width": ("{{ '{:999999999}'.format('x') }}", "more than"),
    "format given width": ("{{ '{:{}}'.format('x', 999999999) }}", "more than"),
}
USED = {
    "tilde": ("{{ 'a' ~ 1 ~ messages[0].role }}", "a1user"),
    "join": ("{{ [1, 'b'] | join(', ') }}{{ '-'.join(['c', 'd']) }}", "1, bc-d"),
    "join of attributes": ("{{ messages | join(' ', attribute='role') }}", "user assistant user"),
    "replace": ("{{ 'abab' | replace('a', 'x', 1) }}{{ 'abab'.replace('b', 'y') }}", "xbabayay"),
    "format": (
        "{{ '%s %5.2f %(a)s'|replace('%(a)s', '') | format('x', 1.5) }}{{ '{:>3}|{a}'.format(1, a=2) }}",
        "x  1.50   1|2",
    ),
    "widths": ("{{ 'x' | center(3) }}{{ 'y'.ljust(2) }}{{ 'a\nb' | indent(2) }}", " x y a\n  b"),
}


@pytest.mark.parametrize("name", USED)
def test_checked_operations_give_what_they_gave(tokenizer, name):
    template, text = USED[name]
    assert tokenizer(template).render(CHAT) == text


@pytest.mark.parametrize("name", TOO_LARGE)
def test_templates_may_not_compute_large_values(tokenizer, name):
    template, words = TOO_LARGE[name]
    with pytest.raises(UsageError, match=words):
        tokenizer(template).render(CHAT)


def test_a_template_may_repeat_a_long_message(tokenizer):
    text = "x" * 3_000_000
    assert tokenizer("chatml").render([Message("user", text)], ending="none").count("x") == len(text)
    twice = tokenizer("{% for m in messages * 2 %}{{ m.content }}{% endfor %}")
    assert twice.render([Message("user", text)]) == text * 2


@pytest.mark.parametrize(
    ("name", "messages", "word"),
    [
        ("gemma", [Message("system", "Be brief."), CHAT[0]], "System role not supported"),
        ("mistral", [CHAT[0], CHAT[0]], "alternate"),
        ("{% for %}", CHAT, "template"),
    ],
    ids=["system", "order", "syntax"],
)
def test_template_error_is_reported_with_its_reason(tokenizer, name, messages, word):
    with pytest.raises(UsageError, match=word):
        tokenizer(name).render(messages)


def test_a_template_that_only_renders_questions(tokenizer):
    """The context in use is then that of the last answer."""
    refusing = "{% if messages[-1].role != 'user' %}{{ raise_exception('no question') }}{% endif %}" + CHATML
    tokenizer = tokenizer(refusing)
    engine = FakeEngine([[*tokenizer.encode("Yes"), EOS]])
    session = ChatSession(engine, tokenizer, sampling=Sampling(), stop_ids=frozenset({EOS}))
    *_, turn = session.ask("One?")
    assert isinstance(turn, Turn)
    assert session.context_used == turn.usage.prompt_tokens + turn.usage.completion_tokens


def test_messages_are_parts_where_the_template_wants_parts(tokenizer):
    loop = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    plain, parts = tokenizer("chatml"), tokenizer(CHATML.replace("{{ m['content'] }}", loop))
    assert parts.render(CHAT) == plain.render(CHAT)
    begun = [CHAT[0], Message("assistant", "Hel")]
    assert parts.render(begun, ending="continue") == plain.render(begun, ending="continue")


def test_tokenizer_without_template(tokenizer):
    tokenizer = tokenizer("")
    assert not tokenizer.has_chat_template
    assert tokenizer.thinking_switch is None


def test_thinking_is_switched_in_a_chat(tokenizer):
    tokenizer = tokenizer("qwen3")
    answers = [[*tokenizer.encode(text), EOS] for text in ("<think>\nHm.\n</think>\n\nYes", "No", " and no")]
    session = ChatSession(FakeEngine(answers), tokenizer, sampling=Sampling(), stop_ids=frozenset({EOS}))
    *_, turn = session.ask("One?")
    assert isinstance(turn, Turn)
    assert turn.message == Message("assistant", "Yes", "Hm.")
    session.set_thinking(False)
    *_, turn = session.ask("Two?")
    prompt = tokenizer.decode(session.engine.prompts[1])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "Hm." not in prompt
    *_, turn = session.continue_last()
    assert turn.message.content == "No and no"
    assert tokenizer.decode(session.engine.prompts[2]).endswith("<|im_start|>assistant\nNo")
    assert session.context_used == len(tokenizer.encode(tokenizer.render(session.history, ending="none")))


@pytest.mark.parametrize("part", ["tokenizer", "template"])
def test_a_lack_of_threads_is_no_fault_of_the_model(tokenizer, part):
    tokenizer = tokenizer("chatml")
    run = (lambda: tokenizer.encode("a")) if part == "tokenizer" else lambda: tokenizer.render(CHAT)
    run()
    with watched_threads(1), pytest.raises(AllocationError, match="thread"):
        run()
