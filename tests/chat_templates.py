"""Chat templates in the style of the Hub, conversations for them, and a tokenizer that has one."""

from __future__ import annotations

import json
import shutil

from conftest import TINY_CHECKPOINT

# In the style of what is on the Hub, each with something that another has not.
TEMPLATES = {
    "ChatML": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + \
message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if \
add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Llama 3": """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
""",
    # With a date in the system's message, as the Doge models that are tuned on instructions.
    "Doge": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%B %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}
{{- system_message + eos_token + "\\n\\n" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}{% continue %}{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' }}
{{- message['content'] + eos_token + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}
{%- endif %}
""",
    "strict": """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{% elif message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]
{%- else %}
{% generation %}
 {{ message['content'] }}{{ eos_token }}
{% endgeneration %}
{% endif %}
{% endfor %}
""",
    "everything": """\
{%- macro one(message, last=false) -%}
  {{ message.role | upper }}: {{ message | tojson }}{{ '' if last else pad_token }}
{%- endmacro -%}
{% set ns = namespace(count=0) %}
{% for message in messages %}
  {% if message.content is defined and message.content | length > 900 %}
    {% break %}
  {% endif %}
  {% set ns.count = ns.count + 1 %}
{{ one(message, loop.last) }} {{ unk_token }}{{ sep_token is defined }}
  {# not seen #}
{% endfor %}
{{ ns.count }} {{ messages | map(attribute='role') | join(',') }} {{ tools is none }}
{{ messages[0] | tojson(indent=2) }}  {{ 'é<&>' | tojson }} {{ [3, 1] | sort }}

""",
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "  Be <kind> & “brief”.\n"},
        {"role": "user", "content": " Who are you?\n\n{{ bos_token }} <|eot_id|>"},
        {"role": "assistant", "content": "日本語 🐕"},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "a", "name": "b", "nothing": None},
        {"role": "assistant", "content": "\tc  "},
        {"role": "user", "content": "d" * 1000},
    ],
]
# One that any conversation suits.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer_files(directory, **changes):
    """The tokenizer of examples/doge-tiny in a bundle, with changes to its config."""
    for path in TINY_CHECKPOINT.glob("*token*.json"):
        shutil.copy(path, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
