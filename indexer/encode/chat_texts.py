"""The text that a tokenizer's chat template makes of a conversation, and where in it the completion begins."""

from __future__ import annotations

from typing import Any

from ghoststore.corpus import Messages, PromptCompletion, Sample
from ghoststore.errors import CorpusError
from indexer.encode.template_date import clock_at
from indexer.encode.template_steps import bounded


def chat_text(tokenizer: Any, sample: Sample, conversation: Messages, template_date: str | None, **options: Any) -> str:
    """The text that the chat template makes of ``conversation``, which is that of ``sample`` or a part of it.

    ``options`` go to the template. CorpusError, naming file and line of the sample, if there is no template, or if it
    refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CorpusError(
            f"{sample} is a list of messages, but the tokenizer has no chat template; set tokenizer.chat_template and "
            "save it, or give `fields.text`"
        )
    import jinja2

    tools = conversation.tools
    try:
        with bounded(tokenizer, tools), clock_at(tokenizer, template_date, tools):
            return str(
                tokenizer.apply_chat_template(conversation.messages, tokenize=False, **conversation.beside, **options)
            )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        has_system = any(message["role"] == "system" for message in conversation.messages)
        advice = (
            ". If it takes no system messages, put their text into the first message of the user"
            if has_system and "system" in str(error).lower()
            else ""
        )
        raise CorpusError(f"{sample}: the chat template refuses its messages: {error}{advice}") from error
    except (RecursionError, MemoryError) as error:
        raise CorpusError(f"{sample}: the chat template does not end: {error!r:.200}") from error


def prompted_text(
    tokenizer: Any, sample: Sample, conversation: Messages, template_date: str | None
) -> PromptCompletion:
    """The text of a conversation that begins with a prompt, cut where the completion begins.

    The prompt is what a model reads before it answers: the messages of the prompt with what the template writes before
    an answer (``add_generation_prompt``), as far as the whole conversation has the same. CorpusError if the template
    writes the prompt otherwise where the completion follows.
    """
    prompt = Messages(conversation.messages[: conversation.prompt], conversation.tools, conversation.documents)
    whole = chat_text(tokenizer, sample, conversation, template_date)
    answered = conversation.messages[conversation.prompt]["role"] == "assistant"
    asked = chat_text(tokenizer, sample, prompt, template_date, add_generation_prompt=True) if answered else ""
    if asked and whole.startswith(asked):
        return PromptCompletion(asked, whole[len(asked) :])
    plain = chat_text(tokenizer, sample, prompt, template_date)
    if not whole.startswith(plain):
        raise CorpusError(
            f"{sample}: the chat template writes the prompt otherwise where the completion follows, so that it cannot "
            "be said where that begins. Give the whole conversation as 'messages' (all of it is learnt), or prompt and "
            "completion as texts"
        )
    same = next((place for place, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), 0)
    end = max(len(plain), same)
    return PromptCompletion(whole[:end], whole[end:])
