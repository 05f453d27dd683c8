"""The templates that come with this package.

Sources: Alpaca (Taori et al., 2023), ChatML (OpenAI, 2023), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783).
"""

from megatron.bridge.data.instruction.templates.base import PromptTemplate

# The task alone, or with the material that it is about; further turns repeat the headings.
ALPACA = PromptTemplate(
    name="alpaca",
    special_tokens=("eos_token",),
    jinja="""
{{- begin -}}
{%- set shown = messages | selectattr('input', 'defined') | list -%}
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content + '\n\n' -}}
{%- elif shown -%}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
    {{- 'Write a response that appropriately completes the request.\n\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.\n\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' and message.input is defined -%}
        {{- '### Instruction:\n' + message.instruction + '\n\n### Input:\n' + message.input + '\n\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '### Instruction:\n' + message.content + '\n\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:\n' -}}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
        {{- '' if loop.last else '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
""",
)

CHATML = PromptTemplate(
    name="chatml",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    jinja="""
{{- begin -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""",
)

# The system prompt stands within the first question; every exchange begins and ends by itself.
LLAMA2 = PromptTemplate(
    name="llama2",
    special_tokens=("bos_token", "eos_token"),
    jinja="""
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message.content | trim + ' ' + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
""",
)

LLAMA3 = PromptTemplate(
    name="llama3",
    special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    jinja="""
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
""",
)

# No mark-up: texts as they are, whatever special tokens stand in them, and the end token behind each answer.
PLAIN = PromptTemplate(
    name="plain",
    special_tokens=("eos_token",),
    control_tokens=True,
    jinja="""
{{- begin -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
""",
)
