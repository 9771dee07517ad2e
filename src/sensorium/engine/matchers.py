"""The grammar library through its C interface: `NativeMatcher` does what the methods of its Python class of these names
do. Its tokenizer is built without the interpreter's lock, which the Python class holds for a quarter of a second where
there are 150,000 tokens, and which no step can be computed without.

The interface is the library's published one (llguidance.h), but that the Python package brings it is not promised:
`library` is None where it is missing or of a version whose structures are not known.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
from llguidance import LLParserLimits, _lib

from sensorium.engine.spelling import TokenTable
from sensorium.kernels import FEW_FORCED, GrammarFunctions

VERSIONS = ("1.9",)  # those that pyproject.toml allows
MAX_FORCED = 4096  # tokens that a grammar forces at once; more come with the next
ERROR_BYTES = 512
NO_TOKENS = "a grammar's tokenizer could not be built"

_Few, _Many = c_uint32 * FEW_FORCED, c_uint32 * MAX_FORCED
_Tokenize = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)


class _TokenizerInit(ctypes.Structure):
    """LlgTokenizerInitV2."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("vocab_size", c_uint32),
        ("tok_eos", c_uint32),
        ("token_lens", c_void_p),
        ("token_bytes", c_void_p),
        ("tokenizer_json", c_char_p),
        ("tokenize_assumes_string", c_bool),
        ("tokenize_fn", _Tokenize),
        ("use_approximate_greedy_tokenize_fn", c_bool),
        ("tokenize_user_data", c_void_p),
        ("slices", c_void_p),
        ("tok_eos_extra", c_void_p),
        ("tok_eos_extra_count", c_uint32),
    )


class _Limits(ctypes.Structure):
    """ParserLimits."""

    _fields_ = (
        ("max_items_in_row", c_size_t),
        ("initial_lexer_fuel", c_uint64),
        ("step_lexer_fuel", c_uint64),
        ("step_max_items", c_size_t),
        ("max_lexer_states", c_size_t),
        ("max_grammar_size", c_size_t),
        ("precompute_large_lexemes", c_bool),
        ("verbose_errors", c_bool),
    )


_LIMITS = ("max_items_in_row", "initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states")


class _MatcherInit(ctypes.Structure):
    """LlgConstraintInit, with room for fields that the library may have added."""

    _fields_ = (
        ("tokenizer", c_void_p),
        ("log_buffer_level", c_uint32),
        ("log_stderr_level", c_uint32),
        ("ff_tokens_ok", c_bool),
        ("backtrack_ok", c_bool),
        ("limits", _Limits),
        ("room", ctypes.c_char * 256),
    )


_SLOW: dict[str, tuple[Any, list[Any]]] = {
    "llg_new_tokenizer_v2": (c_void_p, [POINTER(_TokenizerInit), c_char_p, c_size_t]),
    "llg_new_matcher": (c_void_p, [POINTER(_MatcherInit), c_char_p, c_char_p]),
    "llg_matcher_compute_mask_into": (c_int32, [c_void_p, c_void_p, c_size_t]),
    "llg_free_tokenizer": (None, [c_void_p]),
}
"""Name -> (result, arguments) of what runs without the interpreter's lock."""
_QUICK: dict[str, tuple[Any, list[Any]]] = {
    "llg_get_version": (c_char_p, []),
    "llg_constraint_init_set_defaults": (None, [POINTER(_MatcherInit), c_void_p]),
    "llg_clone_matcher": (c_void_p, [c_void_p]),
    "llg_free_matcher": (None, [c_void_p]),
    "llg_matcher_consume_token": (c_int32, [c_void_p, c_uint32]),
    "llg_matcher_consume_tokens": (c_int32, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_compute_ff_tokens": (c_int32, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_validate_tokens": (c_int32, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_get_error": (c_char_p, [c_void_p]),
    "llg_matcher_is_error": (c_bool, [c_void_p]),
    "llg_matcher_is_stopped": (c_bool, [c_void_p]),
}
"""The same of what is shorter than giving the lock back."""


_CALLED = (
    "validate_tokens",
    "compute_mask_into",
    "consume_token",
    "consume_tokens",
    "compute_ff_tokens",
    "is_stopped",
    "is_error",
)
"""What native code calls, in the order of `GrammarFunctions`."""


class CLibrary:
    """Its functions, by their names without `llg_`."""

    def __init__(self, path: str) -> None:
        """OSError or AttributeError if it is not what it should be."""
        for loaded, functions in ((ctypes.CDLL(path), _SLOW), (ctypes.PyDLL(path), _QUICK)):
            for name, (result, arguments) in functions.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("llg_"), function)
        called = [getattr(self, f"matcher_{name}") for name in _CALLED]
        self.functions = GrammarFunctions(*(ctypes.cast(function, c_void_p).value or 0 for function in called))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)


@functools.cache
def library() -> CLibrary | None:
    try:
        found = CLibrary(_lib.__file__)
    except (OSError, AttributeError):
        return None
    version: bytes = found.get_version()
    return found if version.decode().startswith(tuple(f"llguidance@{one}." for one in VERSIONS)) else None


class NativeTokenizer:
    """All tokens as bytes, and how texts are written in them."""

    def __init__(
        self, library: CLibrary, table: TokenTable, ends: Sequence[int], spelled: Callable[[bytes], list[int]]
    ) -> None:
        """`ends` are the end tokens, at least one. ValueError if the library does not take that."""
        self.library = library
        self.ends = frozenset(ends)
        self.num_words = -(-len(table.lengths) // 32)
        self._callback = _Tokenize(_writer(spelled))  # kept: the library calls it
        extra = np.array(ends[1:], np.uint32)
        made = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit),
            vocab_size=len(table.lengths),
            tok_eos=ends[0],
            token_lens=table.lengths.ctypes.data,
            token_bytes=ctypes.cast(c_char_p(table.joined), c_void_p),
            tokenize_assumes_string=True,
            tokenize_fn=self._callback,
            tok_eos_extra=extra.ctypes.data if len(extra) else None,
            tok_eos_extra_count=len(extra),
        )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self.address: int | None = library.new_tokenizer_v2(made, error, ERROR_BYTES)
        if self.address is None:
            raise ValueError(f"{NO_TOKENS}: {error.value.decode(errors='replace')}")

    def matcher(self, grammar: str, limits: LLParserLimits) -> NativeMatcher:
        """At the beginning of a grammar, as the library describes them; in an error state where that is none."""
        made = _MatcherInit()
        self.library.constraint_init_set_defaults(made, self.address)
        made.log_buffer_level = made.log_stderr_level = 0
        for name in _LIMITS:
            setattr(made.limits, name, getattr(limits, name))
        made.limits.verbose_errors = False
        return NativeMatcher(self, self.library.new_matcher(made, b"llguidance", grammar.encode()))

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.library.free_tokenizer(self.address)


def _writer(spelled: Callable[[bytes], list[int]]) -> Callable[[Any, int, int, int, int], int]:
    """`spelled` as the library calls it: (data, text, its length, tokens, room for so many) -> number of tokens."""

    def write(_: Any, text: int, length: int, out: int, room: int) -> int:
        found = np.array(spelled(ctypes.string_at(text, length)), np.uint32)
        if room and len(found):
            ctypes.memmove(out, found.ctypes.data, 4 * min(room, len(found)))
        return len(found)

    return write


class NativeMatcher:
    """A place in a grammar."""

    __slots__ = ("_library", "_tokenizer", "address")

    def __init__(self, tokenizer: NativeTokenizer, address: int) -> None:
        self._tokenizer, self._library, self.address = tokenizer, tokenizer.library, address

    @property
    def functions(self) -> GrammarFunctions:
        """For native code, which is given the address."""
        return self._library.functions

    def deep_copy(self) -> NativeMatcher:
        return NativeMatcher(self._tokenizer, self._library.clone_matcher(self.address))

    def is_error(self) -> bool:
        return bool(self._library.matcher_is_error(self.address))

    def get_error(self) -> str:
        return (self._library.matcher_get_error(self.address) or b"").decode(errors="replace")

    def is_stopped(self) -> bool:
        return bool(self._library.matcher_is_stopped(self.address))

    def consume_token(self, token: int) -> bool:
        """An end token is taken once the text is whole, too."""
        if token in self._tokenizer.ends and self.is_stopped():
            return not self.is_error()
        return bool(self._library.matcher_consume_token(self.address, token) == 0)

    def consume_tokens(self, tokens: Sequence[int]) -> bool:
        array = np.array(tokens, np.uint32)
        return bool(self._library.matcher_consume_tokens(self.address, array.ctypes.data, len(array)) == 0)

    def validate_tokens(self, tokens: Sequence[int]) -> int:
        """How many of them may follow, one after the other."""
        array = np.array(tokens, np.uint32)
        return max(int(self._library.matcher_validate_tokens(self.address, array.ctypes.data, len(array))), 0)

    def allows(self, token: int) -> bool:
        """Whether this one may follow."""
        return bool(self._library.matcher_validate_tokens(self.address, byref(c_uint32(token)), 1) == 1)

    def compute_ff_tokens(self) -> list[int]:
        found = _Few()
        count = self._library.matcher_compute_ff_tokens(self.address, found, FEW_FORCED)
        if count == FEW_FORCED:  # there may be more
            found = _Many()
            count = self._library.matcher_compute_ff_tokens(self.address, found, MAX_FORCED)
        return found[:count] if count > 0 else []

    def compute_bitmask(self) -> bytes:
        mask = np.zeros(self._tokenizer.num_words, np.uint32)
        self.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask.tobytes()

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        """Into `size` bytes at an address. Nothing is written where the grammar fails: see `is_error`."""
        self._library.matcher_compute_mask_into(self.address, address, size)

    def __del__(self) -> None:
        self._library.free_matcher(self.address)
