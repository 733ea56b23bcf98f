"""Chat templates rendered without a tokenizer, and prompts through one, against transformers: shapes of templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_opd.data.chat_template import chat_template, render
from prune_opd.data.render import prompt_text
from tests.data.test_prompt_files import of_file

ASK = {"role": "user", "content": '  What is <1> & "2"?\nSay — é.  '}
TURNS: dict[str, list[dict[str, str]]] = {
    "one turn": [ASK],
    "with a system turn": [{"role": "system", "content": "Be brief."}, ASK],
    "several rounds": [ASK, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Sure?"}],
}
# In the manner of published families; written for this test.
TEMPLATES = {
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "a system turn of its own": "{% if messages[0].role != 'system' %}<s>You help.</s>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}\n{% endfor %}",
    "headers, trimmed contents": "{{ bos_token }}{% for m in messages %}<h>{{ m['role'] }}</h>\n\n"
    "{{ m['content'] | trim }}"
    "<eot>{% endfor %}{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}",
    "INST with a namespace": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "other names for roles": "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<turn>{{ role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "blocks on lines of their own": "{%- for m in messages %}\n    {%- if loop.first %}\n<first>\n    {%- endif %}\n"
    "    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}\n<a>\n{% endif %}\n",
    "a switch for thinking": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>{% endif %}{% endif %}",
    "thinking begun": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}",
    "a macro": "{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m | tojson }}\n{{ m | tojson(indent=2) }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}:"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "marks of what is generated": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    "reversed, with filters": "{{ messages[::-1] | map(attribute='content') | join('~') | upper | replace('?', '!') }}",
    "what is not there": "{{ tools }}{{ nothing }}{{ pad_token }}"
    "{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}",
    "no system turns": "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ messages[-1].content }}",
}


@pytest.fixture(params=TEMPLATES)
def model(request: pytest.FixtureRequest, byte_tokenizer: Any, tmp_path: Path) -> Path:
    byte_tokenizer.chat_template = TEMPLATES[request.param]
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    byte_tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("turns", TURNS.values(), ids=list(TURNS))
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=["plain", "thinking off"])
def test_every_template_gives_the_text_of_transformers(
    model: Path, turns: list[dict[str, str]], options: dict[str, bool]
) -> None:
    from transformers import AutoTokenizer

    tokenizer, template = AutoTokenizer.from_pretrained(model), chat_template(model)
    assert template == tokenizer.chat_template
    try:
        wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except Exception as refusal:
        assert "no system turns" in str(refusal)
        wanted = None
    assert render(model, template, turns, add_generation_prompt=True, **options) == wanted
    if wanted is not None and not options:
        assert prompt_text({"messages": turns}, of_file(), tokenizer) == wanted
