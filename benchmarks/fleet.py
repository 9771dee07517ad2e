"""Up to 10,000 replicas, simulated: `python benchmarks/fleet.py [--replicas 1 10 100 1000 10000] [--json FILE]`.

Conversations of several turns arrive at random; each turn brings the words of all turns before it. A replica computes
`slots` sequences at a time, and a prompt's tokens unless its cache still has them; caches forget the conversation that
was longest unused. What is varied is who decides where a turn goes:

    random    anywhere
    two       the shorter queue of two replicas taken at random (what Ray does without a session)
    session   always the replica that the conversation's name hashes to (x-session-id)
    prefix    the same, unless that one has all slots taken: then the shorter queue of two

The default times are those of Qwen2-VL-2B's shape on two cores (docs/benchmarks.md): 34 ms a token for one request, 338
prompt tokens a second. Replicas fail at random, lose what they worked on and their cache, and come
back after `--restart-s`. With `--within-s` the largest load is looked for whose first tokens come in time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROUTERS = ("random", "two", "session", "prefix")


@dataclass(frozen=True, slots=True)
class Shape:
    """What is simulated. Tokens, seconds, and counts of one replica."""

    slots: int = 8
    prefill_s: float = 0.003  # a prompt token that no cache has; prompts of one replica come one after the other
    decode_s: float = 0.034  # a token of an answer, with few others beside it
    slower: float = 0.25  # by how much of that for each sequence beside it
    cache_tokens: int = 200_000
    new_tokens: int = 100  # that a turn adds to its prompt
    answer_tokens: int = 100
    turns: int = 6
    pause_s: float = 10.0  # between an answer and the next turn
    prefill_share: float = 0.7  # of a step that prompts may take beside answers
    load: float = 0.7  # of all slots, were every prompt cached but for its new tokens
    failures_per_day: float = 1.0  # of a replica
    restart_s: float = 60.0


@dataclass(slots=True)
class Replica:
    running: dict[int, Any] = field(default_factory=dict)
    waiting: deque[Any] = field(default_factory=deque)
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)  # conversation -> tokens
    cached: int = 0
    is_up: bool = True
    busy_s: float = 0.0
    free_s: float = 0.0  # when its prompts are computed

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def keep(self, conversation: int, tokens: int, most: int) -> None:
        self.cached += tokens - self.cache.pop(conversation, 0)
        self.cache[conversation] = tokens
        while self.cached > most:
            self.cached -= self.cache.popitem(last=False)[1]


class Fleet:
    """One run. Events are (time, number, kind, what)."""

    def __init__(self, shape: Shape, count: int, router: str, turns: int, seed: int) -> None:
        self.shape, self.router, self.random = shape, router, random.Random(seed)
        self.replicas = [Replica() for _ in range(count)]
        self.events: list[tuple[float, int, str, Any]] = []
        self.left, self.now_s, self._number, self._ids = turns, 0.0, 0, 0
        self.firsts: list[float] = []  # seconds until the first token
        self.prompt_tokens = self.hit_tokens = self.lost = self.most = 0
        service_s = shape.new_tokens * shape.prefill_s + shape.answer_tokens * self._token_s(
            int(shape.slots * shape.load)
        )
        self.rate = count * shape.slots * shape.load / service_s / shape.turns  # conversations a second
        self._at(self.random.expovariate(self.rate), "begin", None)
        self.fails_s = 86_400 / shape.failures_per_day / count if shape.failures_per_day else float("inf")
        self._at(self.random.expovariate(1 / self.fails_s), "fail", None)

    def _token_s(self, beside: int) -> float:
        return self.shape.decode_s * (1 + self.shape.slower * beside)

    def _at(self, when_s: float, kind: str, what: Any) -> None:
        self._number += 1
        heapq.heappush(self.events, (when_s, self._number, kind, what))

    def run(self) -> None:
        while self.left > 0:
            self.now_s, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(what)

    def _begin(self, _: None) -> None:
        self._ids += 1
        self._turn((self._ids, 1))
        self._at(self.now_s + self.random.expovariate(self.rate), "begin", None)

    def _turn(self, turn: tuple[int, int]) -> None:
        replica = self._choose(turn[0])
        replica.waiting.append((turn, self.now_s))
        self.most = max(self.most, replica.load)
        self._start(replica)

    def _choose(self, conversation: int) -> Replica:
        if self.router in ("session", "prefix"):
            own = self.replicas[hash((conversation, 0x5EED)) % len(self.replicas)]
            is_full = self.router == "prefix" and own.load >= self.shape.slots
            if own.is_up and not is_full:
                return own
        up = [one for one in self.random.choices(self.replicas, k=4) if one.is_up] or [
            r for r in self.replicas if r.is_up
        ]
        return up[0] if self.router == "random" else min(up[:2], key=lambda one: one.load)

    def _start(self, replica: Replica) -> None:
        while replica.is_up and replica.waiting and len(replica.running) < self.shape.slots:
            (conversation, number), came_s = replica.waiting.popleft()
            shape = self.shape
            words = (number - 1) * (shape.new_tokens + shape.answer_tokens) + shape.new_tokens
            hit = min(replica.cache.get(conversation, 0), words)
            self.prompt_tokens, self.hit_tokens = self.prompt_tokens + words, self.hit_tokens + hit
            replica.free_s = max(replica.free_s, self.now_s) + (words - hit) * shape.prefill_s / shape.prefill_share
            self.firsts.append(replica.free_s - came_s)
            takes_s = replica.free_s - self.now_s + shape.answer_tokens * self._token_s(len(replica.running))
            replica.running[self._number + 1] = (conversation, number)
            replica.busy_s += takes_s
            replica.keep(conversation, words + shape.answer_tokens, shape.cache_tokens)
            self._at(self.now_s + takes_s, "end", (replica, self._number + 1))

    def _end(self, ended: tuple[Replica, int]) -> None:
        replica, number = ended
        if (turn := replica.running.pop(number, None)) is None:
            return  # it was lost
        self.left -= 1
        if turn[1] < self.shape.turns:
            pause_s = self.random.expovariate(1 / self.shape.pause_s)
            self._at(self.now_s + pause_s, "turn", (turn[0], turn[1] + 1))
        self._start(replica)

    def _fail(self, _: None) -> None:
        replica = self.random.choice(self.replicas)
        if len(self.replicas) > 1 and replica.is_up:
            self.lost += len(replica.running)
            again = [turn for turn, _ in replica.waiting]
            replica.running, replica.cache, replica.cached = {}, OrderedDict(), 0
            replica.waiting.clear()
            replica.is_up = False
            self._at(self.now_s + self.shape.restart_s, "back", replica)
            for turn in again:
                self._turn(turn)
        self._at(self.now_s + self.random.expovariate(1 / self.fails_s), "fail", None)

    def _back(self, replica: Replica) -> None:
        replica.is_up = True

    def figures(self) -> dict[str, Any]:
        firsts = sorted(self.firsts[len(self.firsts) // 4 :])  # without the beginning, when caches are empty
        used = sum(one.busy_s for one in self.replicas) / (self.now_s * self.shape.slots * len(self.replicas))
        return {
            "router": self.router,
            "replicas": len(self.replicas),
            "turns": len(self.firsts),
            "cached": self.hit_tokens / self.prompt_tokens,
            "slots_used": used,
            "first_p50_s": firsts[len(firsts) // 2],
            "first_p99_s": firsts[int(len(firsts) * 0.99)],
            "most_at_one": self.most,
            "lost": self.lost,
            "turns_a_second": len(self.firsts) / self.now_s / len(self.replicas),
        }


LOADS = [step / 20 for step in range(1, 20)]


def run(shape: Shape, count: int, router: str, turns_each: int, seed: int) -> dict[str, Any]:
    fleet = Fleet(shape, count, router, max(20_000, turns_each * count), seed)
    fleet.run()
    return fleet.figures()


def most(shape: Shape, count: int, router: str, turns_each: int, seed: int, within_s: float) -> dict[str, Any]:
    """The figures under the largest load at which 99 of 100 turns have their first token in time."""
    low, high = 0, len(LOADS)  # what low carries is carried, what high has is not
    best: dict[str, Any] = {}
    while low < high:
        middle = (low + high) // 2
        found = run(replace(shape, load=LOADS[middle]), count, router, turns_each, seed)
        if found["first_p99_s"] <= within_s:
            best, low = {**found, "load": LOADS[middle]}, middle + 1
        else:
            high = middle
    return best or {**found, "load": 0.0, "turns_a_second": 0.0}


def told(row: dict[str, Any], seconds: float) -> str:
    return (
        f"{row['replicas']:6} {row['router']:8} load {row['load']:.2f}  turns/s each {row['turns_a_second']:.2f}  "
        f"cached {row['cached']:4.0%}  first token p50 {row['first_p50_s']:6.2f} s  p99 {row['first_p99_s']:7.2f} s  "
        f"most at one {row['most_at_one']:4}  lost {row['lost']:5}  ({seconds:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=ROUTERS)
    parser.add_argument("--turns-each", type=int, default=300, help="of each replica; at least 20,000 in all")
    parser.add_argument("--within-s", type=float, help="find the largest load with first tokens in so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    numbers = {name: one.default for name, one in Shape.__dataclass_fields__.items()}
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    shape, rows = Shape(**{name: given[name] for name in numbers}), []
    for count in given["replicas"]:
        for router in given["routers"]:
            start_s = time.perf_counter()
            how = (shape, count, router, given["turns_each"], given["seed"])
            if given["within_s"] is None:
                rows.append({**run(*how), "load": shape.load})
            else:
                rows.append(most(*how, given["within_s"]))
            print(told(rows[-1], time.perf_counter() - start_s), flush=True)
    if given["json"] is not None:
        given["json"].write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
