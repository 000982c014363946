"""Chat templates of known families, written anew in their shape: the same conversation gives the strings that theirs give.

Left out are tools where they change nothing here, long standing instructions, and checks that never fail here.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """`expected` of the conversation in test_chat_templates.py: [[ ]] around what is scored."""

    template: str
    specials: tuple[str, ...]
    eos: str
    expected: str
    added: tuple[str, ...] = ()  # tokens that are not special
    bos: str = "<|begin|>"


_ALTERNATE = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
_GENERATION = "{% if add_generation_prompt %}"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chatml_with(system: str) -> str:
    return (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\n"
        + system
        + "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        + _GENERATION
        + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


_CHATML_TURNS = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[See you<|im_end|>]]"
)

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for m in turns %}"
    + _ALTERNATE
    + "{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_3 = (
    "{% for m in messages %}"
    "{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    + _GENERATION
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA_3_2 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] | trim %}\n"
    '    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = "" %}\n{%- endif %}\n'
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
    "{%- if tools %}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n"
    '        {{- "\\n\\n" }}\n    {%- endfor %}\n{%- endif %}\n'
    '{{- system }}\n{{- "<|eot_id|>" }}\n{%- for m in messages %}\n'
    "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)

_LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[See you<|eot_id|>]]"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

QWEN_3 = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}\n    {%- for tool in tools %}\n"
    '        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- "\\n</tools><|im_end|>\\n" }}\n{%- endif %}\n'
    "{%- set ns = namespace(last=-1) %}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n"
    "        {%- set ns.last = loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n{%- for m in messages %}\n"
    "    {%- if m.role != 'assistant' %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n    {%- else %}\n"
    "        {%- set content = m.content %}\n        {%- set thought = '' %}\n        {%- if m.reasoning_content is string %}\n"
    "            {%- set thought = m.reasoning_content %}\n        {%- elif '</think>' in content %}\n"
    "            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "        {%- if loop.index0 > ns.last and (loop.last or thought) %}\n"
    "            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
    "        {%- else %}\n            {{- '<|im_start|>assistant\\n' + content }}\n        {%- endif %}\n        {{- '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n{%- endif %}"
)

QWEN_3_THINKING = QWEN_3.replace(  # 2507: the prompt begins the thinking part
    "    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n",
    "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n",
)

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + _ALTERNATE
    + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA_3 = (
    (
        "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- set prefix = messages[0]['content'] + '\n\n' -%}\n"
        '    {%- set turns = messages[1:] -%}\n{%- else -%}\n    {%- set prefix = "" -%}\n    {%- set turns = messages -%}\n{%- endif -%}\n'
        "{%- for m in turns -%}\n    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}\n"
        "    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}\n    {{ m['content'] | trim }}\n"
        "    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{ '<start_of_turn>model\n' }}\n{%- endif -%}\n"
    )
    .replace("}}\n    {{ ", "}}{{ ")
    .replace("}}\n{%- endfor", "}}{%- endfor")
)

_GEMMA_TURNS = (
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello<end_of_turn>]]\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[[See you<end_of_turn>]]"
)

PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_3_FIRST = (  # which has no add_generation_prompt
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    + _GENERATION
    + "{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_R1 = DEEPSEEK.replace(
    "m['content'] + '<｜end", "(m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content']) + '<｜end"
).replace("{{ '<｜Assistant｜>' }}{% endif %}", "{{ '<｜Assistant｜><think>\n' }}{% endif %}")
DEEPSEEK_CODER = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
    + _GENERATION
    + "{{ '### Response:' }}{% endif %}"
)
_DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = \"Knowledge Cutoff Date: April 2024.\nToday's Date: \" + strftime_now('%B %d, %Y') + '.' %}"
    "{%- set turns = messages %}{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- for m in turns %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
)

SMOLLM3 = (  # its {% generation %} holds the role header
    "{%- set ns = namespace(mode='/think', own='') -%}{%- if messages[0].role == 'system' -%}{%- set ns.own = messages[0].content -%}"
    "{%- if '/no_think' in ns.own -%}{%- set ns.mode = '/no_think' -%}{%- endif -%}{%- endif -%}"
    "{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n' -}}{%- set today = strftime_now('%d %B %Y') -%}"
    "{{- 'Today Date: ' ~ today ~ '\n' -}}{{- 'Reasoning Mode: ' + ns.mode + '\n\n<|im_end|>\n' -}}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{% generation %}{%- if ns.mode == '/think' -%}"
    "{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- else -%}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{%- if ns.mode == '/think' -%}{{ '<|im_start|>assistant\n' }}"
    "{%- else -%}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{%- endif -%}{%- endif -%}"
)

GPT_OSS = (
    "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{%- if 'thinking' in m %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_THINK = ("<think>", "</think>")

FAMILIES = {
    "chatml": Family(CHATML, _IM, "<|im_end|>", _CHATML_TURNS),
    # A base model whose tokenizer carries the template: EOS is another token.
    "chatml-base": Family(CHATML, _IM, "<|endoftext|>", _CHATML_TURNS),
    "chatml-without-generation-prompt": Family(CHATML.partition(_GENERATION)[0], _IM, "<|endoftext|>", _CHATML_TURNS),
    "llama-2": Family(
        LLAMA_2,
        ("<s>", "</s>"),
        "</s>",
        "<s>[INST] Hi [/INST][[ Hello </s>]]<s>[INST] Bye [/INST][[ See you </s>]]",
        bos="<s>",
    ),
    "llama-3": Family(LLAMA_3, _LLAMA_3_TOKENS, "<|end_of_text|>", "<|begin_of_text|>" + _LLAMA_3_TURNS, bos="<|begin_of_text|>"),
    "llama-3.2": Family(
        LLAMA_3_2,
        _LLAMA_3_TOKENS,
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 01 Mar 2026\n\n<|eot_id|>" + _LLAMA_3_TURNS,
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        "<s>[INST] Hi[/INST][[ Hello</s>]][INST] Bye[/INST][[ See you</s>]]",
        bos="<s>",
    ),
    "qwen2": Family(
        _chatml_with("You are a helpful assistant."),
        _IM,
        "<|im_end|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + _CHATML_TURNS,
    ),
    "qwen2.5": Family(
        _chatml_with("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        _IM,
        "<|im_end|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + _CHATML_TURNS,
    ),
    "qwen3": Family(QWEN_3, _IM, "<|im_end|>", _CHATML_TURNS.replace("[[See you", "<think>\n\n</think>\n\n[[See you"), added=_THINK),
    "qwen3-thinking": Family(
        QWEN_3_THINKING, _IM, "<|im_end|>", _CHATML_TURNS.replace("[[See you", "<think>\n\n</think>\n\n[[See you"), added=_THINK
    ),
    "gemma-2": Family(GEMMA_2, _GEMMA_TOKENS, "<eos>", "<bos>" + _GEMMA_TURNS, bos="<bos>"),
    "gemma-3": Family(GEMMA_3, _GEMMA_TOKENS, "<eos>", "<bos>" + _GEMMA_TURNS, bos="<bos>"),
    "phi-3": Family(
        PHI_3,
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        "<|user|>\nHi<|end|>\n<|assistant|>\n[[Hello<|end|>]]\n<|user|>\nBye<|end|>\n<|assistant|>\n[[See you<|end|>]]",
    ),
    "phi-3-first": Family(
        PHI_3_FIRST,
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<s><|user|>\nHi<|end|>\n<|assistant|>\n[[Hello<|end|>]]\n<|user|>\nBye<|end|>\n<|assistant|>\n[[See you<|end|>]]",
        bos="<s>",
    ),
    "phi-4": Family(
        PHI_4,
        (*_IM, "<|im_sep|>"),
        "<|endoftext|>",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>[[Hello<|im_end|>]]"
        "<|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>[[See you<|im_end|>]]",
    ),
    "deepseek": Family(
        DEEPSEEK,
        _DEEPSEEK_TOKENS,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>[[Hello<｜end▁of▁sentence｜>]]"
        "<｜User｜>Bye<｜Assistant｜>[[See you<｜end▁of▁sentence｜>]]",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(
        DEEPSEEK_R1,
        _DEEPSEEK_TOKENS,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>[[Hello<｜end▁of▁sentence｜>]]<｜User｜>Bye<｜Assistant｜>"
        "<think>\n\n</think>\n\n[[See you<｜end▁of▁sentence｜>]]",
        bos="<｜begin▁of▁sentence｜>",
        added=_THINK,
    ),
    "deepseek-coder": Family(
        DEEPSEEK_CODER,
        (*_DEEPSEEK_TOKENS[:2], "<|EOT|>"),
        "<|EOT|>",
        "<｜begin▁of▁sentence｜>### Instruction:\nHi\n### Response:[[\nHello\n<|EOT|>]]\n"
        "### Instruction:\nBye\n### Response:[[\nSee you\n<|EOT|>]]",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "granite": Family(
        GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday's Date: March 01, 2026.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>[[Hello<|end_of_text|>]]\n"
        "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>[[See you<|end_of_text|>]]",
    ),
    "smollm3": Family(
        SMOLLM3,
        _IM,
        "<|im_end|>",
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 01 March 2026\n"
        "Reasoning Mode: /think\n\n<|im_end|>\n" + _CHATML_TURNS,
        added=_THINK,
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|return|>",
        # A model ends its answer with <|return|>; the history alone says <|end|>.
        "<|start|>system<|message|>Current date: 2026-03-01<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant[[<|channel|>final<|message|>Hello]]<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant[[<|channel|>final<|message|>See you<|return|>]]",
    ),
}
