"""Grammars on the demo model's tokenizer: what follows them, and what is refused by name."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from ds_serve import demo
from ds_serve.text.grammar import MAX_CACHED, GrammarError, Grammars, json_rule

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(f"{demo.model_path()}/tokenizer.json")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


@pytest.fixture(scope="module")
def follows(tokenizer):
    """Whether a text follows a grammar to an end of it."""
    view = LLTokenizer(tokenizer.to_str())

    def check(grammar, text):
        matcher = LLMatcher(view, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def test_json_is_as_json_dumps_writes_it(grammars, follows):
    value = {"name": 'a "b"', "tags": [1, 2]}
    for grammar in (grammars.json_schema(PERSON), grammars.json_schema(json.dumps(PERSON))):
        assert follows(grammar, json.dumps(value))
        assert not follows(grammar, json.dumps(value, indent=1))
        assert not follows(grammar, json.dumps(value, separators=(",", ":")))
        assert not follows(grammar, json.dumps(value | {"tags": ["x"]}))
        assert not follows(grammar, json.dumps(value)[:-1])


def test_a_boolean_is_a_schema(grammars, follows):
    assert follows(grammars.json_schema(True), '[1, {"a": null}]')
    with pytest.raises(GrammarError, match="guided_json: no JSON is valid"):
        grammars.json_schema(False, "guided_json")


def test_regex_is_of_the_whole_text(grammars, follows):
    grammar = grammars.regex("[a-c]{2,3}|é+")
    assert follows(grammar, "ab") and follows(grammar, "ééé")
    assert not follows(grammar, "abcd") and not follows(grammar, "a") and not follows(grammar, "abé")


def test_choices_are_taken_literally(grammars, follows):
    choices = ["yes", "yes and no", 'q"uo\\te', "a|b", "line\nbreak", "🙂 é", "/x/", ""]
    grammar = grammars.choice([*choices, "yes"])
    assert all(follows(grammar, choice) for choice in choices)
    assert not any(follows(grammar, text) for text in ("ye", "yes and", "a", "no"))


def test_thousands_of_choices_are_fine(grammars, follows):
    grammar = grammars.choice([f"choice number {number}" for number in range(5000)])
    assert follows(grammar, "choice number 4999") and not follows(grammar, "choice number 5000")


def test_lark_and_gbnf_are_told_apart(grammars, follows):
    lark = grammars.grammar('start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]+/')
    gbnf = grammars.grammar('root ::= greeting " " name\ngreeting ::= "hi" | "hello"\nname ::= [A-Z] [a-z]+')
    for grammar in (lark, gbnf):
        assert follows(grammar, "hello Ada") and not follows(grammar, "hello ada")


def test_a_schema_within_lark(grammars, follows):
    grammar = grammars.lark(f'start: "<" call ">"\ncall: {json_rule(PERSON, "tools")}', "tools")
    assert follows(grammar, '<{"name": "x", "tags": []}>')
    assert not follows(grammar, '<{"name":"x","tags":[]}>')
    with pytest.raises(GrammarError, match="tools: .*'not'"):
        json_rule({"not": {}}, "tools")


def test_a_grammar_may_spell_special_tokens(grammars, follows):
    assert follows(grammars.lark("start: <|user|> /[a-z]+/ <|end|>"), "<|user|>abc<|end|>")


REFUSED_SCHEMAS = [
    ([], "must be an object or a boolean"),
    ("no json", "not the JSON text"),
    ({"type": "tree"}, "tree"),
    ({"not": {}}, "'not'"),
    ({"properties": {"a": {"anyOf": [{"nullable": True}]}}}, r"'nullable' .*#/properties/a/anyOf/0"),
    ({"$defs": {"a": {"uniqueItems": True}}}, r"'uniqueItems' .*#/\$defs/a"),
    ({"items": {"if": {}}}, "'if' .*#/items"),
    ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
    ({"format": "color", "type": "string"}, "color"),
    ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
    ({"$ref": "http://example.org/schema"}, "example.org"),
    ({"$ref": "#/$defs/gone"}, "gone"),
    ({"pattern": "(?=a)", "type": "string"}, "look-ahead"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"enum": []}, "Unsatisfiable"),
    ({"const": float("inf")}, "JSON compliant"),
    ({"const": "\ud800"}, "serializable"),
    ({"properties": {"\ud800": {"not": {}}}}, r"properties/.ud800"),
    ({"type": "object", "minProperties": 3, "required": ["a"]}, "minProperties"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum: 0 .* maximum 0.5"),
    ({"exclusiveMaximum": -1, "exclusiveMinimum": -1.5}, "exclusiveMaximum: -1 "),
]


@pytest.mark.parametrize("schema, words", REFUSED_SCHEMAS, ids=lambda value: str(value)[:40])
def test_a_schema_that_cannot_be_followed_is_refused(grammars, schema, words):
    with pytest.raises(GrammarError, match=f"^guided_json: .*{words}"):
        grammars.json_schema(schema, "guided_json")


def test_annotations_are_no_demands(grammars, follows):
    schema = {
        "title": "t",
        "description": "d",
        "default": 1,
        "x-order": 2,
        "deprecated": True,
        "type": "null",
    }
    assert follows(grammars.json_schema(schema), "null")


REFUSED_TEXTS = [
    ("regex", "(a", "unclosed group"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"[^\s\S]", "no text can follow"),
    ("grammar", "", "Empty"),
    ("grammar", "no grammar", "Expected"),
    ("grammar", "start: UNKNOWN", "UNKNOWN"),
    ("grammar", "root ::= missing", "missing"),
    ("grammar", 'start: x\nx[temperature=0.5]: "a"', "'temperature'"),
    ("grammar", 'start: x "b"\nx[stop="b"]: /a+/', "'stop'"),
    ("grammar", '{"grammars": [{"lark_grammar": "start: /a/"}]}', "Lark or GBNF"),
    ("grammar", "start: <|nobody|>", "nobody"),
    ("choice", ["\ud800"], "hex escape"),
]


@pytest.mark.parametrize("kind, value, words", REFUSED_TEXTS, ids=lambda value: str(value)[:30])
def test_what_no_text_can_follow_is_refused(grammars, kind, value, words):
    with pytest.raises(GrammarError, match=f"^here: .*({words})") as refused:
        getattr(grammars, kind)(value, "here")
    assert len(str(refused.value)) < 500


def test_deep_schemas_are_refused_rather_than_fatal(grammars):
    text = '{"items":' * 20_000 + "true" + "}" * 20_000
    with pytest.raises(GrammarError, match="guided_json"):
        grammars.json_schema(text, "guided_json")
    with pytest.raises(GrammarError, match="guided_regex"):
        grammars.regex("(" * 20_000 + "a" + ")" * 20_000)


def test_what_was_checked_is_remembered_within_a_bound(tokenizer):
    grammars = Grammars(tokenizer)
    checked = []
    grammars._check = lambda grammar, name: checked.append(grammar)
    for _ in range(2):
        grammars.json_schema({"type": "null"})
        grammars.json_schema('{"type": "null"}')
    assert len(checked) == 1
    for number in range(MAX_CACHED + 1):
        grammars.regex(str(number))
    grammars.regex(str(MAX_CACHED))
    assert len(checked) == MAX_CACHED + 2
    grammars.json_schema({"type": "null"})
    assert len(checked) == MAX_CACHED + 3
