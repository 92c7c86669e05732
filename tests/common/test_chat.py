"""Chat templates see what transformers shows them, and render to the same text."""

import pytest

from common.files import InputError
from common.tokenizer import Tokenizer
from helpers_tokenizers import write_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
SYSTEM = {"role": "system", "content": "be <brief> & 'kind'"}
TURNS = [
    {"role": "user", "content": "  {{ what }}  ß🎉"},
    {"role": "assistant", "content": "mice "},
    {"role": "user", "content": "and fox?"},
]
CALL = {"name": "plural", "arguments": {"word": "fox", "count": 2}}
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "plural", "content": '{"plural": "foxes"}'},
    {"role": "user", "content": "thanks"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "plural",
            "description": "The plural of a <word>: Füchse & 'mice'",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Mice", "text": "A mouse, two mice."}]

# As the models of these families have them, in short.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content =
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim +
'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA32 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + tools | map(attribute="function") | list | tojson }}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | tojson }}
        {{- eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- "[TOOL_RESULTS] " + message.content | tojson + "[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}{{ ns.index }}"""
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' +
message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
HERMES_TOOLS = """{%- macro describe(tool) -%}
    {{ tool.function.name }}({% for name, type in tool.function.parameters.properties.items() %}
{{ name }}: {{ type.type }}{{ ", " if not loop.last }}{% endfor %})
{%- endmacro %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}
<tools>{{ tool | tojson }}</tools>
{{ describe(tool) }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.tool_calls is defined %}
<tool_call>{{ message.tool_calls[0].function | tojson(sort_keys=true) }}</tool_call>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
COMMAND_R = """{{ bos_token }}{% if documents %}{% for document in documents %}
Document {{ loop.index0 }}: {{ document['title'] }}
{{ document.text }}
{% endfor %}{% elif documents is none %}no documents
{% endif %}{% for message in messages %}<{{ message.role | upper }}>{{ message.content }}
{%- endfor %}"""
GENERATION = """{% for message in messages %}{% if message.role == 'assistant' %}{% set who = 'model' %}
{% generation %}
    {% set who = 'inside' %}
{{ who }}: {{ message['content'] }}{{ eos_token }}
{%- endgeneration %}
{{ who }}{% else %}{{ message.role }}: {{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}model:{% endif %}"""
JSON = """{{ messages | tojson }}
{{ messages | tojson(ensure_ascii=true) }}
{{ messages | tojson(indent=2) }}
{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}
{{ tools | tojson(ensure_ascii=False, indent=1) }}"""
SPECIALS = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}|" + (
    "{{ cls_token is defined }}|{{ image_token }}|{{ additional_special_tokens is defined }}"
)
UNDEFINED = """{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ date is defined }}
{{ add_generation_prompt }} {{ continue_final_message is defined }} {{ dict(a=1) }}"""
WHITESPACE = """{{ bos_token }}
{%- if messages[0]['role'] == 'assistant' %}
    {{ raise_exception('begin with the user') }}
{%- endif %}
{% for message in messages %}
    {% if loop.first %}
[{{ message | tojson }}]
    {% elif message['role'] == 'user' %}
{{ loop.index0 }}: {{ message['content'] | trim }}
    {% else %}
{{ '\n' + message.content + eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
    <answer>
{%- endif %}
"""
LOOP = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }};{% endfor %}"
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] }}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
BLOCKS = """{% for message in messages %}{{ message.role }}: {% if message.content is string %}
{{ message.content }}{% else %}{% for block in message.content %}{% if block.type == 'text' %}
{{ block.text }}{% endif %}{% endfor %}{% endif %};{% endfor %}"""
TEMPLATES = {
    "Llama 2": LLAMA2, "Llama 3": LLAMA3, "Llama 3.2": LLAMA32, "Mistral": MISTRAL,
    "ChatML": CHATML, "ChatML with a default": CHATML_DEFAULT, "Zephyr": ZEPHYR, "Phi": PHI,
    "Hermes, tools": HERMES_TOOLS, "Command R, documents": COMMAND_R, "generation": GENERATION,
    "tojson": JSON, "special tokens": SPECIALS, "what is defined": UNDEFINED,
    "whitespace": WHITESPACE, "loop controls": LOOP, "content blocks": BLOCKS,
}  # fmt: skip
CHATS = {
    "one": ([TURNS[0]], {}),
    "turns": (TURNS, {}),
    "system": ([SYSTEM, *TURNS], {}),
    "tools": (CALLS, {"tools": TOOLS}),
    "documents": (TURNS, {"documents": DOCUMENTS}),
    "no tools": (TURNS, {"tools": []}),
    "no generation prompt": (TURNS, {"add_generation_prompt": False}),
    "continued": (TURNS[:2], {"continue_final_message": True}),
    "continued, no space": ([TURNS[0], TURNS[2]], {"continue_final_message": True}),
}


def both(folder, template):
    """Our tokenizer of a folder with this template, and transformers'."""
    from helpers_oracles import PreTrainedTokenizerFast

    config = {"chat_template": template, "image_token": "<image>"} | SPECIAL
    write_tokenizer(folder, "llama2", **config, additional_special_tokens=["<extra>"])
    return Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(chat):
    """What a chat gives: its text, or that it fails."""
    try:
        return chat()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_equals_transformers(tmp_path, template):
    """A chat model that gets one line break too many, no date, no tools, or no BOS answers worse,
    and nothing says so."""
    ours, theirs = both(tmp_path / "t", TEMPLATES[template])
    texts = {}
    for name, (messages, options) in CHATS.items():
        prompted = "continue_final_message" not in options
        full = {"add_generation_prompt": prompted} | options
        before = rendered(lambda: ours.chat(messages, **options))
        want = rendered(lambda: theirs.apply_chat_template(messages, tokenize=False, **full))
        after = rendered(lambda: ours.chat(messages, **options))  # where midnight fell between
        if isinstance(want, str):
            assert want in (before, after), name
            texts[name] = want
        else:
            assert before is InputError, (name, want)
    assert len(texts) >= 4, texts


def test_content_blocks_are_continued(tmp_path):
    """Messages of several blocks end with the last block's text."""
    ours, theirs = both(tmp_path / "t", BLOCKS)
    blocks = [{"type": "text", "text": "the fox "}, {"type": "text", "text": "jumps"}]
    messages = [TURNS[0], {"role": "assistant", "content": blocks}]
    want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.chat(messages, continue_final_message=True) == want
    assert want.endswith("jumps") and messages[1]["content"] == blocks


@pytest.mark.parametrize("kind", ["sentencepiece", "llama2"])
def test_chat_text_becomes_special_tokens(tmp_path, kind):
    """A template writes its special tokens out as text: each must become its one id again, BOS
    once. As "<", "s", ">" the model has never seen them."""
    template = "{{ bos_token }}the {{ eos_token }}fox"
    ours = Tokenizer(write_tokenizer(tmp_path / "t", kind, chat_template=template))
    ids = ours.encode(ours.chat(TURNS), start=False)
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1
    assert ids.count(ours.eos_id) == 1


def test_chat_template_is_found_in_every_place(tmp_path):
    """Newer folders keep it in a file of its own, some name several: a template that isn't found is
    no chat at all, and that for tools is another one."""
    from helpers_oracles import PreTrainedTokenizerFast

    def shown(options):
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        text = Tokenizer(folder).chat(TURNS, **options)
        assert text == theirs.apply_chat_template(TURNS, tokenize=False, **options)
        return text

    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_tokenizer(tmp_path / "t", "llama2", chat_template=listed)
    assert (shown({}), shown({"tools": TOOLS})) == ("plain", "tools")
    (folder / "chat_template.jinja").write_text("from the file")
    assert (shown({}), shown({"tools": TOOLS})) == ("from the file", "from the file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("its tools")
    assert (shown({}), shown({"tools": TOOLS})) == ("from the file", "its tools")
    for kind in ("llama2", "sentencepiece"):
        with pytest.raises(InputError, match="no chat template"):
            Tokenizer(write_tokenizer(tmp_path / f"bare {kind}", kind)).chat(TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}",
        "{% generation %}{{ messages }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ sep_token + 'x' }}",
        "{{ 1 / 0 }}",
    ],
)
def test_bad_templates_are_refused(tmp_path, template):
    """Templates come with downloaded checkpoints: they must neither reach Python's insides nor end
    in a traceback."""
    ours = Tokenizer(write_tokenizer(tmp_path / "t", "llama2", chat_template=template))
    with pytest.raises(InputError, match="chat template"):
        ours.chat(TURNS)


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{{ messages[-1].content[4:] }}"])
def test_a_message_that_the_template_changes_is_not_continued(tmp_path, template):
    """A model would go on with something else than what the assistant is said to have begun."""
    ours = Tokenizer(write_tokenizer(tmp_path / "t", "llama2", chat_template=template))
    with pytest.raises(InputError, match="final message"):
        ours.chat(TURNS, continue_final_message=True)


@pytest.mark.parametrize("template", [1, {"a": "b"}, ["x"], [{"name": "default"}]])
def test_a_template_of_another_form_is_refused(tmp_path, template):
    """A hand-edited config is a traceback, or a chat without a template."""
    folder = write_tokenizer(tmp_path / "t", "llama2", chat_template=template)
    with pytest.raises(InputError, match="tokenizer_config.json: chat_template"):
        Tokenizer(folder)
