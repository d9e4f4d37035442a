"""The codec and the generation defaults, on a model folder made here."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_serve.text.codec import NoChatTemplateError, TextCodec
from ds_serve.text.defaults import GenerationDefaults

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if mood %}[{{ mood }}]{% endif %}{% if messages[0].content == 'refuse' %}"
    "{{ raise_exception('no such chat') }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world, hello there"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder):
    return TextCodec(folder)


def test_encode_is_the_tokenizers_own_call(codec):
    ids = codec.encode("hello world")
    assert ids == codec.tokenizer("hello world")["input_ids"] and ids[0] == 0
    assert codec.encode("hello world", add_special_tokens=False) == ids[1:]
    assert codec.decode(ids) == "hello world"
    assert codec.decode(ids, skip_special_tokens=False) == "<s>hello world"
    assert codec.vocab["</s>"] == 1


def test_chat_has_one_bos_and_opens_the_assistants_turn(codec):
    ids = codec.encode_chat([{"role": "user", "content": "hello"}])
    assert ids.count(0) == 1
    assert codec.decode(ids, skip_special_tokens=False) == "<s><|user|>hello</s><|assistant|>"


def test_chat_continues_the_final_message(codec):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello wor"}]
    text = codec.decode(codec.encode_chat(messages, continue_final_message=True), skip_special_tokens=False)
    assert text.endswith("<|assistant|>hello wor")
    with pytest.raises(ValueError, match="continue_final_message"):
        codec.encode_chat(messages, continue_final_message=True, add_generation_prompt=True)


def test_template_variables_reach_the_template_and_cannot_steer_the_call(codec):
    messages = [{"role": "user", "content": "hello"}]
    assert "[glad]" in codec.decode(codec.encode_chat(messages, mood="glad"))
    for name in ("chat_template", "tokenize", "return_tensors"):
        with pytest.raises(ValueError, match=name):
            codec.encode_chat(messages, **{name: "x"})


def test_bad_chats_are_refused(codec):
    with pytest.raises(ValueError, match=r"messages\[0\].role.*'wizard'"):
        codec.encode_chat([{"role": "wizard", "content": "x"}])
    with pytest.raises(ValueError, match="no such chat"):
        codec.encode_chat([{"role": "user", "content": "refuse"}])
    with pytest.raises(ValueError, match="at least one"):
        codec.encode_chat([])


def test_a_model_without_template_says_so(folder, tmp_path):
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.chat_template = None
    fast.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path)
    assert not codec.has_chat_template
    with pytest.raises(NoChatTemplateError, match="no chat template"):
        codec.encode_chat([{"role": "user", "content": "x"}])


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextCodec(tmp_path / "nowhere")


def test_token_bytes_join_to_the_text(codec):
    text = "hello wörld 🙂"
    ids = codec.encode(text, add_special_tokens=False)
    assert b"".join(codec.token_bytes(i) for i in ids) == text.encode()
    assert codec.token_bytes(1) == b"</s>"
    assert codec.token_bytes(10**6) == b""


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def test_defaults_come_from_generation_config_then_config(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": 2, "max_position_embeddings": 64, "bos_token_id": 1})
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(
        eos_token_ids=(2,), bos_token_id=1, max_position_embeddings=64
    )
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 8], "temperature": 1, "do_sample": True})
    defaults = GenerationDefaults.load(tmp_path)
    assert defaults.eos_token_ids == (7, 8) and defaults.temperature == 1.0 and defaults.do_sample is True


def test_defaults_of_a_nested_text_config(tmp_path):
    write(tmp_path, "config.json", {"text_config": {"max_position_embeddings": 32, "eos_token_id": 5}})
    defaults = GenerationDefaults.load(tmp_path)
    assert defaults.max_position_embeddings == 32 and defaults.eos_token_ids == (5,)


def test_wrong_defaults_name_the_field(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": "two"})
    with pytest.raises(ValueError, match="eos_token_id must be int, found 'two'"):
        GenerationDefaults.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        GenerationDefaults.load(tmp_path / "nowhere")
