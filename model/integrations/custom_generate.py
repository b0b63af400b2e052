"""Our decoding in the place of transformers' ``generate``: what an exported ``custom_generate`` folder runs.

``model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)`` comes here, and so does every call of
``generate`` on a model that was loaded from such a folder with ``trust_remote_code=True``, as ``transformers serve``
does. The text is the one that this runtime writes; whatever would make it another one and is not known here is refused
by name.
"""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import load_backend
from ..drafters.adapter import Adapter
from ..drafters.make import make_drafter
from ..errors import KangarooError
from ..kangaroo import Kangaroo
from ..load import resolve_device, resolve_dtype
from ..request import Settings
from ..target.hub import find_folder
from ..target.llama import Llama
from ..target.weights import load_target
from .assistant import model_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

HONOURED = (
    *("max_new_tokens", "max_length", "max_time", "stop_strings", "eos_token_id"),
    *("do_sample", "temperature", "top_k", "top_p"),
)
"""Generation settings that do here what they do in transformers."""

WITHOUT_EFFECT = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind"),
    *("early_stopping", "length_penalty", "num_beam_groups"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config"),
)
"""Generation settings that cannot change the text that one prompt gets without beams."""

NEUTRAL = {
    "min_length": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}
"""Values, besides None and False, with which a setting does nothing; every other setting is refused."""

_LOADED: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, Kangaroo]]" = weakref.WeakKeyDictionary()


def generate(
    model: Any,
    adapter: str | Path,
    inputs: Tensor | None = None,
    generation_config: "GenerationConfig | None" = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> Tensor:
    """Continue one prompt: prompt and new tokens, ``[1, T]``, as transformers' ``generate`` returns them.

    The first call packs a copy of the model's weights, in the dtype that ``Kangaroo.from_pretrained`` would choose;
    later calls find it. Sampling takes its seed from PyTorch's generator, so ``torch.manual_seed`` repeats a text.

    Args:
        model: as transformers loaded it.
        adapter: the folder or hub name of its adapter.
        inputs: ``[1, T]`` tokens; or ``input_ids`` among the arguments.
        generation_config: the settings, which ``arguments`` may override.
        stopping_criteria: called after every token with all tokens and None for the scores, which are never computed.
        streamer: gets the prompt, each step's tokens ``[n]``, and its end.
        tokenizer: needed for ``stop_strings``.
        arguments: settings of ``GenerationConfig`` by name; an ``attention_mask`` of ones.

    Raises:
        KangarooError: more than one prompt, a setting or argument that is not honoured here, a model or adapter that
            does not load.
    """
    # its rule of precedence between arguments, settings and the model's defaults is transformers' own
    config, rest = model._prepare_generation_config(generation_config, **arguments)
    prompt = _prompt(rest.pop("input_ids", None) if inputs is None else inputs, rest.pop("attention_mask", None))
    _refuse(config.to_dict(), rest)
    defaults = (generation_config or model.generation_config, model.generation_config)
    asked = (arguments.get("max_length"), *(each.max_length for each in defaults))
    settings = _settings(config, prompt.shape[1], next((length for length in asked if length is not None), None))
    criteria = _criteria(config, stopping_criteria, tokenizer)
    writing = _kangaroo(model, adapter).progress(prompt[0].tolist(), settings)
    if streamer is not None:
        streamer.put(prompt.cpu())
    text, ended = prompt, False
    try:
        while not ended and (step := next(writing, None)) is not None:
            begun = text.shape[1]
            text = torch.cat((text, prompt.new_tensor([step.commit.tokens])), dim=1)
            for length in range(begun + 1, text.shape[1] + 1) if criteria else ():
                if ended := bool(criteria(text[:, :length], None).all()):
                    text = text[:, :length]
                    break
            if streamer is not None:
                streamer.put(text[0, begun:].cpu())
    finally:
        writing.close()
    if streamer is not None:
        streamer.end()
    return text


def _prompt(tokens: Tensor | None, mask: Tensor | None) -> Tensor:
    """The one prompt, ``[1, T]``."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[0] != 1:
        shape = list(tokens.shape) if isinstance(tokens, Tensor) else None
        raise KangarooError(f"Kangaroo decodes one prompt at a time: give input_ids of the shape [1, T], not {shape}.")
    if mask is not None and not bool((mask == 1).all()):
        raise KangarooError("the attention_mask has zeros; give one prompt without padding.")
    return tokens


def _refuse(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise for whatever would change the text and is not honoured."""
    for name, value in settings.items():
        if name in HONOURED or name in WITHOUT_EFFECT or value is None or value is False:
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            right = f"set it to {NEUTRAL[name]}" if name in NEUTRAL else "leave it out"
            raise KangarooError(f"the generation setting {name}={value!r} is not supported by Kangaroo; {right}.")
    for name, value in arguments.items():
        if value is not None and value is not False and not (isinstance(value, list) and not value):
            raise KangarooError(f"generate's argument {name!r} is not supported by Kangaroo; leave it out.")


def _settings(config: "GenerationConfig", prompt_length: int, max_length: int | None) -> Settings:
    """The same settings in this runtime's terms; ``max_length`` is the one that somebody asked for."""
    count = config.max_new_tokens
    if count is None:
        if max_length is None:
            raise KangarooError("neither max_new_tokens nor max_length was given; give one of them.")
        if max_length <= prompt_length:
            raise KangarooError(
                f"max_length is {max_length}, the prompt has {prompt_length} tokens; give max_new_tokens."
            )
        count = max_length - prompt_length
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not config.do_sample:
        return Settings(count, stop=ends)
    return Settings(
        count,
        temperature=config.temperature,
        top_k=config.top_k or None,  # transformers turns it off with 0
        top_p=config.top_p,
        seed=int(torch.randint(1 << 62, ())),
        stop=ends,
    )


def _criteria(config: "GenerationConfig", given: Any, tokenizer: Any) -> Any:
    """What may end the text besides its length and its end tokens: transformers' own ``StoppingCriteriaList``."""
    from transformers import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

    criteria = StoppingCriteriaList(given or ())
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise KangarooError("stop_strings need the tokenizer; give it to generate as tokenizer=.")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    return criteria


def _kangaroo(model: Any, adapter: str | Path) -> Kangaroo:
    """The model's weights and the adapter in this runtime; made once for every model."""
    loaded = _LOADED.setdefault(model, {})
    if str(adapter) not in loaded:
        config = replace(model_config(model), eos_token_ids=())  # generate's settings say what ends a text
        device = resolve_device(model.device)
        dtype = resolve_dtype(None, device, model.dtype)
        backend = load_backend(None, device, dtype)
        source = "the model"
        weights = load_target(model.state_dict().items(), config, device, dtype, backend.layout, source)
        target = Llama(config, weights, backend)
        trained = Adapter.load(find_folder(adapter, "adapter"), target)
        loaded[str(adapter)] = Kangaroo(target, make_drafter(target, trained, trained.config.way))
    return loaded[str(adapter)]
