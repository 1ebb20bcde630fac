"""Fields that other servers know and this one does not do: refused where their value asks for something, for an answer
without them looks right and is another one. What only says who asks, or how to compute the same, is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)  # what programs send where they ask for nothing

_BOUND = "no answer is bound so here: give response_format with a JSON schema"
_OLDER = "the older names of tools are not read: give tools, and tool_choice"
_UNCALLED = "nothing is called where a text is gone on with: ask /v1/chat/completions"
_OPEN = "no message is gone on with here: render the prompt yourself, and send it to /v1/completions"
_RENDERED = "a prompt is rendered as the adapter was trained to read it: leave it out"
_CHOSEN = "tokens are not chosen so here: leave it out"
_WRITTEN = "answers are not written so here: leave it out"
_NAME = "it is not read by this name: give repetition_penalty"

_WORDS = {
    **dict.fromkeys(
        ("guided_json", "guided_choice", "guided_regex", "guided_grammar", "structured_outputs", "structural_tag",
         "grammar", "json_schema", "regex", "ebnf"), _BOUND),
    **dict.fromkeys(("functions", "function_call"), _OLDER),
    **dict.fromkeys(("continue_final_message", "add_generation_prompt"), _OPEN),
    **dict.fromkeys(("chat_template", "documents", "reasoning_effort"), _RENDERED),
    **dict.fromkeys(("repeat_penalty", "repetition_context_size"), _NAME),
    **dict.fromkeys(
        ("use_beam_search", "length_penalty", "min_tokens", "stop_token_ids", "bad_words", "allowed_token_ids",
         "logits_processors", "typical_p", "tfs_z", "top_a", "mirostat", "xtc_probability", "dry_multiplier"), _CHOSEN),
    **dict.fromkeys(
        ("include_stop_str_in_output", "skip_special_tokens", "detokenize", "return_token_ids",
         "return_tokens_as_token_ids"), _WRITTEN),
    "suffix": "nothing is written between two texts here: leave it out",
    "prompt_logprobs": "prompts are not scored here: leave it out",
    "truncate_prompt_tokens": "no prompt is cut here: shorten it yourself",
    "prompt_embeds": "only text and token ids are read here: leave it out",
    "modalities": 'only text is written here: leave it out, or say ["text"]',
    "web_search_options": "nothing is searched for here: leave it out",
}  # fmt: skip
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # where other values than the empty ones ask for nothing
    "function_call": (*EMPTY, "auto", "none"),
    "reasoning_effort": (*EMPTY, "none"),
    "modalities": (*EMPTY, ["text"]),
    **dict.fromkeys(("repeat_penalty", "length_penalty", "typical_p", "tfs_z"), (*EMPTY, 1)),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens", "detokenize"), (None, True)),
    **dict.fromkeys(("prompt_logprobs", "web_search_options"), (None,)),
}


def problems(body: Mapping[str, Any]) -> list[str]:
    """What a body asks for that is not done, each with what to do.

    body: of a request for an answer, or for the tokens of a conversation, as JSON gives it.
    """
    asked = {name: _given(body[name]) for name in _WORDS if name in body}
    found = [f"{name}: {_WORDS[name]}" for name, value in asked.items() if value not in _NEUTRAL.get(name, EMPTY)]
    best, wanted = body.get("best_of"), body.get("n") or 1
    if best not in EMPTY and best != wanted:
        found.append(f"best_of: {best} answers are not compared here: ask for so many with n, and choose")
    if body.get("top_logprobs") and not body.get("logprobs"):
        found.append("top_logprobs: there are none without logprobs: set logprobs to true")
    if body.get("prompt") and body.get("tools"):
        found.append(f"tools: {_UNCALLED}")
    if body.get("chat_template_kwargs") and not body.get("messages"):
        found.append("chat_template_kwargs: a prompt is read as it is, without a template: leave it out")
    if body.get("messages") and body.get("add_special_tokens"):
        found.append("add_special_tokens: the template writes those of a conversation: leave it out")
    return found


def _given(value: Any) -> Any:
    """A value without the parts of it that are null."""
    return {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else value
