"""Fields that other servers support and this one does not. A body comes in, messages about its fields go out.

Such a field is refused where its value asks for something, since the answer without it would look right and be another
one. Fields that only say who asks, or how to compute the same answer, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)  # values by which programs ask for nothing
SYSTEM = ("system", "developer")  # roles
NONE = -1  # what programs for other servers send for no number

_FORM = "not supported: give response_format with a JSON schema"
_NO_TOOLS = "completions call no tools: ask /v1/chat/completions"
_MEDIA = "only text is read and written: leave it out"
_FIELDS = {  # by the message about them
    _FORM: "structured_outputs structural_tag grammar json_schema regex ebnf format response_schema",
    "the older fields of tools are not read: give tools, and tool_choice": "functions function_call",
    "a message cannot be continued: render the prompt yourself, and send it to /v1/completions": """
        continue_final_message add_generation_prompt""",
    "a prompt is rendered as in the adapter's training: leave it out": """
        chat_template documents reasoning_effort verbosity template prompt_template raw safe_prompt tool_prompt""",
    "the field has another name here: give repetition_penalty": "repeat_penalty repetition_context_size",
    "the field has another name here: give stop": "stop_sequences stop_strings",
    "the field has another name here: give max_tokens": """
        n_predict num_predict max_new_tokens max_output_tokens max_tokens_to_sample max_length""",
    "the field has another name here: give seed": "random_seed sampling_seed",
    "the field has another name here: give n": "num_return_sequences candidate_count",
    "the field has another name here: give logprobs": "n_probs",
    "this way to choose tokens is not supported: leave it out": """
        use_beam_search num_beams length_penalty min_tokens min_new_tokens min_length stop_token_ids bad_words
        allowed_token_ids logits_processors custom_logit_processor vllm_xargs samplers typical_p tfs_z top_a
        top_n_sigma mirostat mirostat_mode xtc_probability dry_multiplier dynatemp_range dynamic_temperature
        smoothing_factor epsilon_cutoff eta_cutoff penalty_alpha no_repeat_ngram_size encoder_repetition_penalty
        guidance_scale negative_prompt""",
    "this form of answers is not supported: leave it out": """
        include_stop_str_in_output skip_special_tokens spaces_between_special_tokens detokenize return_token_ids
        return_tokens_as_token_ids return_token_strs return_hidden_states""",
    'settings of the template go into chat_template_kwargs: give {"enable_thinking": false} there': """
        enable_thinking think thinking reasoning thinking_budget thinking_budget_tokens thinking_token_budget
        reasoning_budget""",
    "the reasoning of an answer always comes in reasoning_content: leave the field out, and ignore that": """
        include_reasoning separate_reasoning stream_reasoning reasoning_format""",
    "its settings are not read: give them as fields of the request": """
        extra_body options parameters sampling_params""",
    "the field is not read: give a message of the role system": """
        system system_prompt system_instruction instructions""",
    "the server keeps no conversations: give all turns as messages": "context previous_response_id conversation",
    "an adapter is chosen by its name: give the name as model": """
        lora lora_path lora_request adapter adapters adapter_id""",
    _MEDIA: "modalities prompt_embeds multi_modal_data mm_processor_kwargs",
    "the server cannot search: leave it out": "web_search_options search_parameters enable_search plugins",
    "text between two texts cannot be written: leave it out": "suffix",
    "prompts are not repeated: leave it out": "echo",
    "prompts are not scored: leave it out": "prompt_logprobs",
    "prompts are not truncated: shorten it yourself": "truncate_prompt_tokens",
}
_MESSAGES = {name: message for message, names in _FIELDS.items() for name in names.split()}
MEDIA = re.compile("(input_)?(image|audio|video|file|attachment)s?(_urls?|_data|_ids?|_base64)?")
_PATTERNS = {  # messages about other fields, by a pattern of their names
    re.compile("guided_(?!decoding_backend$).*"): _FORM,
    MEDIA: _MEDIA,
}
_SWITCHES = """
add_generation_prompt skip_special_tokens spaces_between_special_tokens detokenize include_reasoning separate_reasoning
stream_reasoning
"""
_FACTORS = """
repeat_penalty length_penalty typical_p tfs_z num_beams encoder_repetition_penalty guidance_scale num_return_sequences
candidate_count
"""
_NUMBERS = """
n_predict num_predict max_new_tokens max_output_tokens max_tokens_to_sample max_length random_seed sampling_seed
thinking_budget thinking_budget_tokens thinking_token_budget reasoning_budget
"""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # values that ask for nothing, where they are not EMPTY
    "function_call": (*EMPTY, "auto", "none"),
    "reasoning_effort": (*EMPTY, "none"),
    "reasoning": (None, "", {}, {"effort": "none"}),
    "reasoning_format": (*EMPTY, "auto", "deepseek", "parsed"),
    "verbosity": (*EMPTY, "medium"),
    "modalities": (*EMPTY, ["text"]),
    "top_n_sigma": (*EMPTY, NONE),
    **dict.fromkeys(_FACTORS.split(), (*EMPTY, 1)),
    **dict.fromkeys(_SWITCHES.split(), (None, True)),
    **dict.fromkeys(_NUMBERS.split(), (None, NONE)),
    **dict.fromkeys(("enable_thinking", "think", "thinking"), (None, {})),
    "web_search_options": (None,),
    "prompt_logprobs": (None, False),
    "truncate_prompt_tokens": (*EMPTY, NONE),  # -1: as many as there is room for; a longer prompt is refused anyway
}


def problems(body: Mapping[str, Any]) -> list[str]:
    """Messages about the fields of a body that are not supported, each with what to do.

    Args:
        body: of a request for an answer, or for the tokens of a conversation, as parsed from JSON.
    """
    given = {name: _without_nulls(value) for name, value in body.items()}
    unsupported = [
        f"{name[:80]}: {message}"
        for name, message in {name: _message(name) for name in given}.items()
        if message and not _among(given[name], _NEUTRAL.get(name, EMPTY))
    ]
    best, count = body.get("best_of"), body.get("n") or 1
    if best not in EMPTY and best != count:
        unsupported.append(f"best_of: {best} answers are not compared: ask for as many with n, and choose")
    if body.get("top_logprobs") and not body.get("logprobs"):
        unsupported.append("top_logprobs: it needs logprobs: set logprobs to true")
    most, newer = body.get("max_tokens"), body.get("max_completion_tokens")
    if newer not in (None, NONE) and newer != most:
        if body.get("prompt"):
            unsupported.append("max_completion_tokens: it is not read together with a prompt: give max_tokens")
        elif most not in (None, NONE):
            unsupported.append("max_completion_tokens: it differs from max_tokens, its older name: give only one")
    if body.get("prompt") and body.get("messages"):
        unsupported.append("prompt: it is not read together with messages: leave one of the two out")
    if body.get("prompt") and body.get("tools"):
        unsupported.append(f"tools: {_NO_TOOLS}")
    if body.get("chat_template_kwargs") and not body.get("messages"):
        unsupported.append("chat_template_kwargs: a prompt is read without a template: leave it out")
    if body.get("no_system") is True:
        if not body.get("messages"):
            unsupported.append("no_system: a prompt is read without a template: leave it out")
        elif any(_is_system(message) for message in _listed(body["messages"])):
            unsupported.append("no_system: a message of the role system is given too: leave one of the two out")
    if body.get("messages") and body.get("add_special_tokens"):
        unsupported.append("add_special_tokens: the template adds those of a conversation: leave it out")
    return unsupported


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_system(message: Any) -> bool:
    """Whether a message is a system message with content; an empty one counts as absent."""
    content = message.get("content") if isinstance(message, Mapping) and message.get("role") in SYSTEM else None
    return bool(content.strip() if isinstance(content, str) else content)


def _message(name: str) -> str | None:
    """The message about a field; None for one that is supported or unknown."""
    return _MESSAGES.get(name) or next((text for pattern, text in _PATTERNS.items() if pattern.fullmatch(name)), None)


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of these. In Python false equals 0, and true 1."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def _without_nulls(value: Any) -> Any:
    return {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else value
