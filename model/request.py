"""What a caller asks for: ``Settings``, checked once, and the ``Request`` that they make of a prompt and a model.

Keywords in Python, the options of the command line and a network server all become a ``Settings``, so each setting has
one range and one error message.
"""

import math
import operator
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, NamedTuple

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, MAX_STOPS

from .drafters.protocol import Drafter
from .errors import KangarooError, TooLongError
from .number import is_number, is_whole, plain_number
from .sampling import Sampling
from .shaping import NO_SHAPING, Shaping
from .target.config import LlamaConfig
from .text import check_characters

MOST_LOGPROBS = 20
"""The most likely tokens whose log-probabilities a request may ask for; OpenAI's limit."""

MOST_BIAS = 1e30
"""Of a token's logit, either way: temperatures and penalties in use leave it a float32."""

AUTO = "auto"
"""The ``draft_confidence_threshold`` that finds itself."""

LED_BY_HOST = ("acceptance='rejection'", "min_p", "repetition_penalty", "logit_bias", "min_new_tokens", "logprobs")
"""What needs whole rows of logits: such a text is written by the loop that the host leads, also on a GPU."""


@dataclass(frozen=True)
class Settings:
    """Every setting of a text. Each is checked when the object is made.

    Attributes:
        max_new_tokens: how many tokens are written at most; fewer only where a stop or the context's end comes first.
        temperature: 0 is greedy; else 0.001 to 100.
        top_k: sample among this many tokens; None means all of them.
        top_p: sample within this share of the probability; None means all of it.
        min_p: sample among tokens at least this many times as likely as the likeliest, 0 to 1; None means all of them.
        seed: of the sampling noise; the same seed gives the same text, with Kangaroo and without. None draws one for
            every text, and ``Generation.seed`` says which.
        repetition_penalty: above 1 it makes tokens that the prompt or the new text holds less likely, below 1 more.
        logit_bias: what is added to the logits of tokens, by token id; from -1e30 to 1e30.
        num_speculative_tokens: the most drafts a step, 1 to 15; None takes the drafter's default.
        draft_confidence_threshold: drafting stops below it, 0 to 1. ``auto`` finds threshold and draft length while the
            text is written, by what steps take and how many drafts stand, and drafts nothing where that is faster;
            ``num_speculative_tokens`` then bounds the length. None takes the drafter's default: ``auto`` where its
            adapter was calibrated and neither number is given, on the loop that the host leads.
        acceptance: ``coupled`` (same tokens as plain sampling) or ``rejection`` (same distribution).
        stop: strings or token ids that end the text, besides the model's own end-of-text tokens.
        ignore_eos: write on behind the model's own end-of-text tokens; ``stop`` still ends the text.
        min_new_tokens: before this many tokens nothing ends the text: no stop token is chosen, and no stop string is
            looked for.
        timeout: seconds; the step that goes beyond it is the last one. Waiting for other texts counts.
        logprobs: give the log-probability of every new token and of this many likely ones, 0 to 20, by the model's own
            distribution (temperature 1, before every filter, bias and penalty).
        plain: decode without drafting.

    On a GPU ``min_p``, ``repetition_penalty``, ``logit_bias``, ``min_new_tokens``, ``logprobs`` and rejection sampling
    need whole rows of logits: the host then leads the loop, on the same kernels, which is slower.

    Raises:
        KangarooError: a setting out of its range.
    """

    max_new_tokens: int
    _: KW_ONLY
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = 0
    num_speculative_tokens: int | None = None
    draft_confidence_threshold: float | str | None = None
    acceptance: str = "coupled"
    stop: str | Sequence[str | int] = ()
    plain: bool = False
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    ignore_eos: bool = False
    min_new_tokens: int = 0
    timeout: float | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _ = self.sampling
        self._check_drafting()
        self._check_length()
        self._check_shaping()
        for entry in fields(self):
            object.__setattr__(self, entry.name, plain_number(getattr(self, entry.name)))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if isinstance(stop, bytes | Mapping) or not isinstance(stop, Iterable):
            raise KangarooError(f"stop is {self.stop!r}; it must be a list of strings and token ids.")
        object.__setattr__(self, "stop", tuple(stop))
        if "" in self.stop_strings:
            raise KangarooError("a stop string is empty; give at least one character.")

    def _check_drafting(self) -> None:
        drafts, threshold, most = self.num_speculative_tokens, self.draft_confidence_threshold, MAX_SPECULATIVE_TOKENS
        if drafts is not None and (not is_whole(drafts) or not 1 <= drafts <= most):
            raise KangarooError(f"num_speculative_tokens is {drafts!r}; it must be a whole number from 1 to {most}.")
        if threshold == AUTO:
            if self.sampling.rejects:
                raise KangarooError(
                    "draft_confidence_threshold is 'auto', which follows the clock, so acceptance='rejection' would "
                    "give other tokens every time; give a number from 0 to 1."
                )
        elif isinstance(threshold, str) or (
            threshold is not None and (not is_number(threshold) or not 0 <= threshold <= 1)
        ):
            raise KangarooError(
                f"draft_confidence_threshold is {threshold!r}; it must be a number from 0 to 1, or 'auto'."
            )

    def _check_length(self) -> None:
        most, least, timeout = self.max_new_tokens, self.min_new_tokens, self.timeout
        if not is_whole(most) or most < 1:
            raise KangarooError(f"max_new_tokens is {most!r}; it must be a whole number of at least 1.")
        if not is_whole(least) or not 0 <= least <= most:
            raise KangarooError(
                f"min_new_tokens is {least!r}; it must be a whole number from 0 to max_new_tokens, {most}."
            )
        if timeout is not None and (not is_number(timeout) or not timeout > 0):
            raise KangarooError(f"timeout is {timeout!r}; it must be a number of seconds above 0.")
        for name in ("ignore_eos", "plain"):
            if not isinstance(getattr(self, name), bool):
                raise KangarooError(f"{name} is {getattr(self, name)!r}; it must be True or False.")

    def _check_shaping(self) -> None:
        penalty, bias, logprobs = self.repetition_penalty, self.logit_bias, self.logprobs
        if not is_number(penalty) or not 0 < penalty < math.inf:
            raise KangarooError(f"repetition_penalty is {penalty!r}; it must be a finite number above 0.")
        if logprobs is not None and (not is_whole(logprobs) or not 0 <= logprobs <= MOST_LOGPROBS):
            raise KangarooError(f"logprobs is {logprobs!r}; it must be a whole number from 0 to {MOST_LOGPROBS}.")
        if bias is None:
            return
        if not isinstance(bias, Mapping):
            raise KangarooError(f"logit_bias is {bias!r}; it must be a mapping of token ids to numbers.")
        for token, value in bias.items():
            if not is_whole(token) or not is_number(value) or not abs(value) <= MOST_BIAS:
                raise KangarooError(
                    f"logit_bias has {token!r}: {value!r}; it must map token ids to numbers from {-MOST_BIAS:g} to "
                    f"{MOST_BIAS:g}."
                )
        plain = {int(token): float(value) for token, value in bias.items()}
        object.__setattr__(self, "logit_bias", plain)

    @classmethod
    def of(cls, settings: "Settings | None", keywords: Mapping[str, Any]) -> "Settings":
        """``settings`` as they are, or those that the keywords of a call name.

        Raises:
            KangarooError: a setting out of its range.
            TypeError: an unknown keyword, one that is missing, or both kinds at once.
        """
        if settings is not None and not isinstance(settings, cls):
            raise TypeError(f"the second positional argument is {settings!r}; give Settings, or keywords by name.")
        if settings is not None:
            if keywords:
                raise TypeError(f"got both Settings and the keyword {min(keywords)!r}; give one of them.")
            return settings
        if "prompt" in keywords:
            raise TypeError("the prompt is given by position, as in generate('Once', max_new_tokens=20).")
        if "max_new_tokens" not in keywords:
            raise TypeError("max_new_tokens is missing; say how many tokens to write at most.")
        unknown = keywords.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}; help(Settings) lists them all.")
        return cls(**keywords)

    @property
    def sampling(self) -> Sampling:
        """How tokens are picked."""
        seed = 0 if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, seed, self.acceptance, self.min_p)

    def with_seed(self) -> "Settings":
        """The same with a seed: a random one where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings among ``stop``."""
        return tuple(entry for entry in self.stop if isinstance(entry, str))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and its settings, resolved against a model: what the loops read.

    Attributes:
        tokens: of the prompt.
        length: how many tokens the text may reach, prompt included.
        limited_by_context: whether ``length`` is the model's limit and not the caller's.
        sampling: how tokens are picked.
        max_drafts: the most drafts a step; 0 decodes plainly.
        threshold: the confidence below which drafting stops.
        auto_drafts: where the loop led by the host finds both by itself, the most drafts that it may take; else 0.
        auto_on_device: whether the resident loop does so, too: only where the caller asked for it, since no card
            has measured yet what it gains there.
        stop_tokens: the caller's and the model's own.
        stop_strings: strings that end the text and are cut off it.
        shaping: what changes logits before a token is chosen.
        min_new_tokens: new tokens before which nothing ends the text.
        timeout: seconds after which no further step begins; None without an end.
        logprobs: how many likely tokens the log-probabilities name; None leaves them out.
    """

    tokens: tuple[int, ...]
    length: int
    limited_by_context: bool
    sampling: Sampling
    max_drafts: int
    threshold: float
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    shaping: Shaping = NO_SHAPING
    min_new_tokens: int = 0
    timeout: float | None = None
    logprobs: int | None = None
    auto_drafts: int = 0
    auto_on_device: bool = False

    @property
    def led_by_host(self) -> bool:
        """Whether tokens are picked from whole rows of logits, which only the loop led by the host does."""
        sampling = self.sampling
        return sampling.rejects or sampling.uses_min_p or not self.shaping.idle or self.logprobs is not None


def resolve(
    prompt: str | Sequence[int], settings: Settings, config: LlamaConfig, tokenizer: Any, drafter: Drafter | None
) -> Request:
    """Check a prompt and its settings against a model and its drafter.

    Raises:
        KangarooError: a prompt that is empty, too long or of unknown tokens; stops that this checkpoint cannot find; no
            drafter where drafting was asked for.
    """
    if drafter is None and not settings.plain:
        raise KangarooError("this Kangaroo has no drafter; make it with one, or decode with plain=True.")
    if settings.stop_strings and tokenizer is None:
        raise KangarooError("stop strings need a tokenizer, and this checkpoint has none; give token ids.")
    settings = settings.with_seed()
    stop_tokens = find_stops(settings, config, tokenizer)
    bias = settings.logit_bias or {}
    check_tokens(bias, config.vocab_size, "logit_bias's token")
    tokens = prompt_tokens(prompt, config, tokenizer)
    ends_from = len(tokens) + settings.min_new_tokens if settings.min_new_tokens else 0
    length = len(tokens) + settings.max_new_tokens
    limits = _Drafting(0, 0.0) if drafter is None or settings.plain else _drafting(settings, drafter)
    return Request(
        tokens=tuple(tokens),
        length=min(length, config.context_length),
        limited_by_context=length > config.context_length,
        sampling=settings.sampling,
        max_drafts=limits.max_drafts,
        threshold=limits.threshold,
        auto_drafts=limits.auto_drafts,
        auto_on_device=limits.auto_drafts > 0 and settings.draft_confidence_threshold == AUTO,
        stop_tokens=stop_tokens,
        stop_strings=settings.stop_strings,
        shaping=Shaping(bias, settings.repetition_penalty, stop_tokens, ends_from),
        min_new_tokens=settings.min_new_tokens,
        timeout=settings.timeout,
        logprobs=settings.logprobs,
    )


class _Drafting(NamedTuple):
    """What ``Request`` says of the drafts."""

    max_drafts: int
    threshold: float
    auto_drafts: int = 0


def _drafting(settings: Settings, drafter: Drafter) -> _Drafting:
    """The settings' own numbers before the drafter's, and ``auto`` where it is asked for or nothing speaks against."""
    drafts, threshold = settings.num_speculative_tokens, settings.draft_confidence_threshold
    fixed = drafts is not None or threshold is not None or settings.sampling.rejects
    auto = threshold == AUTO or (drafter.auto and not fixed)
    if threshold is None or threshold == AUTO:
        threshold = drafter.draft_confidence_threshold
    if auto and drafter.draft_tree:
        raise KangarooError(
            "draft_confidence_threshold is 'auto', which finds the length of chains, and this drafter drafts trees; "
            "give a number from 0 to 1."
        )
    own, most = drafter.num_speculative_tokens if drafts is None else drafts, drafts or MAX_SPECULATIVE_TOKENS
    if not drafter.draft_tree:  # a block has no more drafts than places
        own, most = drafter.rows(own), drafter.rows(most)
    return _Drafting(own, float(threshold), most if auto else 0)


def find_stops(settings: Settings, config: LlamaConfig, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the caller's, and the model's own from its files and its tokenizer.

    A tokenizer may know tokens for which the model has no row. They are never written, so they are left out.

    A stop string that is the text of an added token, such as ``<|im_end|>``, is that token: special tokens have no text
    in what is written, so the string would never be found there.

    Raises:
        KangarooError: an unknown token, or more of them than the kernels take.
    """
    tokens = [entry for entry in settings.stop if not isinstance(entry, str)]
    stops = set(check_tokens(tokens, config.vocab_size, "stop's token"))
    if not settings.ignore_eos:
        ends = [*config.eos_token_ids, getattr(tokenizer, "eos_token_id", None)]
        stops.update(end for end in ends if end is not None)
    if settings.stop_strings:
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
        stops.update(added[text] for text in settings.stop_strings if text in added)
    stops = {token for token in stops if 0 <= token < config.vocab_size}
    if len(stops) > MAX_STOPS:
        raise KangarooError(f"there are {len(stops)} stop tokens; give at most {MAX_STOPS}.")
    return frozenset(stops)


def prompt_tokens(prompt: str | Sequence[int], config: LlamaConfig, tokenizer: Any) -> list[int]:
    """The tokens of a text, or the tokens given, checked.

    Raises:
        KangarooError: as ``check_prompt``; a text without a tokenizer, an empty one, or one that is not valid Unicode.
    """
    if not isinstance(prompt, str):
        return check_prompt(prompt, config)
    if tokenizer is None:
        raise KangarooError("this checkpoint has no tokenizer; give the prompt as a list of tokens.")
    if not prompt:
        raise KangarooError("the prompt is empty; give at least one character.")
    check_characters(prompt, "the prompt")
    tokens = list(tokenizer(prompt)["input_ids"])
    begin = tokenizer.bos_token_id
    if begin is not None and tokens[:2] == [begin, begin]:  # the text, a rendered chat template say, had it already
        del tokens[0]
    return check_prompt(tokens, config)


def check_prompt(tokens: Sequence[int], config: LlamaConfig) -> list[int]:
    """The tokens of a prompt as a list of plain numbers.

    Raises:
        KangarooError: no tokens, unknown ones, or more than the context holds.
    """
    if isinstance(tokens, str):
        raise KangarooError("the prompt is a text, and only tokens can be taken here; encode it with the tokenizer.")
    if isinstance(tokens, bytes) or not isinstance(tokens, Iterable):
        raise KangarooError(f"the prompt is {tokens!r}; it must be a text or a list of tokens.")
    if isinstance(tokens, Mapping):
        raise KangarooError(f"the prompt is a mapping with {', '.join(map(repr, tokens))}; give its 'input_ids'.")
    shape = getattr(tokens, "shape", (0,))
    if len(shape) != 1:
        raise KangarooError(f"the prompt has the shape {list(shape)}; it must be one row of tokens, [T].")
    tokens = list(tokens)
    if tokens and all(isinstance(entry, Mapping) for entry in tokens):
        raise KangarooError("the prompt is a list of messages; give them as messages=, or to chat().")
    for kind, name in ((str, "texts"), (list | tuple, "rows of tokens")):
        if tokens and all(isinstance(entry, kind) for entry in tokens):
            raise KangarooError(f"the prompt is a list of {name}; give one text or one list of tokens.")
    checked = check_tokens(tokens, config.vocab_size, "the prompt's token")
    if not checked:
        raise KangarooError("the prompt is empty; give at least one token.")
    if len(checked) > config.context_length:
        raise TooLongError(f"the prompt has {len(checked)} tokens, the model's context holds {config.context_length}.")
    return checked


def check_tokens(tokens: Iterable[object], vocab_size: int, what: str) -> list[int]:
    """The tokens as a list of plain numbers; ``what`` says in an error whose they are.

    Raises:
        KangarooError: one that is not a whole number of the vocabulary.
    """
    checked = []
    for token in tokens:
        try:
            value = operator.index(token)  # type: ignore[arg-type]
        except TypeError:
            value = -1
        if not 0 <= value < vocab_size or isinstance(token, bool):
            raise KangarooError(f"{what} {token!r} is not a whole number from 0 to {vocab_size - 1}.")
        checked.append(value)
    return checked
