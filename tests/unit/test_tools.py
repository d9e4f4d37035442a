"""How models write tool calls: the forms of templates, what a grammar lets through, what the parser reads."""

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_serve import demo
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import GrammarError
from ds_serve.text.tools import FORMATS, CallParser, Calls, arguments_rule, call_format

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "$defs": {"days": {"type": "integer", "minimum": 1}},
}
FUNCTIONS = {"weather": arguments_rule(WEATHER, "tools"), "weather_now": arguments_rule(None, "tools")}
ONE = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "}\\"{Röm", "days": 2}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "}\\"{Röm", "days": 2}}]',
    "llama": '{"name": "weather", "parameters": {"city": "}\\"{Röm", "days": 2}}',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "weather_now", "arguments": {}}\n</tool_call>',
    "mistral": ONE["mistral"][:-1] + ', {"name": "weather_now", "arguments": {}}]',
}
ARGUMENTS = '{"city": "}\\"{Röm", "days": 2}'

# -- forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, name",
    [
        ("{% if tools %}{{ '<tool_call>' }}", "hermes"),
        ("{% if tools %}{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{% for t in tools %}{{ '\"parameters\": ' }}ipython", "llama"),
    ],
)
def test_a_template_tells_its_form(template, name):
    assert call_format("auto", template) is FORMATS[name]
    assert call_format("mistral", template) is FORMATS["mistral"]


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ messages }} <tool_call> {{ toolset }}", "no place for tools"),
        ("{{ tools }}", "not known"),
        ("{{ tools }}{{ '\"parameters\": ' }}", "not known"),
        ("{{ tools }}<tool_call>\n<function=f>", "Qwen3-Coder"),
        ("{{ tools }}<|channel|>commentary", "gpt-oss"),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", "Mistral"),
    ],
)
def test_a_template_of_another_form_is_refused(template, words):
    with pytest.raises(ValueError, match=f"^tools: .*{words}"):
        call_format("auto", template)


def test_arguments_are_an_object_of_the_named_properties():
    for schema in ({"type": "array"}, {"type": ["object", "null"]}):
        with pytest.raises(ValueError, match=r"^tools\[1\]: must be the schema of an object"):
            arguments_rule(schema, "tools[1]")
    with pytest.raises(GrammarError, match=r"^tools\[1\]: .*'not'"):
        arguments_rule({"properties": {"a": {"not": {}}}}, "tools[1]")
    closed = json.loads(arguments_rule({"properties": {"a": {}}}, "t").removeprefix("%json "))
    assert closed["additionalProperties"] is False and closed["type"] == "object"
    for more in ({"additionalProperties": {}}, {"allOf": [{"properties": {"b": {}}}]}):
        schema = json.loads(arguments_rule({"properties": {"a": {}}} | more, "t").removeprefix("%json "))
        assert schema.get("additionalProperties", {}) == {}


# -- what the grammar lets through -------------------------------------------------------------


def tokenizer_with(marks, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(['{"name": "weather", "arguments": {}}', "<tool_call>"], trainer)
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(mark, special=special, normalized=False) for mark in marks])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def follows(tokenizer, grammar, text):
    """True: text may end here; False: it may go on; None: it is none of the grammar's."""
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=0), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text).ids
    if matcher.try_consume_tokens(ids) < len(ids):
        return None
    return matcher.is_accepting()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("added", ["text", "token", "special"])
def test_calls_are_grammatical_and_text_is_free(name, added):
    format, one, two = FORMATS[name], ONE[name], TWO.get(name)
    tokenizer = tokenizer_with(format.marks if added != "text" else (), added == "special")

    def grammar(required, parallel):
        calls = Calls(format, FUNCTIONS, required, parallel, tokenizer.get_added_tokens_decoder())
        assert calls.skip_special_tokens == (added != "special" or not format.marks)
        return calls.grammar()

    may, may_one, must, must_one = (grammar(*which) for which in ((0, 1), (0, 0), (1, 1), (1, 0)))
    for each in (may, may_one, must, must_one):
        assert follows(tokenizer, each, one) is True
        assert follows(tokenizer, each, one + "x") is None
        assert follows(tokenizer, each, one[: one.index("2")]) is False
        assert follows(tokenizer, each, one.replace("weather", "climate")) is None
        assert follows(tokenizer, each, one.replace("days", "ways")) is None
        if two is not None:
            assert follows(tokenizer, each, two) is (True if each in (may, must) else None)
    for each in (may, may_one):
        for text in ("", "Sure {", "Sure: <tool", "<think>so<think>"):
            assert follows(tokenizer, each, text) is True
        assert follows(tokenizer, each, "Sure.\n" + one) is True
        if format.marker:
            assert follows(tokenizer, each, f"<think>no {format.marker} here") is None
    for each in (must, must_one):
        assert follows(tokenizer, each, "") is False and follows(tokenizer, each, "Sure") is None


def test_a_prelude_may_come_before_the_call():
    tokenizer = tokenizer_with(("<|python_tag|>",), True)
    for required in (True, False):
        calls = Calls(FORMATS["llama"], FUNCTIONS, required, True, tokenizer.get_added_tokens_decoder())
        assert calls.skip_special_tokens
        for prelude in ("", "<|python_tag|>"):
            assert follows(tokenizer, calls.grammar(), prelude + ONE["llama"]) is True


# -- what the parser reads ---------------------------------------------------------------------


def events(name, pieces):
    """Content, calls as [name, arguments], and whether they are complete; each call has an id, told once."""
    parser = CallParser(FORMATS[name], FUNCTIONS)
    content, calls, ids = "", [], []
    for at, piece in enumerate(pieces):
        for event in parser.push(piece, final=at == len(pieces) - 1):
            if isinstance(event, str):
                assert event and not calls
                content += event
                continue
            if event.id is not None:
                assert event.index == len(calls)
                calls.append([event.name, ""])
                ids.append(event.id)
            assert event.index == len(calls) - 1 and any(v for k, v in asdict(event).items() if k != "index")
            calls[-1][1] += event.arguments
    assert len(set(ids)) == len(ids) == parser.num_calls
    return content, calls, parser.complete


def texts():
    cases = [(name, text) for which in (ONE, TWO) for name, text in which.items()]
    cases += [(name, f"Let me see. \n{ONE[name]}") for name in ("hermes", "mistral")]
    cases += [("mistral", ONE["mistral"].replace("][", "] ["))]
    cases += [("hermes", text) for text in (" \n", "a < b <tool", "I say <tool_call >.", "{}", "")]
    cases += [("llama", text) for text in ("So: {}", " {", "")]
    return cases + [(name, text[:cut]) for name, text in cases[:6] for cut in (5, 33, 47, -14, -1)]


@given(case=st.sampled_from(texts()), data=st.data())
@settings(max_examples=150, deadline=None)
def test_events_do_not_depend_on_the_cuts(case, data):
    name, text = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert events(name, pieces) == events(name, [text]) == events(name, [*text, ""])


@pytest.mark.parametrize("name", ONE)
def test_a_call_is_its_name_and_its_arguments_as_written(name):
    assert events(name, [ONE[name]]) == ("", [["weather", ARGUMENTS]], True)


@pytest.mark.parametrize("name", TWO)
def test_calls_come_one_after_the_other_and_after_text(name):
    both = [["weather", ARGUMENTS], ["weather_now", "{}"]]
    assert events(name, [TWO[name]]) == ("", both, True)
    assert events(name, ["Let me  see.\n\n" + TWO[name]]) == ("Let me  see.", both, True)


def test_text_without_calls_stays_as_it_is():
    assert events("hermes", ["a <tool_cal", "", " b \n"]) == ("a <tool_cal b \n", [], False)
    assert events("llama", ["So {", '"name": "weather"']) == ('So {"name": "weather"', [], False)


def test_what_was_cut_off_is_told_as_far_as_it_came():
    assert events("hermes", [ONE["hermes"][:30]]) == ("", [], False)
    cut = ONE["hermes"].index("Röm")
    assert events("hermes", ["Well " + ONE["hermes"][:cut]]) == (
        "Well",
        [["weather", '{"city": "}\\"{']],
        False,
    )
    assert events("hermes", [ONE["hermes"].removesuffix("\n</tool_call>")])[2]


def test_ids_are_such_as_the_models_template_takes():
    for name, form in (("hermes", r"call_\w{24}"), ("mistral", "[a-zA-Z0-9]{9}"), ("llama", r"call_\w{24}")):
        [event] = CallParser(FORMATS[name], FUNCTIONS).push(ONE[name])
        assert re.fullmatch(form, event.id)


# -- the demo model's template -----------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "Hi \n"}, {"role": "system", "content": "Be brief."}
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Röm", "days": 2}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}}]


@pytest.fixture(scope="module")
def codec():
    return TextCodec(demo.model_path())


def test_chats_without_tools_have_the_tokens_that_the_demo_was_trained_on(codec):
    begin = {"system": 2, "user": 3, "assistant": 4}
    assistant = {"role": "assistant", "content": " Hello"}
    for chat in ([USER], [SYSTEM, USER], [USER, assistant, USER], [SYSTEM, USER, USER]):
        ids = []
        for message in chat:
            ids += [begin[message["role"]], *codec.encode(message["content"]), 1]
        assert codec.encode_chat(chat) == [*ids, 4]
        assert codec.encode_chat(chat, add_generation_prompt=False) == ids
    opened = codec.encode_chat([USER, assistant], continue_final_message=True)
    assert opened == [3, *codec.encode("Hi \n"), 1, 4, *codec.encode(" Hello")]


def test_the_demos_template_shows_tools_calls_and_results(codec):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    result = {"role": "tool", "content": "22", "tool_call_id": "a", "name": "weather"}
    text = codec.decode(codec.encode_chat([SYSTEM, USER, called, result], tools=TOOLS), False)
    system, _, rest = text.partition("<|end|>")
    assert system.startswith("<|system|>Be brief.\n") and json.dumps(TOOLS[0]["function"]) in system
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Röm", "days": 2}}\n</tool_call>'
    assert rest == (
        f"<|user|>Hi \n<|end|><|assistant|>{call}\n{call}<|end|>"
        "<|user|><tool_response>\n22\n</tool_response><|end|><|assistant|>"
    )
    alone = codec.decode(codec.encode_chat([USER], tools=TOOLS), False)
    assert alone == f"{system.replace('Be brief.' + chr(10), '')}<|end|><|user|>Hi \n<|end|><|assistant|>"
    assert call_format("auto", codec.tools_template).name == "hermes"


def test_what_the_template_writes_is_what_the_grammar_allows(codec):
    calls = Calls(FORMATS["hermes"], FUNCTIONS, False, True, codec.added_tokens)
    message = {"role": "assistant", "content": "Sure.", "tool_calls": [CALL, CALL]}
    text = codec.decode(codec.encode_chat([USER, message], add_generation_prompt=False, tools=TOOLS), False)
    answer = text.rpartition("<|assistant|>")[2].removesuffix("<|end|>")
    assert follows(codec.backend, calls.grammar(), answer) is True
    assert events("hermes", [answer])[:2] == ("Sure.", [["weather", '{"city": "Röm", "days": 2}']] * 2)


def test_the_training_script_has_the_shipped_template(codec):
    script = Path(__file__).parents[2] / "scripts" / "train_demo.py"
    values = {
        target.id: node.value
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert ast.literal_eval(values["CHAT_TEMPLATE"]) == codec.tools_template
