"""The voice that speaks the training's words: espeak-ng's library, which comes with the development dependencies."""

from __future__ import annotations

import ctypes

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

# Of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DO_NOT_EXIT = 1 << 15
_RATE, _PITCH = 1, 3
_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Voice:
    """Speaks one text at a time. The library has one state per process, so there should be one of these."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._pieces: list[NDArray[np.int16]] = []
        data = espeakng_loader.get_data_path().encode()
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DO_NOT_EXIT)  # Hz
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng does not start from {data.decode()}")
        self._callback = _CALLBACK(self._keep)  # held here: the library only has its address
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int) -> NDArray[np.int16]:
        """Mono samples at `rate`. `voice` is a language and perhaps a variant (en-us+f2), `pitch` is from 0 to 99."""
        library, spoken = self._library, text.encode() + b"\0"
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(_RATE, words_per_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        self._pieces.clear()
        if library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, 0, 0, _UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng does not speak {text!r}")
        return np.concatenate(self._pieces)

    def _keep(self, samples: ctypes._Pointer[ctypes.c_short] | None, count: int, events: object) -> int:
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on
