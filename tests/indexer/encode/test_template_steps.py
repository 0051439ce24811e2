"""A chat template that runs without end, or makes much of little, is refused; every other renders what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from ghoststore.corpus import Messages, Sample
from ghoststore.errors import CorpusError
from indexer.encode import template_steps
from indexer.encode.tokens import Tokenizer

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a dog"}]
ORDINARY = (
    "{% for message in messages %}{{ '=' * 4 ~ message.role }}\n{{ message['content'] | trim * 2 }}"
    "{% if loop.index0 % 2 == 0 %} {{ 2 ** 3 }}{% endif %}\n{% endfor %}"
)


@pytest.fixture
def tokenizer(lab: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(lab.checkpoint)


def chat(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    sample = Sample(0, "one", None, Messages([dict(message) for message in CHAT]), 0, 0)
    return Tokenizer(tokenizer)._chat(sample)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "loops over lists": "{% set l = [1] * 999 %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "repeats": "{{ 'a' * 10000000000 }}",
    "repeats a list": "{{ ([1] * 10000000000) | length }}",
    "repeats what it computes": "{% set n = 100000 * 100000 %}{{ 'a' * n }}",
    "powers": "{{ 10 ** 10000000000 }}",
    "powers of what it computes": "{% set n = 10 %}{{ n ** (n ** n) }}",
    "products": "{% set ns = namespace(n=3) %}{% for a in range(99999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "adds to itself": "{% set ns = namespace(s='a') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joins itself": "{% set ns = namespace(s='a') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "adds lists": "{% set ns = namespace(s=[1]) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a list in itself": "{% set ns = namespace(s=[1]) %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% endfor %}{{ ns.s }}",
    "the json of one": "{% set ns = namespace(s=[1]) %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% endfor %}{{ ns.s | tojson }}",
    "blocks": "{% set ns = namespace(s='a') %}{% for a in range(60) %}{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = b %}{% endfor %}",
    "macros of macros": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(s='a') %}"
    "{% for a in range(60) %}{% set ns.s = m(ns.s) %}{% endfor %}",
    "prints much": "{% set s = 'a' * 1000000 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "keeps much": "{% set ns = namespace(l=[], s='a' * 1000000) %}{% for a in range(9999) %}"
    "{% set ns.l = ns.l + [ns.s[1:]] %}{% endfor %}",
    "fills a constant": "{{ 'a' | center(10000000000) }}",
    "fills": "{% set n = 10000000000 %}{{ 'a'.ljust(n) }}",
    "indents": "{% set s = 'a\n' * 400000 %}{{ s | indent(400000) }}",
    "tabs": "{% set s = '\t' * 400000 %}{{ s.expandtabs(400000) }}",
    "replaces": "{% set s = 'a' * 400000 %}{{ s.replace('a', s) }}",
    "replaces by a filter": "{% set s = 'a' * 400000 %}{{ s | replace('a', s) }}",
    "joins": "{% set s = 'a' * 400000 %}{{ s.join(s) }}",
    "joins by a filter": "{% set s = 'a' * 400000 %}{{ s | list | join(s) }}",
    "formats": "{{ '%10000000000d' % 1 }}",
    "formats by a filter": "{{ '%*d' | format(2000000000, 1) }}",
    "formats by a method": "{{ '{:>10000000000}'.format(1) }}",
    "formats one again and again": "{% set s = '{0}' * 300000 %}{{ s.format(s) }}",
    "formats to a width that is given": "{{ '{:{}}'.format('a', 2000000000) }}",
    "fills a page": "{{ lipsum(n=100000000, html=false) }}",
    "batches": "{{ [1] | batch(10000000000, 'a') | list }}",
    "an index": "{{ messages[9].role.a.b }}",
    "zero": "{{ 1 // 0 }}",
}


@pytest.mark.thin(12)
@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_do_not_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(template_steps, "MOST_STEPS", 200_000)  # for time alone: no step of these takes long
    with pytest.raises(CorpusError, match="sample 'one': the chat template"):
        chat(tokenizer, ENDLESS[name])


def test_an_ordinary_template(tokenizer: Any) -> None:
    ours = chat(tokenizer, ORDINARY)
    assert ours == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ours.startswith("====user\nthe catthe cat 8====assistant\n")


VARIED = """{%- macro part(message, n=2) -%}<{{ message.role | upper }}|{{ caller() if caller else n }}>{%- endmacro -%}
{%- set ns = namespace(text='', all=[]) -%}
{%- for message in messages -%}
{%- set ns.text = ns.text + message.content[1:] ~ loop.index -%}
{%- set ns.all = ns.all + [message] -%}
{%- set block -%}{{ part(message) }}{% call part(message, n=3) %}x{% endcall %}{%- endset -%}
{{ block }}{{ message | tojson(indent=2) }}{{ message.content.replace('a', 'oo') | replace('o', 'u') | indent(4) }}
{{ "%s: %05.1f%%" % (message.role, 3.14159) }}{{ "{:>8}|{a}".format('x', a=message) }}{{ '%s' | format(1) }}
{%- filter title -%}a b{{ message.content.split(' ') | join(', ') }}{%- endfilter -%}
{%- endfor -%}
{{ ns.text }}{{ ns.all | map(attribute='role') | join('-') }}{{ ns.all | map('string') | list }}{{ 'a'.center(9) }}
{{ [3, 1] | sort | sum }}{{ messages }}{{ none }}{{ true }}{{ missing }}{{ messages[0].content | wordcount }}{{ 7 % 3 }}
{{ 1700000000 | tojson }}{{ '%d at 18005551234' % 1700000000 }}{{ '**{}**: 18005551234'.format(1700000000) }}
{{ dict(a=1) | items | list }}{{ ['a', 'b'] | batch(3, '-') | list }}{{ 'a,b'.split(',') + ['c'] }}{{ '-'.join(['x']) }}
"""


def test_a_varied_template(tokenizer: Any) -> None:
    """Whatever is counted is what it was."""
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template="{#- plain -#}" + VARIED)
    expected = plain.apply_chat_template(CHAT, tokenize=False)
    assert "<USER|2><USER|x>" in expected
    assert chat(tokenizer, VARIED) == expected


def test_one_that_was_compiled_without_us(tokenizer: Any) -> None:
    template = "{% set n = 100000 * 100000 %}{{ 'b' * n }}{{ messages | length }}"
    tokenizer.chat_template = template.replace("'b' * n", "'b' * 2")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "bb2"
    assert chat(tokenizer, tokenizer.chat_template) == "bb2"
    with pytest.raises(CorpusError, match="repeats something"):
        chat(tokenizer, template)


def test_long_conversations_fit(tokenizer: Any) -> None:
    tokenizer.chat_template = ORDINARY
    sample = Sample(0, "one", None, Messages([dict(CHAT[0]) for _ in range(5000)]), 0, 0)
    assert len(Tokenizer(tokenizer)._chat(sample)) > 5000


def test_the_template_is_named(lab: Any, tmp_path: Path) -> None:
    """As a command refuses it."""
    model = lab.model(tmp_path / "model", change=lambda m, t: setattr(t, "chat_template", ENDLESS["powers"]))
    data = lab.write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    outcome = lab.run("build", "--checkpoint", model, "--data", data, "--store", tmp_path / "store", "--quiet")
    assert outcome.code == 2, outcome.err
    assert "the chat template refuses" in outcome.err
