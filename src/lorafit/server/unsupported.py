"""Fields that other servers know and this one does not do: refused where their value asks for something, for an answer
without them looks right and is another one. What only says who asks, or how to compute the same, is passed over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)  # what programs send where they ask for nothing
NONE = -1  # what other servers' programs send for no number at all

_BOUND = "no answer is bound so here: give response_format with a JSON schema"
_OLDER = "the older names of tools are not read: give tools, and tool_choice"
_UNCALLED = "nothing is called where a text is gone on with: ask /v1/chat/completions"
_OPEN = "no message is gone on with here: render the prompt yourself, and send it to /v1/completions"
_RENDERED = "a prompt is rendered as the adapter was trained to read it: leave it out"
_CHOSEN = "tokens are not chosen so here: leave it out"
_WRITTEN = "answers are not written so here: leave it out"
_THOUGHT = 'settings of the template are read in one place: give chat_template_kwargs, as {"enable_thinking": false}'
_APART = "the reasoning of an answer stands apart, in reasoning_content: leave the field out, and pass that over"
_BAG = "what it holds is not read there: give its settings as fields of the request"
_SYSTEM = "it is not read by this name: give a message of the role system"
_TURNS = "no conversation is kept here: give all its turns as messages"
_ADAPTER = "an adapter is not asked for so: give its name as model"
_SEEN = "only text is read and written here: leave it out"
_SEARCHED = "nothing is searched for here: leave it out"


def _named(name: str) -> str:
    return f"it is not read by this name: give {name}"


_WORDS = {
    **dict.fromkeys(
        (
            "structured_outputs",
            "structural_tag",
            "grammar",
            "json_schema",
            "regex",
            "ebnf",
            "format",
            "response_schema",
        ),
        _BOUND,
    ),
    **dict.fromkeys(("functions", "function_call"), _OLDER),
    **dict.fromkeys(("continue_final_message", "add_generation_prompt"), _OPEN),
    **dict.fromkeys(
        (
            "chat_template",
            "documents",
            "reasoning_effort",
            "verbosity",
            "template",
            "prompt_template",
            "raw",
            "safe_prompt",
            "tool_prompt",
        ),
        _RENDERED,
    ),
    **dict.fromkeys(("repeat_penalty", "repetition_context_size"), _named("repetition_penalty")),
    **dict.fromkeys(("stop_sequences", "stop_strings"), _named("stop")),
    **dict.fromkeys(
        ("n_predict", "num_predict", "max_new_tokens", "max_output_tokens", "max_tokens_to_sample", "max_length"),
        _named("max_tokens"),
    ),
    **dict.fromkeys(("random_seed", "sampling_seed"), _named("seed")),
    **dict.fromkeys(("num_return_sequences", "candidate_count"), _named("n")),
    "n_probs": _named("logprobs"),
    **dict.fromkeys(
        (
            "use_beam_search",
            "num_beams",
            "length_penalty",
            "min_tokens",
            "min_new_tokens",
            "min_length",
            "stop_token_ids",
            "bad_words",
            "allowed_token_ids",
            "logits_processors",
            "custom_logit_processor",
            "vllm_xargs",
            "samplers",
            "typical_p",
            "tfs_z",
            "top_a",
            "top_n_sigma",
            "mirostat",
            "mirostat_mode",
            "xtc_probability",
            "dry_multiplier",
            "dynatemp_range",
            "dynamic_temperature",
            "smoothing_factor",
            "epsilon_cutoff",
            "eta_cutoff",
            "penalty_alpha",
            "no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "guidance_scale",
            "negative_prompt",
        ),
        _CHOSEN,
    ),
    **dict.fromkeys(
        (
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "return_token_strs",
            "return_hidden_states",
        ),
        _WRITTEN,
    ),
    **dict.fromkeys(
        (
            "enable_thinking",
            "think",
            "thinking",
            "reasoning",
            "thinking_budget",
            "thinking_budget_tokens",
            "thinking_token_budget",
            "reasoning_budget",
        ),
        _THOUGHT,
    ),
    **dict.fromkeys(("include_reasoning", "separate_reasoning", "stream_reasoning", "reasoning_format"), _APART),
    **dict.fromkeys(("extra_body", "options", "parameters", "sampling_params"), _BAG),
    **dict.fromkeys(("system", "system_prompt", "system_instruction", "instructions"), _SYSTEM),
    **dict.fromkeys(("context", "previous_response_id", "conversation"), _TURNS),
    **dict.fromkeys(("lora", "lora_path", "lora_request", "adapter", "adapters", "adapter_id"), _ADAPTER),
    **dict.fromkeys(("modalities", "prompt_embeds", "multi_modal_data", "mm_processor_kwargs"), _SEEN),
    **dict.fromkeys(("web_search_options", "search_parameters", "enable_search", "plugins"), _SEARCHED),
    "suffix": "nothing is written between two texts here: leave it out",
    "echo": "prompts are not repeated here: leave it out",
    "prompt_logprobs": "prompts are not scored here: leave it out",
    "truncate_prompt_tokens": "no prompt is cut here: shorten it yourself",
}
MEDIA = re.compile("(input_)?(image|audio|video|file|attachment)s?(_urls?|_data|_ids?|_base64)?")
_LIKE = {  # words for whatever is called like this, and is not among those
    re.compile("guided_(?!decoding_backend$).*"): _BOUND,
    MEDIA: _SEEN,
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # where other values than the empty ones ask for nothing
    "function_call": (*EMPTY, "auto", "none"),
    "reasoning_effort": (*EMPTY, "none"),
    "reasoning": (None, "", {}, {"effort": "none"}),
    "reasoning_format": (*EMPTY, "auto", "deepseek", "parsed"),
    "verbosity": (*EMPTY, "medium"),
    "modalities": (*EMPTY, ["text"]),
    "top_n_sigma": (*EMPTY, NONE),
    **dict.fromkeys(
        (
            "repeat_penalty",
            "length_penalty",
            "typical_p",
            "tfs_z",
            "num_beams",
            "encoder_repetition_penalty",
            "guidance_scale",
            "num_return_sequences",
            "candidate_count",
        ),
        (*EMPTY, 1),
    ),
    **dict.fromkeys(
        (
            "add_generation_prompt",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
            "include_reasoning",
            "separate_reasoning",
            "stream_reasoning",
        ),
        (None, True),
    ),
    **dict.fromkeys(
        (
            "n_predict",
            "num_predict",
            "max_new_tokens",
            "max_output_tokens",
            "max_tokens_to_sample",
            "max_length",
            "random_seed",
            "sampling_seed",
            "thinking_budget",
            "thinking_budget_tokens",
            "thinking_token_budget",
            "reasoning_budget",
        ),
        (None, NONE),
    ),
    **dict.fromkeys(("enable_thinking", "think", "thinking"), (None, {})),
    "web_search_options": (None,),
    "prompt_logprobs": (None, False),
    "truncate_prompt_tokens": (*EMPTY, NONE),  # as much of it as there is room for; what has none is refused
}


def problems(body: Mapping[str, Any]) -> list[str]:
    """What a body asks for that is not done, each with what to do.

    body: of a request for an answer, or for the tokens of a conversation, as JSON gives it.
    """
    asked = {name: _given(value) for name, value in body.items()}
    found = [
        f"{name[:80]}: {words}"
        for name, words in {name: _words_for(name) for name in asked}.items()
        if words and not _among(asked[name], _NEUTRAL.get(name, EMPTY))
    ]
    best, wanted = body.get("best_of"), body.get("n") or 1
    if best not in EMPTY and best != wanted:
        found.append(f"best_of: {best} answers are not compared here: ask for so many with n, and choose")
    if body.get("top_logprobs") and not body.get("logprobs"):
        found.append("top_logprobs: there are none without logprobs: set logprobs to true")
    most, newer = body.get("max_tokens"), body.get("max_completion_tokens")
    if newer not in (None, NONE) and newer != most:
        if body.get("prompt"):
            found.append("max_completion_tokens: it is not read beside a prompt: give max_tokens")
        elif most not in (None, NONE):
            found.append("max_completion_tokens: another number than max_tokens, its older name: give one of them")
    if body.get("prompt") and body.get("messages"):
        found.append("prompt: it is not read beside messages: leave one of the two out")
    if body.get("prompt") and body.get("tools"):
        found.append(f"tools: {_UNCALLED}")
    if body.get("chat_template_kwargs") and not body.get("messages"):
        found.append("chat_template_kwargs: a prompt is read as it is, without a template: leave it out")
    if body.get("messages") and body.get("add_special_tokens"):
        found.append("add_special_tokens: the template writes those of a conversation: leave it out")
    return found


def _words_for(name: str) -> str | None:
    """What to say of a field by its name; None for one that is done here, or not known."""
    return _WORDS.get(name) or next((words for like, words in _LIKE.items() if like.fullmatch(name)), None)


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of these. To Python false is 0 and true is 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _given(value: Any) -> Any:
    """A value without the parts of it that are null."""
    return {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else value
