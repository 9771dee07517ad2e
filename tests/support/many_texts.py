"""Texts of every sort for comparing tokenizers: scripts, code, emoji, control characters, marks in pieces."""

from __future__ import annotations

import random
import unicodedata

SCRIPTS = {
    "Latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéüñçøßåőšžğıİǅﬁ",
    "Greek": "".join(map(chr, range(0x391, 0x3CA))) + "άέήΐ",
    "Cyrillic": "".join(map(chr, range(0x410, 0x450))) + "ёіїйЙ",
    "Hebrew": "".join(map(chr, range(0x5D0, 0x5EB))) + "\u05b0\u05b4",
    "Arabic": "".join(map(chr, range(0x620, 0x64B))) + "\u064b\u0651\u0660\u0665",
    "Devanagari": "".join(map(chr, range(0x905, 0x94E))) + "\u0966\u096f",
    "Bengali": "কখগঘঙচছজঝঞটঠডঢণতথদধনপফবভমযরলশষসহািীুূৃেৈোৌ্",
    "Tamil": "அஆஇஈஉஊஎகஙசஞடணதநபமயரலவழளறனாிீுூெேைொோௌ்",
    "Thai": "".join(map(chr, range(0xE01, 0xE31))) + "ะัาำิีึื่้๑๙",
    "Georgian": "".join(map(chr, range(0x10D0, 0x10F1))),
    "Hangul": "가나다라마바사아자차카타파하한국어말글\u1112\u1161\u11ab",
    "Kana": "あいうえおかがきぎくぐけげこごアイウエオカガヵーぱぴ",
    "Han": "你好世界中文字语言模型图像一二三龥㐀𠀀",
}
OTHERS = (
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # it's\r\n",
    "for(int i=0;i<10;++i){a[i]+=0x1F;}//ok\n\n\n",
    '{"a": [1, 2.50, null], "b": "\\u00e9"}',
    "<p class='x'>&amp;</p>   \t ",
    "I'm you'LL we'Ve THEY'RE don't 's 'S it\u2019s O'Neill",
    "👍🏽👩‍👩‍👧‍👦🇫🇷🏳️‍🌈☃️1️⃣😀😀",
    "\x00\x01\x07\x1b[31m\x7f\x85\u200b\u200d\ufeff\u2028\u00a0\u3000\u00ad",
    "e\u0301a\u0308\u0323 o\u0302\u0301 \u1100\u1161 \u212b \u0958 \ufb1d",
    "1234567890 12,345.67 ١٢٣ ५६७ ⅷ ½ ² 0x7f 3/4",
    "\n\n  \n\t\n \r\n\r x \n",
    "a/b//c/ http://x.org/?q=1&r=%20#z \\n \\\\",
    "…—–“”«»¿¡§€£¥©®™∑√≠≤",
)


def many_texts(count: int, seed: int) -> list[str]:
    """Each of one to six pieces, some of them decomposed; a seed makes the same texts again."""
    dice = random.Random(seed)
    return [_text(dice) for _ in range(count)]


def _text(dice: random.Random) -> str:
    pieces = []
    for _ in range(dice.randint(1, 6)):
        kind = dice.random()
        if kind < 0.6:
            letters = SCRIPTS[dice.choice(list(SCRIPTS))]
            words = ["".join(dice.choices(letters, k=dice.randint(1, 7))) for _ in range(dice.randint(1, 5))]
            pieces.append(dice.choice((" ", " ", "", ", ", "-", "'")).join(words))
        elif kind < 0.9:
            other = dice.choice(OTHERS)
            start = dice.randrange(len(other))
            pieces.append(other[start : start + dice.randint(1, 30)])
        else:
            pieces.append(dice.choice((" ", "  ", "\n", "\t", "   \n", "\r\n")))
    text = dice.choice(("", " ", "")).join(pieces)
    return unicodedata.normalize("NFD", text) if dice.random() < 0.15 else text
