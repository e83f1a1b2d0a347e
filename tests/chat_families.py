"""Small tokenizers with chat templates of twelve shapes, as families of models have them."""

from dataclasses import dataclass

from coterie.models.load import make_byte_tokenizer


@dataclass(frozen=True)
class Family:
    """template: its text. special, plain: the tokens it writes, as special ones and as ordinary added ones. end: what ends a turn.
    stated: further end tokens that the model's files name. refuses: what the template can't render."""

    template: str | None
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<eos>"
    end: str = "<eos>"
    stated: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()

    def tokenizer(self):
        tokenizer = make_byte_tokenizer()
        tokenizer.add_tokens([*self.special, self.eos, self.end, *self.stated], special_tokens=True)
        tokenizer.add_tokens(list(self.plain))
        tokenizer.eos_token = self.eos
        if self.bos:
            tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.template
        return tokenizer


_CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

_LLAMA3 = """{{ bos_token }}{% set day = strftime_now("%d %b %Y") %}
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.role == 'system' %}Today is {{ day }}. {% endif %}{{ message.content | trim }}<|eot_id|>
{%- endfor -%}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_GEMMA = """{{ bos_token }}{% for message in messages -%}
{% if message.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

_MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}
{%- else %}[INST] {{ message.content }} [/INST]
{%- endif %}{% endfor %}"""

_QWEN3 = """{% set ns = namespace(asked=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}
{%- set thought = message.reasoning_content or '' %}{% set said = message.content %}
{%- if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}{% endif %}
{%- if loop.index0 > ns.asked %}<think>
{{ thought.strip() }}
</think>

{% endif %}{{ said.strip() }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

_DEEPSEEK = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}<|User|>{{ message.content }}
{%- else %}<|Assistant|>{{ message.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""

_PHI = """{% for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

_GLM = """[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

_GPT_OSS = """<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}. Effort: {{ reasoning_effort or 'medium' }}<|end|>
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

_COMMAND = """{{ bos_token }}{% for message in messages -%}
<|START_OF_TURN|>
{%- if message.role == 'assistant' %}<|CHATBOT|><|START_RESPONSE|>{{ message.content.strip() }}<|END_RESPONSE|>
{%- else %}<|{{ message.role | upper }}|>{{ message.content.strip() }}{% endif %}<|END_OF_TURN|>
{%- endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN|><|CHATBOT|>{% endif %}"""

_GRANITE = """{% if messages[0].role != 'system' -%}
<|start_of_role|>system<|end_of_role|>Today is {{ strftime_now('%B %d, %Y') }}.<|end_of_text|>
{% endif %}
{%- for message in messages -%}
<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}<|end_of_text|>
{% endfor %}
{%- if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""

FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_start|>",), end="<|im_end|>"),
    "llama3": Family(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<bos>"), bos="<bos>", end="<|eot_id|>"),
    "gemma": Family(_GEMMA, ("<start_of_turn>", "<bos>"), bos="<bos>", end="<end_of_turn>", refuses=("system",)),
    "mistral": Family(_MISTRAL, ("[INST]", "[/INST]", "<s>"), bos="<s>", eos="</s>", end="</s>"),
    "qwen3": Family(_QWEN3, ("<|im_start|>",), ("<think>", "</think>"), end="<|im_end|>", stated=("<|im_end|>", "<eos>")),
    "deepseek_r1": Family(_DEEPSEEK, ("<|User|>", "<|Assistant|>", "<s>"), ("<think>", "</think>"), bos="<s>"),
    "phi": Family(_PHI, ("<|system|>", "<|user|>", "<|assistant|>"), end="<|end|>"),
    "glm": Family(_GLM, ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"), end="<|user|>", stated=("<|observation|>",)),
    "gpt_oss": Family(
        _GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"), end="<|return|>", stated=("<|call|>",)
    ),
    "command": Family(
        _COMMAND, ("<|START_OF_TURN|>", "<|CHATBOT|>", "<|USER|>", "<|SYSTEM|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<BOS>"),
        bos="<BOS>", end="<|END_OF_TURN|>", eos="<|END_OF_TURN|>",
    ),
    "granite": Family(_GRANITE, ("<|start_of_role|>", "<|end_of_role|>"), eos="<|end_of_text|>", end="<|end_of_text|>"),
    "none": Family(None, ("<s>",), bos="<s>"),
}  # fmt: skip
CHATS = [name for name, family in FAMILIES.items() if family.template]
