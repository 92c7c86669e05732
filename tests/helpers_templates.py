"""Chat templates in the manner of model families, and of each thing that a template may use."""

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
