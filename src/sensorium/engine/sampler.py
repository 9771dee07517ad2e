"""Logits -> token ids, for all rows of a step at once.

Order of operations: bias and forbidden tokens, penalties, a transcript's rules, temperature, min_p, top_k, top_p. What
a seeded request gets depends on its seed, its own logits and the index of the token only: a row is filtered by value,
never by rank, and takes one number of a counter-based stream, so neither batch mates nor preemption change it. Logprobs
are those of the raw logits, of transcripts of what the rules leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium import kernels
from sensorium.engine import speech_rules
from sensorium.engine.masks import Held, Masks
from sensorium.engine.sequence import Sequence
from sensorium.types import SamplingParams, TokenLogprob

LIKELY = -8.0  # scaled logits above this usually hold any nucleus (weights above 1/3000 of the highest)
GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow
CHUNK = 128  # vocabulary entries that are summed together before one of the sums is chosen

_is_plain = attrgetter("plain")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


@dataclass(slots=True)
class Sampled:
    """Result of a step, by row. A row in `failed` had logits that are not numbers; its token means nothing."""

    token_ids: list[int]
    failed: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


class TokenCounts:
    """Which tokens a sequence has seen and how often it has said them, for penalties."""

    __slots__ = ("_num_seen", "_places", "_said", "counts", "ids", "size")

    def __init__(self, prompt: NDArray[np.int32], vocab_size: int) -> None:
        """Placeholders of media may lie outside the vocabulary; they have no logit."""
        seen = np.unique(prompt[prompt < vocab_size])
        self.size = self._num_seen = len(seen)
        self.ids = np.empty(len(seen) + 256, np.int64)
        self.ids[: self.size] = seen
        self.counts = np.zeros(len(self.ids), np.float32)  # in the output
        self._places = {int(token): place for place, token in enumerate(seen)}
        self._said: list[int] = []  # what was counted

    def update(self, outputs: NDArray[np.int32]) -> None:
        """`outputs` is the whole output so far; what was counted before is not counted again."""
        news: list[int] = outputs[len(self._said) :].tolist()
        for token in news:
            place = self._places.setdefault(token, self.size)
            if place == self.size:
                if place == len(self.ids):
                    self.ids = np.concatenate((self.ids, np.empty_like(self.ids)))
                    self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
                self.ids[place] = token
                self.size += 1
            self.counts[place] += 1
        self._said += news

    def take_back(self, count: int) -> None:
        """Only the first `count` tokens of the output were said."""
        while len(self._said) > count:
            token = self._said.pop()
            place = self._places[token]
            self.counts[place] -= 1
            if not self.counts[place] and place >= self._num_seen:  # the last that came is the first that goes
                self.size -= 1
                del self._places[token]


class SamplerState:
    """What the sampler knows of one sequence."""

    __slots__ = (
        "_allowed",
        "bad_words",
        "bias_ids",
        "bias_values",
        "counts",
        "greedy",
        "others",
        "params",
        "plain",
        "seed",
        "stop_ids",
    )

    def __init__(self, seq: Sequence, params: SamplingParams, engine_seed: int, vocab_size: int) -> None:
        self.params = params
        biases = [(token, bias) for token, bias in params.logit_bias if 0 <= token < vocab_size]
        biases += [(word[0], -math.inf) for word in params.bad_words if len(word) == 1]
        self.greedy = params.temperature < GREEDY_BELOW or params.top_k == 1
        self.stop_ids = np.array([token for token in sorted(seq.stop_ids) if 0 <= token < vocab_size], np.int64)
        self.bias_ids = np.array([token for token, _ in biases], np.int64)
        self.bias_values = np.array([bias for _, bias in biases], np.float32)
        self.bad_words: dict[int, list[tuple[int, ...]]] = {}  # those of several tokens, by the last but one
        for word in params.bad_words:
            if len(word) > 1:
                self.bad_words.setdefault(word[-2], []).append(word)
        self.others: Tensor | None = None  # [vocab], the tokens that are not allowed
        if params.allowed_token_ids:
            self.others = torch.ones(vocab_size, dtype=torch.bool)
            self.others[list(params.allowed_token_ids)] = False
        self._allowed = set(params.allowed_token_ids) - {word[0] for word in params.bad_words if len(word) == 1}
        penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        self.counts: TokenCounts | None = None
        if penalised:
            prompt = seq.tokens[: seq.num_prompt]
            self.counts = TokenCounts(prompt if params.repetition_penalty != 1 else prompt[:0], vocab_size)
        self.plain = self.greedy and not (  # its token is that of the highest logit, and there is nothing else to do
            penalised
            or seq.constraint
            or params.logit_bias
            or params.min_tokens
            or params.logprobs is not None
            or params.allowed_token_ids
            or params.bad_words
            or params.rules
        )
        self.seed = _seed(params.seed, engine_seed, seq.id)

    def ends_of_bad_words(self, seq: Sequence, gained: list[int]) -> list[int]:
        """Last tokens of the words whose other tokens the output ends with. None of them where a request leaves only
        such tokens: it goes on with what it allows."""
        last = gained[-1] if gained else int(seq.tokens[seq.num_tokens - 1])
        if last not in self.bad_words:
            return []
        longest = max(map(len, self.bad_words[last])) - 1
        start = max(seq.num_prompt, seq.num_tokens + len(gained) - longest)
        said = (*seq.tokens[start : seq.num_tokens].tolist(), *gained)
        ends = {word[-1] for word in self.bad_words[last] if said[-len(word) + 1 :] == word[:-1]}
        if self.others is not None:
            is_short = seq.num_outputs + len(gained) < self.params.min_tokens
            if ends.issuperset(self._allowed.difference(self.stop_ids.tolist() if is_short else ())):
                return []
        return sorted(ends)


class Sampler:
    def __init__(self, seed: int = 0, masks: Masks | None = None) -> None:
        """`masks` are of sequences that have a grammar."""
        self._seed = seed
        self._masks = masks

    def sample(self, logits: Tensor, sequences: Seq[Sequence], ahead: Seq[list[int]] = ()) -> Sampled:
        """logits [rows, vocab], one row for each sequence; `ahead`: tokens that each has gained and not yet has.

        Rows of sequences with a grammar may be written to.
        """
        states = [seq.sampler_state or self._remember(seq, logits.shape[1]) for seq in sequences]
        logits = logits.float()
        if all(map(_is_plain, states)):
            return _checked(*_argmax(logits))
        held = _held(sequences, ahead)
        edited = _edited(logits, states, sequences, ahead)
        if held and self._masks is not None:
            if edited is logits and any(states[row].params.logprobs is not None for row, *_ in held):
                edited = logits.clone()
            self._masks.apply(edited, logits, held)
        token_ids, highest = _argmax(edited)
        random = [i for i, state in enumerate(states) if not state.greedy]
        if random:
            usable = edited if len(random) == len(states) else edited[random]
            indices = [sequences[i].num_outputs + (len(ahead[i]) if ahead else 0) for i in random]
            drawn = _draw(usable, [states[i] for i in random], indices)
            token_ids[random] = drawn
            highest[random] = np.where((drawn >= 0) & (drawn < logits.shape[1]), highest[random], np.nan)
        sampled = _checked(token_ids, highest)
        for row, constraint, _, index in held:
            if row not in sampled.failed and not constraint.take(index, sampled.token_ids[row]):
                sampled.failed.append(row)
        wanted = [i for i, state in enumerate(states) if state.params.logprobs is not None and i not in sampled.failed]
        if wanted:
            ids = [sampled.token_ids[i] for i in wanted]
            params = [states[i].params for i in wanted]
            also = [one.logprob_token_ids for one in params]
            rows = torch.stack([edited[i] if states[i].params.rules else logits[i] for i in wanted])
            found = logprobs(rows, ids, [one.logprobs or 0 for one in params], also)
            sampled.logprobs = dict(zip(wanted, found, strict=True))
        return sampled

    def _remember(self, seq: Sequence, vocab_size: int) -> SamplerState:
        if seq.sampling is None:
            raise ValueError("a pooling request is not sampled")
        state = SamplerState(seq, seq.sampling, self._seed, vocab_size)
        seq.sampler_state = state
        return state


def logprobs(
    logits: Tensor, token_ids: list[int], num_top: list[int], also: Seq[tuple[int, ...]] = ()
) -> list[TokenLogprob]:
    """Log-probabilities of `token_ids` under float32 logits [rows, vocab], and the `num_top[i]` likeliest of row i,
    followed by the tokens `also[i]` that are not among them."""
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(1, torch.tensor(token_ids, device=scores.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(num_top), scores.shape[1])
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if most:
        values, ids = (found.tolist() for found in scores.topk(most, dim=-1))
        tops = [
            tuple(zip(row_ids[:count], row[:count], strict=True))
            for row_ids, row, count in zip(ids, values, num_top, strict=True)
        ]
    for row, wanted in enumerate(also):
        have = {token for token, _ in tops[row]}
        more = [token for token in wanted if token not in have]
        tops[row] += tuple(zip(more, scores[row, more].tolist(), strict=True))
    return [TokenLogprob(*one) for one in zip(token_ids, chosen, tops, strict=True)]


def _argmax(logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(first index of the highest value, that value) of each row; a row with a NaN gives NaN."""
    if logits.device.type == "cpu":  # numpy's is ten times as fast as torch's
        array = logits.numpy()
        token_ids = array.argmax(axis=1)
        return token_ids, array[np.arange(len(array)), token_ids]
    highest, ids = logits.max(dim=-1)
    return ids.cpu().numpy(), highest.cpu().numpy()


def _checked(token_ids: NDArray[np.int64], highest: NDArray[np.float32]) -> Sampled:
    values = highest.tolist()
    if math.isfinite(sum(values)):  # in float64, where numbers of float32 do not overflow
        return Sampled(token_ids.tolist())
    return Sampled(token_ids.tolist(), [row for row, value in enumerate(values) if not math.isfinite(value)])


# Edits of single logits


def _held(sequences: Seq[Sequence], ahead: Seq[list[int]]) -> list[Held]:
    """The rows of sequences with a grammar."""
    return [
        (row, seq.constraint, seq.slot, seq.num_outputs + (len(ahead[row]) if ahead else 0))
        for row, seq in enumerate(sequences)
        if seq.constraint is not None
    ]


def _edited(logits: Tensor, states: Seq[SamplerState], sequences: Seq[Sequence], ahead: Seq[list[int]]) -> Tensor:
    """Logits with bias, forbidden tokens and penalties; the input stays as it is."""
    vocab_size = logits.shape[1]
    added: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    penalised: list[tuple[int, SamplerState, TokenCounts]] = []
    narrowed: list[tuple[int, Tensor]] = []
    for i, (state, seq) in enumerate(zip(states, sequences, strict=True)):
        base = i * vocab_size
        gained = ahead[i] if ahead else []
        if len(state.bias_ids):
            added.append((state.bias_ids + base, state.bias_values))
        if seq.num_outputs + len(gained) < state.params.min_tokens and len(state.stop_ids):
            added.append((state.stop_ids + base, np.full(len(state.stop_ids), -np.inf, np.float32)))
        if state.bad_words and (ends := state.ends_of_bad_words(seq, gained)):
            added.append((np.array(ends, np.int64) + base, np.full(len(ends), -np.inf, np.float32)))
        if state.others is not None:
            narrowed.append((i, state.others))
        if state.counts is not None:
            outputs = seq.tokens[seq.num_prompt : seq.num_tokens]
            state.counts.update(np.append(outputs, np.array(gained, np.int32)) if gained else outputs)
            penalised.append((base, state, state.counts))
    ruled = [i for i, state in enumerate(states) if state.params.rules is not None]
    if not added and not penalised and not narrowed and not ruled:
        return logits
    edited = logits.clone()
    flat = edited.view(-1)
    for places, values in added:  # one by one: a token may be biased and forbidden
        flat[_on(flat, places)] += _on(flat, values)
    if penalised:
        _penalise(flat, penalised)
    for i, others in narrowed:
        edited[i].masked_fill_(others.to(edited.device), -torch.inf)
    for i in ruled:
        _hold_to_rules(edited[i], states[i].params, sequences[i], ahead[i] if ahead else [])
    return edited


def _hold_to_rules(row: Tensor, params: SamplingParams, seq: Sequence, gained: list[int]) -> None:
    if params.rules is not None:
        said = seq.tokens[seq.num_prompt : seq.num_tokens].tolist()
        speech_rules.hold(row, params.rules, [*said, *gained])


def _penalise(flat: Tensor, penalised: list[tuple[int, SamplerState, TokenCounts]]) -> None:
    """Repetition over prompt and output, frequency and presence over the output; only the tokens seen are touched."""
    sizes = [counts.size for _, _, counts in penalised]
    places = _on(flat, np.concatenate([counts.ids[: counts.size] + base for base, _, counts in penalised]))
    said = _on(flat, np.concatenate([counts.counts[: counts.size] for _, _, counts in penalised]))
    params = [state.params for _, state, _ in penalised]
    repetition, frequency, presence = (
        _on(flat, np.repeat(np.array(values, np.float32), sizes))
        for values in (
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        )
    )
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - frequency * said - presence * (said > 0)


def _on(like: Tensor, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(like.device)


# Drawing, by inverting the cumulative distribution at a number of [0, 1). Tokens keep the vocabulary's order, so that
# rank plays no part. Row by row on a CPU, where a row stays in its cache; all rows at once elsewhere.


def _draw(logits: Tensor, states: Seq[SamplerState], indices: list[int]) -> NDArray[np.int64]:
    """One token id for each row of float32 logits [rows, vocab]."""
    seeds, params = [state.seed for state in states], [state.params for state in states]
    if logits.device.type != "cpu" and (drawn := kernels.draw(logits, draws_of(seeds, indices, params))) is not None:
        token_ids: NDArray[np.int64] = drawn.cpu().numpy()
        return token_ids
    uniforms = _uniform(seeds, indices)
    if logits.device.type != "cpu":
        return draw_together(logits, params, uniforms)
    work = np.zeros(-(-logits.shape[1] // CHUNK) * CHUNK, np.float32)
    return np.array(
        [
            draw_one(row, one, uniform, work)
            for row, one, uniform in zip(logits.numpy(), params, uniforms.tolist(), strict=True)
        ],
        np.int64,
    )


def draws_of(seeds: list[int], indices: list[int], params: Seq[SamplingParams]) -> kernels.Draws:
    """What a kernel has to know."""
    return kernels.Draws(
        np.array(seeds, np.uint64),
        np.array(indices, np.uint64),
        np.array([one.top_p for one in params], np.float64),
        np.array([one.temperature for one in params], np.float32),
        np.array([math.log(one.min_p) if one.min_p else -math.inf for one in params], np.float32),
        np.array([one.top_k for one in params], np.int32),
    )


def draw_one(row: NDArray[np.float32], params: SamplingParams, uniform: float, work: NDArray[np.float32]) -> int:
    """One row [vocab]. `work` is memory for a row, padded with zeros to whole chunks."""
    highest = row.max()
    if not np.isfinite(highest):
        return 0  # this row fails, see `_checked`
    scaled = work[: len(row)]
    np.subtract(row, highest, out=scaled)
    if params.temperature != 1:
        scaled /= np.float32(params.temperature)
    if params.top_k or params.top_p < 1 or params.min_p:
        stay = np.flatnonzero(scaled >= np.float32(row_threshold(scaled, params)))
        return int(stay[_place(np.exp(scaled[stay]), uniform)])
    np.exp(scaled, out=scaled)
    chunks = work.reshape(-1, CHUNK)
    sums = chunks.sum(axis=1).cumsum(dtype=np.float64)
    target = uniform * float(sums[-1])
    chunk = min(int(sums.searchsorted(target, side="right")), len(sums) - 1)
    before = float(sums[chunk - 1]) if chunk else 0.0
    return chunk * CHUNK + _place(chunks[chunk], target=target - before)


def _place(weights: NDArray[np.float32], uniform: float = 0.0, target: float | None = None) -> int:
    """First place where the sum of weights passes `target`, or `uniform` of all; never one that weighs nothing."""
    sums = weights.cumsum(dtype=np.float64)
    place = int(sums.searchsorted(uniform * sums[-1] if target is None else target, side="right"))
    if place < len(sums):
        return place
    # The chunk's sum was rounded in another order than these.
    return int(np.flatnonzero(weights)[-1])


def draw_together(logits: Tensor, params: Seq[SamplingParams], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """The same for all rows [rows, vocab] at once, on any device."""
    count, vocab_size = logits.shape
    temperatures = np.array([one.temperature for one in params], np.float32)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(_on(logits, temperatures).unsqueeze(1))
    padded = torch.zeros((count, -(-vocab_size // CHUNK) * CHUNK), device=logits.device)
    weights = torch.exp(scaled, out=padded[:, :vocab_size])  # [rows, vocab], highest is 1
    if any(one.top_k or one.top_p < 1 or one.min_p for one in params):
        weights.mul_(scaled >= _thresholds(scaled, params).unsqueeze(1))
    chunks = padded.view(count, -1, CHUNK)
    sums = chunks.sum(dim=-1).double().cumsum(dim=-1)  # [rows, chunks]
    target = _on(logits, uniforms) * sums[:, -1]
    chosen = (sums <= target.unsqueeze(1)).sum(dim=-1).clamp_(max=sums.shape[1] - 1)  # first chunk whose sum is above
    every = torch.arange(count, device=logits.device)
    before = torch.where(chosen > 0, sums[every, (chosen - 1).clamp(min=0)], 0)
    inside = chunks[every, chosen]  # [rows, CHUNK]
    place = (inside.double().cumsum(dim=-1) <= (target - before).unsqueeze(1)).sum(dim=-1)
    last = CHUNK - 1 - (inside > 0).flip(-1).to(torch.uint8).argmax(dim=-1)  # as in `_place`
    token_ids: NDArray[np.int64] = (chosen * CHUNK + torch.minimum(place, last)).cpu().numpy()
    return token_ids


def _thresholds(scaled: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """The lowest scaled logit of each row [rows, vocab] that min_p, top_k and top_p leave; equal logits stay together.

    The highest logit of a row is 0. Sorts everything, which a GPU does fast.
    """
    vocab_size = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    least = [math.log(one.min_p) if one.min_p else -math.inf for one in params]
    floor = torch.tensor(least, device=scaled.device).unsqueeze(1)
    top_k = torch.tensor([one.top_k or vocab_size for one in params], device=scaled.device).clamp(max=vocab_size)
    top_p = torch.tensor([one.top_p for one in params], dtype=torch.float64, device=scaled.device).unsqueeze(1)
    rank = torch.arange(vocab_size, device=scaled.device)
    stays = (ordered >= floor) & (rank < top_k.unsqueeze(1))
    weights = torch.where(stays, ordered.exp(), 0).double()
    sums = weights.cumsum(dim=-1)
    # A token stays while those before it hold less than top_p.
    stays &= (sums - weights < top_p * sums[:, -1:]) | (top_p >= 1)
    kept = stays.sum(dim=-1).clamp(min=1)
    return ordered.gather(1, (kept - 1).unsqueeze(1)).squeeze(1)


def row_threshold(row: NDArray[np.float32], params: SamplingParams) -> float:
    """The same for one row [vocab] on a CPU, looking at no more tokens than needed."""
    least = math.log(params.min_p) if params.min_p else -math.inf
    top_k = params.top_k if 0 < params.top_k < len(row) else 0
    if not top_k and params.top_p >= 1:
        return least
    likely = row[row >= LIKELY]
    if top_k:
        if len(likely) < top_k:
            likely = row
        likely = np.partition(likely, len(likely) - top_k)[len(likely) - top_k :]
        if params.top_p >= 1:
            return max(least, float(likely[0]))
        return _nucleus(likely, params.top_p, least)
    total = float(np.exp(row if least == -math.inf else row[row >= least]).sum())
    held = float(np.exp(likely[likely >= least]).sum())
    return _nucleus(likely if held > params.top_p * total else row, params.top_p, least, total)


def _nucleus(scaled: NDArray[np.float32], top_p: float, least: float, total: float | None = None) -> float:
    """The lowest of the fewest scaled logits that hold `top_p` of `total` (None: of all of them)."""
    ordered = np.sort(scaled)[::-1]  # as fast as anything cleverer: numpy sorts with vector instructions
    weights = np.exp(ordered).astype(np.float64)
    weights[ordered < least] = 0
    sums = weights.cumsum()
    bound = top_p * (sums[-1] if total is None else total)
    kept = int((sums - weights < bound).sum())
    return float(ordered[max(kept, 1) - 1])


# Random numbers


def _seed(requested: int | None, engine_seed: int, request_id: int) -> int:
    """Requests without a seed get one of their own, the same in every run of an engine with the same seed."""
    if requested is not None:
        return requested & 0xFFFFFFFFFFFFFFFF
    mixed = _mix(np.array([engine_seed & 0xFFFFFFFFFFFFFFFF], np.uint64) * _GOLDEN + np.uint64(request_id))
    return int(mixed[0])


def _uniform(seeds: list[int], indices: list[int]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, token index): 32 bits of two rounds of splitmix64."""
    state = _mix(np.array(seeds, np.uint64) + _GOLDEN)
    bits = _mix(state + np.array(indices, np.uint64) * _GOLDEN)
    return (bits >> np.uint64(32)).astype(np.float64) / 2**32


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_A
    state = (state ^ (state >> np.uint64(27))) * _MIX_B
    return state ^ (state >> np.uint64(31))
